"""The learner's newest weights where the rollout workers read them: memory of rank 0's process, or files.

In memory, a version is an anonymous file (memfd_create(2)), complete and sealed before anybody hears of it: nobody can
change it, so what was hashed is what is read. Workers open it as /proc/PID/fd/N, as processes of the same user in the
same pid namespace can. The kernel frees it when this process and the workers that read it let go or die.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from core.config import Config
from core.memory import PUBLISHED_VERSIONS
from core.whole_file import whole_file
from rollout.fingerprint import file_digest
from trainer.weight_buffers import WeightBuffers


def open_weights(
    config: Config, run_dir: Path, size: int, device: torch.device, say: Callable[[str], None]
) -> "PublishedWeights | WeightBuffers":
    """Where `rollout.weights` wants them. `size`: Learner.weights_bytes; `say` is told where that cannot be.

    Example: open_weights(config, run_dir, learner.weights_bytes, world.device, console.say)
    """
    # Made in any case: what an earlier start left in the directory is deleted.
    published = PublishedWeights(run_dir / "weights", in_memory=config.rollout.weights != "files")
    if config.rollout.weights == "device":
        return WeightBuffers(size, device)
    if config.rollout.weights == "memory" and not published.in_memory:
        say(f"this system has no shared memory files: new weights are files in {published.directory}")
    return published


class PublishedWeights:
    """At most two versions, the newest and the one a worker may still be reading. Owned by one thread.

    `directory` is that of files, which no other process may use: what earlier starts left in it is deleted.

    Example: file, digest = published.write(step, learner.write_weights)
    """

    def __init__(self, directory: Path, *, in_memory: bool) -> None:
        self.directory, self.in_memory = directory, in_memory and memory_is_shared()
        self._delete: list[Callable[[], object]] = []  # one for each version kept, the oldest first
        for left in directory.glob("*version_*.safetensors*"):
            left.unlink()

    def write(self, version: int, fill: Callable[[BinaryIO], None]) -> tuple[Path, str]:
        """What `fill` writes, as a new version: the path that workers read, and its `file_digest`.

        The version before the last is deleted first, so that never more than two take up memory.
        """
        while len(self._delete) >= PUBLISHED_VERSIONS:
            self._delete.pop(0)()
        file, delete = _memory_file(version, fill) if self.in_memory else _disk_file(self.directory, version, fill)
        self._delete.append(delete)
        return file, file_digest(file)

    def close(self) -> None:
        """Delete every version."""
        while self._delete:
            self._delete.pop()()


def memory_is_shared() -> bool:
    """Whether this system has sealed memory files and a /proc through which others can open them."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        file, delete = _memory_file(0, lambda stream: None)
    except OSError:
        return False
    readable = os.access(file, os.R_OK)
    delete()
    return readable


def _memory_file(version: int, fill: Callable[[BinaryIO], None]) -> tuple[Path, Callable[[], object]]:
    """Path and what deletes it. The descriptor is closed in programs that this process starts, as all of Python's."""
    stream = os.fdopen(os.memfd_create(f"weights of version {version}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb")
    try:
        fill(stream)
        stream.flush()
        os.fchmod(stream.fileno(), 0o400)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(stream.fileno(), fcntl.F_ADD_SEALS, seals)
    except BaseException:
        stream.close()
        raise
    return Path(f"/proc/{os.getpid()}/fd/{stream.fileno()}"), stream.close


def _disk_file(directory: Path, version: int, fill: Callable[[BinaryIO], None]) -> tuple[Path, Callable[[], object]]:
    """Path and what deletes it. It has its name only when it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"version_{version:06d}.safetensors"
    with whole_file(file) as partial, partial.open("wb") as stream:
        fill(stream)
    return file, lambda: file.unlink(missing_ok=True)
