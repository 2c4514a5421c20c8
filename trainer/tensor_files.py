"""Tensors on disk, written one after the other by rank 0 while all ranks take part in gathering them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.whole_file import whole_file

FILE_BYTES = 4 << 30  # a file is in memory once while it is written
STAGE_BYTES = 64 << 20  # of a GPU's tensor, in host memory at once
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ENTRY_BYTES = 200  # of a tensor in the header besides its name: numbers of 14 digits, and up to five dimensions
_PAGE = 4096


def gather(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """All of them where `keep`, else nothing; either way every tensor is asked for, as a collective needs."""
    return {name: tensor for name, tensor in tensors if keep}


def write_file(tensors: dict[str, Tensor], file: Path, **notes: str) -> None:
    """One safetensors file with `notes` among its metadata, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **notes})


def write_stream(tensors: Iterator[tuple[str, Tensor]], stream: BinaryIO | None, names: Iterable[str]) -> None:
    """One safetensors file into an empty stream, a tensor as soon as it is gathered; None takes part, writes nothing.

    safetensors' own `save_file` needs all tensors in host memory, and a directory to rename its file in. The format:
    the header's length (8 bytes, little-endian), the header (JSON, padded with spaces), and the tensors' bytes without
    gaps. The header stands first and is known last: room is kept for `names`, one at least as long for each tensor.
    """
    if stream is None:
        gather(tensors, keep=False)
        return
    try:
        start = _pages(8 + _ENTRY_BYTES + sum(len(name) + _ENTRY_BYTES for name in names))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = start
        stream.seek(start)
        for name, tensor in tensors:
            place = [end - start, end - start + tensor.nbytes]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            for piece in _host_pieces(tensor):
                stream.write(piece)
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        assert 8 + len(text) <= start, f"a header of {len(text)} bytes has room for {start - 8}"
        stream.seek(0)
        stream.write((start - 8).to_bytes(8, "little") + text.ljust(start - 8))
    except Exception:
        gather(tensors, keep=False)  # the other ranks would wait for the rest for ever
        raise


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _host_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, each piece to be used before the next: on a GPU, through one pinned buffer."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if not flat.is_cuda:
        yield flat.numpy().data
        return
    buffer = torch.empty(min(STAGE_BYTES, len(flat)), dtype=torch.uint8, pin_memory=True)
    for part in flat.split(STAGE_BYTES):
        yield buffer[: len(part)].copy_(part).numpy().data


def write_files(tensors: Iterator[tuple[str, Tensor]], directory: Path | None, stem: str) -> None:
    """`stem`.safetensors, then `stem`-00002.safetensors …, each of about 4 GiB; None takes part and writes nothing."""
    if directory is None:
        gather(tensors, keep=False)
        return
    try:
        part: dict[str, Tensor] = {}
        files = 0
        for name, tensor in tensors:
            part[name] = tensor.cpu()
            if sum(value.nbytes for value in part.values()) >= FILE_BYTES:
                save_file(part, directory / _file_name(stem, files))
                part, files = {}, files + 1
        if part or not files:
            save_file(part, directory / _file_name(stem, files))
    except Exception:
        gather(tensors, keep=False)  # the other ranks would wait for the rest for ever
        raise


def _file_name(stem: str, files: int) -> str:
    return f"{stem}-{files + 1:05d}.safetensors" if files else f"{stem}.safetensors"


class TensorFiles(Mapping[str, Tensor]):
    """What `write_files` wrote; a tensor is read when it is asked for. A context.

    Example: with TensorFiles(directory, "optimizer") as state: state["exp_avg.lm_head.weight"]
    """

    def __init__(self, directory: Path, stem: str) -> None:
        first = directory / f"{stem}.safetensors"
        self.files = [first, *sorted(directory.glob(f"{stem}-?????.safetensors"))]
        self._closing = ExitStack()
        self._places: dict[str, safe_open] = {}

    def __enter__(self) -> Self:
        for file in self.files:
            opened = self._closing.enter_context(safe_open(file, framework="pt"))
            self._places |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._places.clear()
        self._closing.close()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._places[name].get_tensor(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
