"""How every benchmark measures and records: warm-up, interleaved rounds, medians, the machine beside each number."""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).resolve().parent / "results"
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: device, versions, threads, commit, UTC time."""
    import triton

    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({_cpu_name()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": triton.__version__,
    }


def commit() -> str:
    """The checkout's commit, with "+" if tracked files differ from it; outside of a repository what BENCH_COMMIT says,
    else "unknown"."""
    root = RESULTS.parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD")
    if not name:
        return os.environ.get("BENCH_COMMIT", "unknown")
    return name + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def scratch() -> str | None:
    """Where a benchmark's gigabytes go for minutes: memory on a GPU machine, or the disk would be what is timed."""
    return "/dev/shm" if torch.cuda.is_available() and os.access("/dev/shm", os.W_OK) else None


def interleave(cases: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each round; every round runs all cases, so that drift of the clock hits all alike."""
    for _ in range(warmup):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(elapsed(case))
    return seconds


def elapsed(case: Callable[[], Any]) -> float:
    """Seconds of one call; on CUDA between two events, so that launches queue as they do in training.

    Without CUDA, the processor time of this process: with one thread it is what the call costs, and other processes'
    turns do not enter it.
    """
    if not torch.cuda.is_available():
        start = time.process_time()
        case()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    case()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, and the range beside it: a median without it hides a noisy machine."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def peak_bytes(case: Callable[[], Any]) -> int | None:
    """Most memory in use during the call beyond what was in use before; its result is dropped before the next call.

    On CUDA the allocator's peak, on Linux the peak of the resident set (which counts a library's own buffers); None
    where neither can be read.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    case()
    return _status("VmHWM") - before


def held_bytes() -> int:
    """In use now: on CUDA the allocator's, on Linux the resident set without what was freed; 0 where neither can be
    read."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def end_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all it started, those in sessions of their own too (torchrun's ranks): what is left behind on
    a GPU is in every later number."""
    with suppress(psutil.NoSuchProcess):
        for started in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                started.kill()
    process.kill()
    process.wait()


def record(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Appends the rows to `folder`/name.jsonl, each with the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}.jsonl"
    machine = environment()
    with place.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **machine}) + "\n")
    return place


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows as aligned text; a missing entry is a dash."""
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no field {field}")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
