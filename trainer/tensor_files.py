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


def write_file(tensors: dict[str, Tensor], file: Path) -> str:
    """One safetensors file, atomically; its SHA-256 in hex."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"tmp-{os.getpid()}-{file.name}")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    os.replace(temporary, file)
    return digest


def write_files(tensors: Iterable[tuple[str, Tensor]], directory: Path | None, stem: str) -> None:
    """`stem`.safetensors, then `stem`-00002.safetensors …, each of about 4 GiB; None takes part and writes nothing.

    An error of writing is raised when all is gathered, so that no other rank waits for this one.
    """
    part: dict[str, Tensor] = {}
    count = 0
    problem: Exception | None = None

    def flush() -> None:
        nonlocal count
        count += 1
        assert directory is not None
        name = stem if count == 1 else f"{stem}-{count:05d}"
        save_file(part, directory / f"{name}.safetensors")
        part.clear()

    for name, tensor in tensors:
        if directory is None or problem is not None:
            continue
        part[name] = tensor.cpu()
        if sum(value.nbytes for value in part.values()) >= FILE_BYTES:
            try:
                flush()
            except Exception as error:
                problem = error
    if problem is not None:
        raise problem
    if directory is not None and (part or not count):
        flush()


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
