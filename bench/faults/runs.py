"""Whole runs of random tiny models for the fault suite: real trainer, real workers, steps of well below a second."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.faults.processes import descendants, gone
from core.anneal import explorer_quota
from core.metrics import is_evaluation, read_metrics
from rollout.store import read_rollouts

REPOSITORY = Path(__file__).resolve().parents[2]
GUARD_S = 120.0
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
STEPS, GROUP, ANNEAL, PROMPTS = 12, 4, 6, 4
SETTINGS: dict[str, object] = {
    "algorithm.steps": STEPS,
    "algorithm.anneal_steps": ANNEAL,
    "algorithm.group_size": GROUP,
    "algorithm.prompts_per_step": PROMPTS,
    "algorithm.mini_batch_prompts": 2,
    "learner.warmup_updates": 1,
    "learner.learning_rate": 1e-3,
    "rollout.lease_prompts": 2,
    "rollout.max_response_tokens": 8,
    "reward.function": "bench.faults.rewards:pluses",
    "data.eval": '""',
    "checkpoint.every": 1,
    "explorer.ahead_steps": 2,
    "stream.heartbeat_s": 0.2,
    "stream.liveness_s": 3,
}


@functools.cache
def scratch() -> Path:
    """A directory for everything the suite writes; it goes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="s2lpo-faults-")
    _KEPT.append(holder)
    return Path(holder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def models() -> tuple[Path, Path]:
    """Learner and explorer of the embedded task's vocabulary, with random weights."""
    import torch

    from trainer.models import save_model
    from trainer.pretrain import Recipe, Shape, build_model, build_tokenizer

    torch.manual_seed(0)
    shape, root = Shape(layers=1, hidden=32, heads=2, intermediate=64, init_std=0.1), scratch() / "models"
    recipe = Recipe(learner=shape, explorer=shape)
    tokenizer = build_tokenizer(recipe.max_positions)
    for name in ("learner", "explorer"):
        save_model(build_model(shape, recipe), tokenizer, root / name)
    return root / "learner", root / "explorer"


class Run:
    """One run directory and the trainer processes that work on it, one after the other."""

    def __init__(self, name: str, **settings: object) -> None:
        self.dir, self.log = scratch() / name, scratch() / f"{name}.log"
        learner, explorer = models()
        chosen = {"run.dir": self.dir, "learner.model": learner, "explorer.model": explorer, **SETTINGS}
        chosen |= {key.replace("__", "."): value for key, value in settings.items()}
        self.words = [f"{key}={value}" for key, value in chosen.items()]
        self.process: subprocess.Popen[bytes] | None = None
        RUNS.append(self)

    def start(
        self, *words: str, launcher: Sequence[str] = (sys.executable,), prefix: Sequence[str] = (), **extra: str
    ) -> None:
        """Start a trainer in a session of its own; `extra` goes into its environment."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *launcher, str(REPOSITORY / "trainer" / "main.py"), *self.words, *words], cwd=REPOSITORY,
                env=environment(**extra), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def finish(self, code: int = 0, *, within_s: float = GUARD_S) -> float:
        """Wait for the exit code; seconds waited."""
        assert self.process is not None
        start = time.monotonic()
        try:
            found = self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no exit within {within_s:g} s: {self.tail()}") from None
        assert found == code, f"exit code {found}, expected {code}: {self.tail()}"
        return time.monotonic() - start

    def complete(self, *words: str, **extra: str) -> "Run":
        """Start and finish."""
        self.start(*words, **extra)
        self.finish()
        return self

    def kill(self) -> None:
        """kill -9 of the trainer, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def signal(self, number: int) -> float:
        """Send a signal to the trainer; when."""
        assert self.process is not None
        self.process.send_signal(number)
        return time.monotonic()

    def wait_for(self, what: str, true: Callable[[], object], within_s: float = GUARD_S) -> float:
        """Until it is true, with the trainer alive; seconds waited."""
        start = time.monotonic()
        while not true():
            assert self.process is None or self.process.poll() is None, f"ended before {what}: {self.tail()}"
            assert time.monotonic() - start < within_s, f"not within {within_s:g} s: {what}: {self.tail()}"
            time.sleep(0.02)
        return time.monotonic() - start

    def wait_for_step(self, step: int) -> None:
        """Until the line of a step is written."""
        self.wait_for(f"step {step}", lambda: any(line["step"] >= step for line in self.lines()))

    def text(self) -> str:
        """What the trainers printed."""
        return self.log.read_text("utf-8", errors="replace")

    def tail(self) -> str:
        """The end of that, on one line."""
        return " | ".join(self.text().splitlines()[-6:])[-900:]

    def lines(self) -> list[dict[str, Any]]:
        """Training lines of metrics.jsonl."""
        return [line for line in read_metrics(self.dir) if not is_evaluation(line)]

    def ledger(self) -> dict[str, Any]:
        """ledger.json"""
        report: dict[str, Any] = json.loads((self.dir / "ledger.json").read_text())
        return report

    def weights(self) -> bytes:
        """The final model's."""
        return (self.dir / "model" / "model.safetensors").read_bytes()

    def keys(self) -> Counter[tuple[int, int, int, str]]:
        """(step, slot, sample, source) of all rows that trained."""
        table = read_rollouts(self.dir, columns=["step", "slot", "sample", "source"]).to_pydict()
        return Counter(zip(table["step"], table["slot"], table["sample"], table["source"]))

    def checkpoints(self) -> list[str]:
        """Names in checkpoints/."""
        return sorted(path.name for path in (self.dir / "checkpoints").glob("*"))

    def family(self) -> dict[int, str]:
        """Living processes of this run besides the trainer: their ids and command lines."""
        assert self.process is not None
        return {pid: line for pid, line in descendants(self.process.pid).items() if pid != self.process.pid}

    def pid_of(self, word: str) -> int:
        """The one process of this run whose command line has a word."""
        found = [pid for pid, line in self.family().items() if word in line]
        assert len(found) == 1, f"{len(found)} processes with {word!r}: {self.family()}"
        return found[0]


RUNS: list[Run] = []


def end_runs() -> None:
    """Kill what a row that failed left running."""
    while RUNS:
        run = RUNS.pop()
        family = list(run.family()) if run.process is not None else []
        run.kill()
        gone(family, within_s=60)


def rank_of(run: Run, rank: int) -> int:
    """The process of a rank that torchrun started."""
    ranks = [pid for pid, line in run.family().items() if "trainer/main.py" in line]
    mark = f"\0RANK={rank}\0".encode()
    return next(pid for pid in ranks if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


def demanded(steps: int = STEPS) -> Counter[tuple[int, int, int, str]]:
    """The keys that a run of SETTINGS must train, each once."""
    return Counter(
        (step, slot, sample, source)
        for step in range(1, steps + 1)
        for quota in [explorer_quota(step, group_size=GROUP, anneal_steps=ANNEAL)]
        for slot in range(PROMPTS)
        for source, count in (("explorer", quota), ("learner", GROUP - quota))
        for sample in range(count)
    )


@functools.cache
def reference(lookahead: int = 0) -> Run:
    """The run of SETTINGS, undisturbed."""
    return Run(f"reference-{lookahead}", algorithm__lookahead=lookahead).complete()


def difference(run: Run, *, exact: bool = True, steps: int = STEPS) -> tuple[int, int]:
    """Completions lost and trained twice, over both sources; an error where the ledger or the parameters differ."""
    found, wanted = run.keys(), demanded(steps)
    ledger = run.ledger()
    assert ledger["conserved"], f"the ledger is not conserved: {ledger}"
    trained = ledger["explorer"]["trained"] + ledger["learner"]["trained"]
    assert trained == wanted.total(), f"the ledger counts {trained} trained, {wanted.total()} are due"
    if exact:
        assert run.weights() == reference().weights(), "final parameters differ from the undisturbed run's"
    return (wanted - found).total(), (found - wanted).total()


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, and none of torchrun's variables."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **extra}
