"""The learner's weights in a buffer of rank 0's device, as another process reads them, and how it knows what it read.

Rank 0 (trainer.weight_buffers) writes versions into two buffers in turn and never waits for a reader. A file beside
each buffer says what is in it:

    8 bytes, little-endian   the version that the buffer holds; WRITING while rank 0 writes
    the rest                 `Manifest` in JSON, the same for all versions

A reader takes tensors one by one into memory of its own, and then looks whether the buffer still holds its version: if
not, some of what it read may be of a later one, and all of it is to be read again (`Overwritten`). The digest says that
what arrived is what was written: the SHA-256 of the manifest and of a checksum for each piece of each tensor, which
both sides take on their device.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec
import numpy as np
import torch
from torch import Tensor

from rollout.shared_memory import Handle, Opened, open_memory

WRITING = -1
STATE_BYTES = 8
WHOLE, OVERWRITTEN = "", "overwritten"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNMENT = 256
_PIECE = 1 << 15  # words of 8 bytes that make one sum: fixed, both sides must agree
_PIECES_AT_ONCE = {"cpu": 4, "cuda": 256}  # of the product: 1 MiB stays in a cache, 64 MiB keep a GPU busy
_REMEDY = (
    "; it lies in memory of the trainer's process: that has ended, or this worker is not of its user, on its machine "
    "and in its container. Start the worker there, or the run with rollout.weights=memory or, for other machines, files"
)


class Overwritten(RuntimeError):
    """The trainer began to write a later version over the one that was read: load the newest.

    The engine holds parts of both until then.
    """


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a tensor lies in the buffer, contiguous.

    Example: Place("model.norm.weight", "bfloat16", (2048,), 0)
    """

    name: str
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: tuple[int, ...]
    start: int  # bytes, a multiple of 256

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor as a view of `memory`, uint8, that begins where it begins."""
        return memory[: self.size].view(DTYPES[self.dtype]).view(self.shape)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A buffer and what lies where. `owner` is drawn anew by each start of a trainer.

    Example: msgspec.json.decode(content[STATE_BYTES:], type=Manifest)
    """

    owner: str
    handle: Handle
    places: tuple[Place, ...]


def room(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes up in a buffer; what is over is zeros.

    Example: room(257) == 512
    """
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def checksums(memory: Tensor) -> Tensor:
    """Σᵢ wᵢ fᵢ mod 2⁶⁴ for each piece of 32,768 words w of `memory` (uint8 [8 n]); int64 [pieces], on its device.

    The factors f are odd, so that a change of one word always shows, and mixed, so that changes of several do but for
    one in about 2⁶⁴. Integers: every device gets the same sums. It finds accidents; it is no signature.

    Example: checksums(torch.zeros(64, dtype=torch.uint8)).tolist() == [0]
    """
    words, factors = memory.view(torch.int64), _factors(memory.device)
    whole = len(words) // _PIECE * _PIECE
    pieces = words[:whole].view(-1, _PIECE)
    sums = [(part * factors).sum(1) for part in pieces.split(_PIECES_AT_ONCE[memory.device.type])] if whole else []
    if rest := len(words) - whole:
        sums.append((words[whole:] * factors[:rest]).sum(0, keepdim=True))
    return torch.cat(sums) if sums else words.new_empty(0)


def digest_of(manifest: bytes, sums: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of a buffer's manifest and of its tensors' checksums, in the manifest's order.

    Example: digest_of(manifest, [checksums(memory) for memory in tensors])
    """
    return hashlib.sha256(manifest + torch.cat(list(sums)).cpu().numpy().astype("<i8").tobytes()).hexdigest()


class SharedWeights:
    """One version, read once: every tensor by `read`, then `outcome`. A context.

    RuntimeError where file or buffer cannot be opened.

    Example: with SharedWeights(file, version=3, digest=digest, device=device) as weights:
                 tensors = {name: weights.read(name) for name in weights.shapes}
                 require_whole([weights.outcome()], version=3)
    """

    def __init__(self, file: Path, *, version: int, digest: str, device: torch.device) -> None:
        self.version, self.digest, self.device = version, digest, device
        try:
            self._descriptor, self._text = _open_manifest(file)
            try:
                manifest = msgspec.json.decode(self._text, type=Manifest)
                self._buffer = _opened(manifest, device)
            except BaseException:
                os.close(self._descriptor)
                raise
        except (OSError, RuntimeError, msgspec.DecodeError) as error:
            raise RuntimeError(f"weights {version}: {file} cannot be read ({error}){_REMEDY}") from error
        self._places = {place.name: place for place in manifest.places}
        self._sums: dict[str, Tensor] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by its Hugging Face name."""
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        """A copy on this engine's device."""
        place = self._places[name]
        copy = torch.empty(room(place.size), dtype=torch.uint8, device=self.device)
        self._buffer.copy_to(place.start, copy)
        self._sums[name] = checksums(copy)
        return place.of(copy)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them."""
        return ((name, self.read(name)) for name in self._places)

    def outcome(self) -> str:
        """WHOLE, OVERWRITTEN, or what is wrong with what was read (a word that other processes can be told)."""
        found = digest_of(self._text, [self._sums[name] for name in self._places])  # waits for the device
        if _held(self._descriptor) != self.version:
            return OVERWRITTEN
        if found != self.digest:
            return (
                f"what arrived has digest {found}, not {self.digest}: this engine's device does not read what rank 0's "
                "holds. Use rollout.weights=memory"
            )
        return WHOLE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def require_whole(outcomes: Iterable[str], *, version: int) -> None:
    """Raise Overwritten, or RuntimeError with what is wrong, unless every process read the whole version.

    Example: require_whole(["", ""], version=3)
    """
    outcomes = list(outcomes)
    if wrong := [outcome for outcome in outcomes if outcome not in (WHOLE, OVERWRITTEN)]:
        raise RuntimeError(wrong[0] if wrong[0].startswith("weights") else f"weights {version}: {wrong[0]}")
    if OVERWRITTEN in outcomes:
        raise Overwritten(f"weights {version} were overwritten while they were read")


def shared_shapes(file: Path, *, version: int) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of what a buffer holds, from its file alone. RuntimeError where that cannot be read.

    Example: shared_shapes(Path("/proc/71/fd/8"), version=3)["model.norm.weight"] == (2048,)
    """
    try:
        descriptor, text = _open_manifest(file)
        os.close(descriptor)
        return {place.name: place.shape for place in msgspec.json.decode(text, type=Manifest).places}
    except (OSError, msgspec.DecodeError) as error:
        raise RuntimeError(f"weights {version}: {file} cannot be read ({error}){_REMEDY}") from error


def _open_manifest(file: Path) -> tuple[int, bytes]:
    """A descriptor to read the state from, and the manifest."""
    if not file.is_file():  # on another machine the same name may be a pipe, which would be waited for
        raise FileNotFoundError("no such file")
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    return descriptor, os.pread(descriptor, os.fstat(descriptor).st_size, STATE_BYTES)


def _held(descriptor: int) -> int:
    return int.from_bytes(os.pread(descriptor, STATE_BYTES, 0), "little", signed=True)


_mappings: dict[tuple[str, Handle], Opened] = {}


def _opened(manifest: Manifest, device: torch.device) -> Opened:
    """Opened once, for as long as this process lives or until another trainer's weights come."""
    if (found := _mappings.get((manifest.owner, manifest.handle))) is not None:
        return found
    if any(owner != manifest.owner for owner, _ in _mappings):
        while _mappings:
            _mappings.popitem()[1].close()
    _mappings[manifest.owner, manifest.handle] = opened = open_memory(manifest.handle, device)
    return opened


@cache
def _factors(device: torch.device) -> Tensor:
    """splitmix64 of 1, 2, 3, …, made odd (Steele et al., OOPSLA 2014); int64 [_PIECE]."""
    state = np.arange(1, _PIECE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((state ^ (state >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)
