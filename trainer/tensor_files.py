"""Tensors on disk, written one after the other by rank 0 while all ranks take part in gathering them."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 4 << 30  # a file is in memory once while it is written


def gather(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """All of them where `keep`, else nothing; either way every tensor is asked for, as a collective needs."""
    return {name: tensor for name, tensor in tensors if keep}


def write_file(tensors: dict[str, Tensor], file: Path, **notes: str) -> str:
    """One safetensors file with `notes` among its metadata, atomically; its SHA-256 in hex."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{os.getpid()}-{file.name}")
    save_file(tensors, temporary, metadata={"format": "pt", **notes})
    with temporary.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    os.replace(temporary, file)
    return digest


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
