"""The learner's newest weights in memory of rank 0's device, from which rollout workers copy them to theirs.

One-sided: rank 0 writes and goes on. Versions alternate between two buffers that are allocated and exported once; a
worker that is killed leaves nothing behind, and one that is late finds that its buffer holds a later version
(rollout.shared_weights).
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from core.memory import PUBLISHED_VERSIONS
from rollout.shared_memory import export_memory, memory_file
from rollout.shared_weights import DTYPES, STATE_BYTES, WRITING, Manifest, Place, checksums, digest_of, room
from trainer.tensor_files import gather

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def buffer_bytes(weights: Iterable[Tensor]) -> int:
    """Of a buffer for these whole weights, adapters among them, which are merged.

    Example: buffer_bytes(model.parameters())
    """
    return sum(room(weight.nbytes) for weight in weights)


class WeightBuffer:
    """One buffer and the file beside it. `size`: bytes, as `buffer_bytes` counts them.

    Example: buffer.begin(); buffer.fill(tensors); file, digest = buffer.finish(version)
    """

    def __init__(self, size: int, device: torch.device, owner: str) -> None:
        self._exported, self._owner = export_memory(size, device), owner
        self._places: dict[str, Place] = {}  # in the order in which they were first filled in
        self._manifest = b""
        self._file: int | None = None

    def begin(self) -> None:
        """What it held is gone from now on."""
        if self._file is not None:
            self._set_state(WRITING)

    def fill(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy tensors in as they are gathered, device to device on a GPU. The same names, dtypes and shapes each time.

        Where that fails, the rest is gathered all the same: other ranks would wait for it for ever.
        """
        known, filled = bool(self._places), 0
        try:
            for name, tensor in tensors:
                place = self._places[name] if known else self._new_place(name, tensor)
                assert (_NAMES[tensor.dtype], tuple(tensor.shape)) == (place.dtype, place.shape), (name, place)
                place.of(self._exported.memory[place.start :]).copy_(tensor)
                filled += 1
            assert filled == len(self._places), f"{filled} tensors of {len(self._places)}"
        except BaseException:
            gather(tensors, keep=False)
            raise

    def finish(self, version: int) -> tuple[Path, str]:
        """It holds `version`: the path that workers read, and the digest of what is in the buffer now."""
        if self._file is None:
            places = tuple(self._places.values())
            manifest = Manifest(owner=self._owner, handle=self._exported.handle, places=places)
            self._manifest = msgspec.json.encode(manifest)
            self._file = memory_file(STATE_BYTES + len(self._manifest))
            os.pwrite(self._file, self._manifest, STATE_BYTES)
        memory = self._exported.memory
        parts = (memory[place.start : place.start + room(place.size)] for place in self._places.values())
        digest = digest_of(self._manifest, map(checksums, parts))  # waits for the device
        self._set_state(version)
        return Path(f"/proc/{os.getpid()}/fd/{self._file}"), digest

    def close(self) -> None:
        """Let go of file and buffer."""
        self._exported.close()
        if self._file is not None:
            os.close(self._file)

    def _new_place(self, name: str, tensor: Tensor) -> Place:
        last = next(reversed(self._places.values()), None)
        start = last.start + room(last.size) if last is not None else 0
        place = self._places[name] = Place(name, _NAMES[tensor.dtype], tuple(tensor.shape), start)  # type: ignore[arg-type]
        assert start + room(place.size) <= len(self._exported.memory), f"no room for {name}"
        return place

    def _set_state(self, version: int) -> None:
        assert self._file is not None
        os.pwrite(self._file, version.to_bytes(STATE_BYTES, "little", signed=True), 0)


class WeightBuffers:
    """Two of them, as `PublishedWeights` is for files. Owned by one thread. `size`: of one, as Learner.weights_bytes.

    Example: file, digest = WeightBuffers(learner.weights_bytes, device).write(step, learner.write_weights)
    """

    def __init__(self, size: int, device: torch.device) -> None:
        owner = secrets.token_hex(8)
        self._buffers = [WeightBuffer(size, device, owner) for _ in range(PUBLISHED_VERSIONS)]

    def write(self, version: int, fill: Callable[[WeightBuffer], None]) -> tuple[Path, str]:
        """What `fill` writes, as a new version in the buffer of the version before the last: its file and digest."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        buffer.begin()
        fill(buffer)
        return buffer.finish(version)

    def close(self) -> None:
        """Let go of both."""
        while self._buffers:
            self._buffers.pop().close()
