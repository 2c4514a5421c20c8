"""New weights from the learner to a rollout worker: in memory and hashed by pieces, beside a file and its SHA-256.

    python -m bench.publishing [--mib 1024] [--rounds 5] [--dir DIR]

`file` is how it was done: safetensors' save_file into a directory (DIR: that of the run, default one on /tmp's disk),
SHA-256 of the whole file, and the same SHA-256 again in the worker. `memory` is trainer.published. Seconds by the clock,
since threads and disks are what differs; `publish_s` is what the learner waits for, `worker_s` what a worker does before
it loads. On a GPU the tensors are there.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.measure import record, table
from rollout.fingerprint import file_digest, file_sha256
from trainer.published import PublishedWeights
from trainer.tensor_files import write_stream

ROW_BYTES = 2 * 2048
TENSOR_ROWS = 6144  # 24 MiB, as an MLP's matrix of Qwen3-1.7B


def make_tensors(mib: int) -> dict[str, Tensor]:
    """bfloat16 matrices of 24 MiB, and a rest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = (mib << 20) // ROW_BYTES
    sizes = [TENSOR_ROWS] * (rows // TENSOR_ROWS) + [rows % TENSOR_ROWS] * bool(rows % TENSOR_ROWS)
    return {
        f"model.layers.{index}.weight": torch.randn(size, 2048, device=device).bfloat16()
        for index, size in enumerate(sizes)
    }


def by_file(tensors: dict[str, Tensor], directory: Path) -> tuple[float, float]:
    """Seconds of the learner and of a worker."""
    file, begin = directory / "version.safetensors", time.perf_counter()
    temporary = directory / "tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    digest = file_sha256(temporary)
    os.replace(temporary, file)
    return _checked(begin, lambda: file_sha256(file) == digest)


def by_memory(tensors: dict[str, Tensor], published: PublishedWeights) -> tuple[float, float]:
    """Seconds of the learner and of a worker."""
    begin = time.perf_counter()
    file, digest = published.write(0, lambda stream: write_stream(iter(tensors.items()), stream, tensors))
    return _checked(begin, lambda: file_digest(file) == digest)


def _checked(begin: float, check: Any) -> tuple[float, float]:
    middle = time.perf_counter()
    assert check()
    return middle - begin, time.perf_counter() - middle


def measure(mib: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Medians over interleaved rounds, after one of warm-up; `ratio` is the file's seconds over memory's."""
    tensors, published = make_tensors(mib), PublishedWeights(directory, in_memory=True)
    if not published.in_memory:
        raise SystemExit("this system has no shared memory files: there is nothing to compare")
    ways = {"file": lambda: by_file(tensors, directory), "memory": lambda: by_memory(tensors, published)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            seconds[name].append(way())
    published.close()
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        publish_s, worker_s = (statistics.median(column) for column in zip(*times[1:]))
        rows.append({"weights": name, "mib": mib, "publish_s": publish_s, "worker_s": worker_s})
    for row in rows:
        row |= {"publish_ratio": rows[0]["publish_s"] / row["publish_s"], "rounds": rounds}
        row |= {"worker_ratio": rows[0]["worker_s"] / row["worker_s"], "cpus": os.cpu_count()}
        row["load"] = round(os.getloadavg()[0], 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        rows = measure(options.mib, options.rounds, Path(directory))
    print(table(rows, ["weights", "mib", "publish_s", "publish_ratio", "worker_s", "worker_ratio"]))
    print(f"recorded in {record('rollout', rows)}")


if __name__ == "__main__":
    main()
