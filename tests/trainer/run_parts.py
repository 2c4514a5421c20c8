"""Whole runs on tiny models for tests: in this process, or in one of their own that can be killed."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from core.configfile import parse_command
from core.metrics import is_evaluation, read_metrics
from core.schema import Group
from rollout.store import read_rollouts, rollout_file
from trainer.batch import pack_step
from trainer.family import Family, embedded_family
from trainer.learner import Learner
from trainer.pretrain import Recipe, Shape
from trainer.session import Session

HERE = Path(__file__).resolve().parent  # of run_rewards, which scoring processes import
REPOSITORY = HERE.parents[1]
HANG_GUARD_S = 240.0
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# Hardly trained: it solves nothing, so runs are rewarded by run_rewards.
RECIPE = Recipe(
    learner=Shape(layers=2, hidden=64, heads=2, intermediate=128, init_std=0.1),
    explorer=Shape(layers=1, hidden=64, heads=2, intermediate=128, init_std=0.1),
    batch=48,
    learner_steps=10,
    explorer_steps=10,
    warmup=5,
    threads=1,
)
SETTINGS = {
    "algorithm.steps": 6,
    "algorithm.anneal_steps": 4,
    "algorithm.group_size": 4,
    "algorithm.prompts_per_step": 8,
    "algorithm.mini_batch_prompts": 4,
    "learner.warmup_updates": 1,
    "learner.learning_rate": 1e-3,
    "rollout.lease_prompts": 4,
    "evaluation.problems": 8,
    "evaluation.samples": 2,
    "evaluation.k": "[1,2]",
    "evaluation.every": 0,
    "checkpoint.every": 2,
    "reward.function": "run_rewards:pluses",
}


@functools.cache
def tiny_family(root: Path) -> Family:
    """Two models of the embedded task, made once per test session."""
    return embedded_family(root / "families", 0, recipe=RECIPE)


def arguments(root: Path, run_dir: Path, **settings: object) -> list[str]:
    """`section__key=value` on top of SETTINGS, as words of a command line."""
    family = tiny_family(root)
    chosen: dict[str, object] = {
        "run.dir": run_dir,
        "learner.model": family.learner,
        "explorer.model": family.explorer,
        **SETTINGS,
    }
    chosen |= {name.replace("__", "."): value for name, value in settings.items()}
    return [f"{name}={value}" for name, value in chosen.items()]


def environment(**extra: str) -> dict[str, str]:
    """Of a run in its own process: one thread each, and none of torchrun's variables."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(HERE), **extra}


def start(
    words: Sequence[str], *, log: Path, launcher: Sequence[str] = (sys.executable,), **extra: str
) -> subprocess.Popen[bytes]:
    """`trainer/main.py` in a session of its own, its output in `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [*launcher, str(REPOSITORY / "trainer" / "main.py"), *words], cwd=log.parent, env=environment(**extra),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], *, log: Path, code: int = 0) -> str:
    """Wait for the exit code; the log."""
    try:
        found = process.wait(timeout=HANG_GUARD_S)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on to the ranks
            process.wait(timeout=60)
    text = log.read_text()
    assert found == code, f"exit code {found}, expected {code}:\n{text[-6000:]}"
    return text


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a trainer, which takes its workers with it."""
    process.kill()
    process.wait(timeout=60)


@functools.cache
def reference_run(root: Path) -> tuple[Path, str]:
    """The run of SETTINGS, uninterrupted, as a user starts it with torchrun: its directory and what it printed."""
    run_dir, log = root / "reference", root / "reference.log"
    words = arguments(root, run_dir)
    return run_dir, finish(start(words, log=log, launcher=TORCHRUN), log=log)


def eventually(true: Callable[[], object], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until it is true; `process` must live meanwhile."""
    deadline = time.monotonic() + HANG_GUARD_S
    while not true():
        assert time.monotonic() < deadline, f"not in time: {what}"
        assert process is None or process.poll() is None, f"ended with {process.returncode} before {what}"
        time.sleep(0.02)


def processes_naming(text: Path | str) -> dict[int, str]:
    """Living processes, other than this one, whose command line contains a path: their ids and command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(text) in line:  # a zombie has no command line
                    found[int(entry.name)] = line
    return found


def endpoint_of(run_dir: Path) -> str:
    """Where a running run listens; its workers have it on their command lines."""
    return (run_dir / "endpoint").read_text().strip()


def train_here(words: Sequence[str], *, on_step: Callable[[Session, int], None] | None = None) -> Path:
    """A run in this process (with real workers), as trainer.loop.train does it; the run directory."""
    from trainer import loop

    command = parse_command(words)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        if on_step is not None:
            patch.setattr(Session, "finish", told(on_step))
        loop.train(command)
    return Path(command.config.run.dir)


def told(on_step: Callable[[Session, int], None]) -> Callable[..., None]:
    """Session.finish, followed by `on_step(session, step)`."""
    original = Session.finish

    def finish_and_tell(session: Session, step: int, metrics: Any) -> None:
        original(session, step, metrics)
        on_step(session, step)

    return finish_and_tell


def train_step(learner: Learner, groups: Sequence[Group]) -> dict[str, float]:
    """A whole step of a learner without a run around it; its metrics."""
    batch = pack_step(groups, learner.config)
    learner.begin_step(batch)
    for mini_batch in batch.updates(learner.config.algorithm.epochs):
        learner.update(mini_batch)
    return learner.end_step()


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if not is_evaluation(line)]


def evaluation_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if is_evaluation(line)]


def group_counts(run_dir: Path, step: int) -> set[tuple[int, int]]:
    """The (explorer, learner) row counts that occur among a step's groups."""
    table = pq.read_table(rollout_file(run_dir, step), columns=["slot", "source"]).to_pydict()
    counts = Counter(zip(table["slot"], table["source"]))
    return {(counts[slot, "explorer"], counts[slot, "learner"]) for slot in set(table["slot"])}


def trained_keys(run_dir: Path) -> Counter[tuple[int, int, int, str]]:
    """(step, slot, sample, source) of every row that trained, with how often."""
    table = read_rollouts(run_dir, columns=["step", "slot", "sample", "source"]).to_pydict()
    return Counter(zip(table["step"], table["slot"], table["sample"], table["source"]))


def ledger(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "ledger.json").read_text())


def weights_bytes(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()
