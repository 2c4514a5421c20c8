"""Runs of `python -m bench.paper`: each a real one, `trainer/main.py` in a process of its own, done once and kept.

A run is known by its settings, its seed and the code that computes it; what was done is found again, so that a command
that was killed goes on where it was, and experiments share their arms.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.measure import commit
from core.configfile import parse_command
from core.metrics import is_evaluation, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RESULT = "result.json"
# What decides the numbers of a run; the rest of the code may change without making it another run.
COMPUTES = (
    "core/advantages.py", "core/anneal.py", "core/countdown.py", "core/pace.py", "core/prompts.py", "core/rewards.py",
    "core/seeds.py",
    "kernels/*.py", "rollout/torch_*.py", "rollout/demand.py", "rollout/grouping.py", "trainer/batch.py",
    "trainer/correction.py", "trainer/learner.py", "trainer/loop.py", "trainer/micro_batch.py", "trainer/objective.py",
    "trainer/optimizer.py", "trainer/packing.py",
)  # fmt: skip
# What the page needs of a run is its metrics and its model.
NOT_KEPT = ("rollouts", "checkpoints", "weights", "logs", "trace.json", "report.html")


class Job(NamedTuple):
    """One run: `arguments` are those of trainer/main.py, without run.dir and run.seed.

    Example: Job("grpo", 3, ("configs/tiny.toml", "algorithm.anneal_steps=0"))
    """

    arm: str
    seed: int
    arguments: tuple[str, ...]


class Finished(NamedTuple):
    """A run that was done, as it is kept: its lines of metrics, its cost, where its model is."""

    job: Job
    key: str
    evaluations: list[dict[str, Any]]
    training: list[dict[str, Any]]
    produced: dict[str, int]
    cpu_s: float
    commit: str
    model: Path


class RunFailed(RuntimeError):
    """A run ended with an error; what it said is in the message."""


def code_hash(root: Path = ROOT) -> str:
    """12 hex digits over the source files that decide the numbers of a run."""
    digest = hashlib.blake2b(digest_size=6)
    for pattern in COMPUTES:
        for file in sorted(root.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def run_key(job: Job, code: str) -> str:
    """16 hex digits over the resolved settings, the seed and the code. Raises ConfigError for settings that cannot run.

    How a run is carried out (directory, threads) is part of the settings and has its defaults.
    """
    config = parse_command([*job.arguments, f"run.seed={job.seed}"]).config
    settings = msgspec.json.encode(config, order="sorted")
    return hashlib.blake2b(settings + code.encode(), digest_size=8).hexdigest()


class Runner:
    """Carries out jobs, `jobs` at a time. `launch` runs one command to its end and returns (exit code, CPU seconds).

    A context: whatever ends it, no child is left.

    Example: with Runner(Path("runs/paper"), jobs=2) as runner: done = runner.run(jobs)
    """

    def __init__(
        self,
        work: Path,
        *,
        jobs: int,
        launcher: Sequence[str] = (sys.executable,),
        launch: Callable[[Sequence[str], Path], tuple[int, float]] | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.work, self.jobs, self.launcher, self._say = work.resolve(), jobs, launcher, say
        self._launch = launch or self._start
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._code = code_hash()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """Every job, in order; those that are done already are read. Raises RunFailed when all others are done."""
        keys = {job: run_key(job, self._code) for job in jobs}
        first = {keys[job]: job for job in reversed(jobs)}
        missing = [
            job
            for job in dict.fromkeys(jobs)
            if first[keys[job]] == job and not (self._place(keys[job]) / RESULT).exists()
        ]
        total, began = len(missing), time.monotonic()
        if missing:
            self._say(f"{total} of {len(first)} runs to do, {self.jobs} at a time")
        failures: list[str] = []

        def one(numbered: tuple[int, Job]) -> None:
            number, job = numbered
            if self._stopping:
                return
            try:
                cpu_s = self._do(job, keys[job])
                minutes = (time.monotonic() - began) / 60
                self._say(f"{number}/{total} {job.arm} seed {job.seed}: {cpu_s:.0f} CPU-s ({minutes:.1f} min so far)")
            except RunFailed as error:
                failures.append(str(error))
                self._say(f"{number}/{total} {job.arm} seed {job.seed} FAILED: {error}")

        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                list(pool.map(one, enumerate(missing, start=1)))
            except BaseException:  # the pool waits for its threads, which wait for their children
                self.stop()
                raise
        if failures:
            raise RunFailed(f"{len(failures)} of {total} runs failed; the first: {failures[0]}")
        return [load(self._place(keys[job]), job) for job in jobs]

    def known(self, jobs: Sequence[Job]) -> list[Finished]:
        """Those of the jobs that are done."""
        places = [(job, self._place(run_key(job, self._code))) for job in jobs]
        return [load(place, job) for job, place in places if (place / RESULT).exists()]

    def stop(self) -> None:
        """End the runs in work, by their process groups: a trainer has workers."""
        self._stopping = True
        with self._lock:
            children = list(self._children)
        for child in children:
            os.killpg(child.pid, signal.SIGTERM)

    def _place(self, key: str) -> Path:
        return self.work / "done" / key

    def _do(self, job: Job, key: str) -> float:
        place = self._place(key)
        command = [
            *self.launcher, "trainer/main.py", *job.arguments, f"run.seed={job.seed}", f"run.dir={place}", "--clean",
        ]  # fmt: skip
        log = self.work / "logs" / f"{job.arm}-{job.seed}-{key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        code, cpu_s = self._launch(command, log)
        if code:
            tail = log.read_text(errors="replace")[-500:] if log.exists() else ""
            raise RunFailed(f"{job.arm} seed {job.seed} ended with {code} ({log}): …{tail}")
        ledger = json.loads((place / "ledger.json").read_text())
        produced = {source: ledger[source]["produced"] for source in ("explorer", "learner")}
        result = {"arm": job.arm, "seed": job.seed, "arguments": job.arguments, "cpu_s": cpu_s, "produced": produced}
        for name in NOT_KEPT:
            shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink(missing_ok=True)
        (place / RESULT).write_text(json.dumps({**result, "code": self._code, "commit": commit()}))
        return cpu_s

    def _start(self, command: Sequence[str], log: Path) -> tuple[int, float]:
        """One run; the CPU seconds are its own and its workers'."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            with self._lock:
                self._children.add(child)
            try:
                _, status, usage = os.wait4(child.pid, 0)
            finally:
                with self._lock:
                    self._children.discard(child)
            child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, usage.ru_utime + usage.ru_stime


def load(place: Path, job: Job) -> Finished:
    """A run that was done."""
    result = json.loads((place / RESULT).read_text())
    lines = read_metrics(place)
    return Finished(
        job=job,
        key=place.name,
        evaluations=[line for line in lines if is_evaluation(line)],
        training=[line for line in lines if not is_evaluation(line)],
        produced=result["produced"],
        cpu_s=result["cpu_s"],
        commit=result["commit"],
        model=place / "model",
    )
