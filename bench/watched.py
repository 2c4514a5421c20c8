"""Runs of whole programs whose processor time counts: on shared cores it says more than seconds do."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_STEPS = 3
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_watched(command: list[str], threads: int, log: Path, steps_done: Callable[[], int], steps: int) -> float:
    """Run a command that must succeed; processor seconds of a step, over the steps after the first ones."""
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    marks: list[tuple[int, float]] = []
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                done = steps_done()
                if done >= WARM_STEPS and (not marks or done > marks[-1][0]):
                    marks.append((done, _processor_s(process)))
                time.sleep(0.05)
        finally:  # an interrupted benchmark leaves nothing behind: workers die with the trainer
            with suppress(psutil.NoSuchProcess):
                process.terminate()
            process.wait()
    whole = [mark for mark in marks if mark[0] < steps]  # with the last step, processes begin to end
    if process.returncode or len(whole) < 2:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}: {log.read_text('utf-8')[-3000:]}")
    (first, start_s), (last, end_s) = whole[0], whole[-1]
    return (end_s - start_s) / (last - first)


def _processor_s(process: psutil.Process) -> float:
    """User and system seconds of a process and all that it started and that still runs."""
    seconds, family = 0.0, [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            seconds += times.user + times.system
    return seconds
