"""New weights from the learner to a rollout worker: in memory and hashed by pieces, beside a file and its SHA-256.

    python -m bench.publishing [--mib 1024] [--rounds 5] [--dir DIR]

`file` is how it was done: safetensors' save_file into a directory (DIR: that of the run; default: the temporary one),
SHA-256 of the whole file, and the same SHA-256 again in the worker. `memory` is trainer.published, `device`
trainer.weight_buffers. `publish_s` is what the learner waits for, `worker_s` what a worker does before it loads (for
`device` also the copy of every tensor to its own memory, in a process of its own): seconds by the clock, since threads
and disks are what differs, with processor seconds beside them (`…_cpu_s`). Where there is a GPU, the tensors are on it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.measure import record, table
from rollout.fingerprint import file_digest, file_sha256
from rollout.shared_weights import SharedWeights, require_whole
from trainer.published import PublishedWeights
from trainer.tensor_files import write_stream
from trainer.weight_buffers import WeightBuffers, buffer_bytes

ROW_BYTES = 2 * 2048
TENSOR_ROWS = 6144  # 24 MiB, as an MLP's matrix of Qwen3-1.7B


COLUMNS = ("publish_s", "publish_cpu_s", "worker_s", "worker_cpu_s")
Times = tuple[float, float, float, float]


class Clock:
    """Seconds by the clock and processor seconds of this process since the last lap."""

    def __init__(self) -> None:
        self._now = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        before, self._now = self._now, (time.perf_counter(), time.process_time())
        return self._now[0] - before[0], self._now[1] - before[1]


def find_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def make_tensors(mib: int) -> dict[str, Tensor]:
    """bfloat16 matrices of 24 MiB, and a rest."""
    device = find_device()
    rows = (mib << 20) // ROW_BYTES
    sizes = [TENSOR_ROWS] * (rows // TENSOR_ROWS) + [rows % TENSOR_ROWS] * bool(rows % TENSOR_ROWS)
    return {
        f"model.layers.{index}.weight": torch.randn(size, 2048, device=device).bfloat16()
        for index, size in enumerate(sizes)
    }


def by_file(tensors: dict[str, Tensor], directory: Path) -> Times:
    """A version as a file."""
    clock = Clock()
    file, temporary = directory / "version.safetensors", directory / "tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    digest = file_sha256(temporary)
    os.replace(temporary, file)
    published = clock.lap()
    assert file_sha256(file) == digest
    return (*published, *clock.lap())


def by_memory(tensors: dict[str, Tensor], weights: PublishedWeights) -> Times:
    """A version in memory."""
    clock = Clock()
    file, digest = weights.write(0, lambda stream: write_stream(iter(tensors.items()), stream, tensors))
    published = clock.lap()
    assert file_digest(file) == digest
    return (*published, *clock.lap())


class Reader:
    """A worker in a process of its own, since a GPU's memory cannot be opened by the process that exports it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.publishing", "--read"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, file: Path, digest: str) -> tuple[float, float]:
        """Read a version; the seconds it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file, digest, file=self.process.stdin, flush=True)
        seconds, cpu_seconds = map(float, self.process.stdout.readline().split())
        return seconds, cpu_seconds

    def close(self) -> None:
        self.process.communicate()  # the end of its input


def serve_reads() -> None:
    """The reader's process: a line in, its times out."""
    for line in sys.stdin:
        file, digest = line.split()
        clock = Clock()
        with SharedWeights(Path(file), version=0, digest=digest, device=find_device()) as weights:
            for _ in weights.tensors():
                pass
            require_whole([weights.outcome()], version=0)
        print(*clock.lap(), flush=True)


def by_device(tensors: dict[str, Tensor], buffers: WeightBuffers, reader: Reader) -> Times:
    """A version in memory of the learner's device."""
    clock = Clock()
    file, digest = buffers.write(0, lambda buffer: buffer.fill(iter(tensors.items())))
    published = clock.lap()
    return (*published, *reader.read(file, digest))


def measure(mib: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Medians over interleaved rounds, after one of warm-up; `ratio` is the file's publish_s over the row's."""
    tensors, published = make_tensors(mib), PublishedWeights(directory, in_memory=True)
    if not published.in_memory:
        raise SystemExit("this system has no shared memory files: there is nothing to compare")
    buffers, reader = WeightBuffers(buffer_bytes(tensors.values()), find_device()), Reader()
    ways = {
        "file": lambda: by_file(tensors, directory),
        "memory": lambda: by_memory(tensors, published),
        "device": lambda: by_device(tensors, buffers, reader),
    }
    seconds: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            seconds[name].append(way())
    for thing in (published, reader, buffers):
        thing.close()
    machine = {"mib": mib, "rounds": rounds, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        medians = {column: statistics.median(values) for column, values in zip(COLUMNS, zip(*times[1:]))}
        rows.append({"weights": name, "dir": str(directory.parent), **medians, **machine})
        rows[-1]["ratio"] = rows[0]["publish_s"] / rows[-1]["publish_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        return serve_reads()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        rows = measure(options.mib, options.rounds, Path(directory))
    print(table(rows, ["weights", "dir", "mib", *COLUMNS, "ratio"]))
    print(f"recorded in {record('rollout', rows)}")


if __name__ == "__main__":
    main()
