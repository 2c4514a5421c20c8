"""Which processes live, and which have gone."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import psutil


def descendants(pid: int) -> dict[int, str]:
    """Living descendants of a process: zombies are dead."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found[child.pid] = " ".join(child.cmdline())
    return found


def gone(pids: Sequence[int], within_s: float = 10.0) -> float:
    """Wait until none of the processes lives; seconds waited."""
    start = time.monotonic()
    while alive := [pid for pid in pids if living(pid)]:
        assert time.monotonic() - start < within_s, f"processes {alive} live on"
        time.sleep(0.02)
    return time.monotonic() - start


def living(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
