"""Runs of whole programs whose processor time counts: on shared cores it says more than seconds do."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_STEPS = 3
LAST_STEPS = 4  # of which one at least is seen before the last
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Cost(NamedTuple):
    """Processor seconds of a step: of the program itself, and of all that it started.

    Example: Cost(own_s=0.45, children_s=0.16)
    """

    own_s: float
    children_s: float

    @property
    def cpu_s(self) -> float:
        return self.own_s + self.children_s


def run_watched(command: list[str], threads: int, log: Path, steps_done: Callable[[], int], steps: int) -> Cost:
    """Run a command that must succeed; what a step costs, over the steps after the first ones."""
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    marks: list[tuple[int, Cost]] = []
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                done = steps_done()
                # Looking through all processes takes a fraction of a short step: only where a mark may be used.
                due = not marks or (done > marks[-1][0] and done >= steps - LAST_STEPS)
                if done >= WARM_STEPS and due:
                    marks.append((done, _processor_s(process)))
                time.sleep(0.05)
        finally:  # an interrupted benchmark leaves nothing behind: workers die with the trainer
            with suppress(psutil.NoSuchProcess):
                process.terminate()
            process.wait()
    whole = [mark for mark in marks if mark[0] < steps]  # with the last step, processes begin to end
    if process.returncode or len(whole) < 2:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}: {log.read_text('utf-8')[-3000:]}")
    (first, start), (last, end) = whole[0], whole[-1]
    return Cost(*((b - a) / (last - first) for a, b in zip(start, end)))


def _processor_s(process: psutil.Process) -> Cost:
    """User and system seconds so far, of all that still runs."""

    def seconds(one: psutil.Process) -> float:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            return float(times.user + times.system)
        return 0.0

    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = process.children(recursive=True)
    return Cost(seconds(process), sum(seconds(child) for child in children))
