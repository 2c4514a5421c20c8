"""Whole runs whose new weights lie in memory of rank 0's device (on the CPU: of the host)."""

import os
import signal
from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, train_here, training_lines

from trainer.published import memory_is_shared
from trainer.session import Session

pytestmark = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def memory_files() -> int:
    """That this process holds."""
    return sum("memfd:weights" in os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


SETTINGS = {"algorithm__steps": 3, "algorithm__anneal_steps": 2, "data__eval": ""}


@pytest.fixture(scope="module")
def by_memory(root: Path) -> Path:
    """The same run with weights in host memory."""
    return train_here(arguments(root, root / "device-weights-by-memory", **SETTINGS))


@pytest.mark.slow
def test_a_run_with_device_weights_is_one_with_memory_weights(root: Path, by_memory: Path, tmp_path: Path) -> None:
    """Bit for bit at lookahead 0, and it leaves no weights behind."""
    shared: set[bool] = set()

    def look(session: Session, step: int) -> None:
        shared.add(type(session.stream.rollouts.weights).__name__ == "WeightBuffers")

    before = memory_files()
    words = arguments(root, tmp_path / "device", rollout__weights="device", **SETTINGS)
    by_device = train_here(words, on_step=look)
    assert shared == {True}
    assert run_parts.weights_bytes(by_device) == run_parts.weights_bytes(by_memory)
    assert run_parts.trained_keys(by_device) == run_parts.trained_keys(by_memory)
    assert run_parts.ledger(by_device)["conserved"]
    assert memory_files() == before
    assert not any(by_device.rglob("version_*"))


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(root: Path, by_memory: Path, tmp_path: Path) -> None:
    """The one that takes its place opens buffers that others wrote and read before."""
    killed = []

    def kill_the_learner_rollouts(session: Session, step: int) -> None:
        def ready() -> list[int]:
            workers = session.stream.rollouts.pool.counters()["workers"].values()
            return [worker["pid"] for worker in workers if worker["role"] == "learner" and worker["state"] == "ready"]

        if step in (1, 2):  # step 1 is the explorer's alone: the learner's worker may still be starting
            run_parts.eventually(ready, "the learner's worker is ready")
            (pid,) = ready()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    words = arguments(root, tmp_path / "killed", rollout__weights="device", **SETTINGS)
    run_dir = train_here(words, on_step=kill_the_learner_rollouts)
    assert len(set(killed)) == 2
    assert run_parts.weights_bytes(run_dir) == run_parts.weights_bytes(by_memory)
    assert run_parts.ledger(run_dir)["conserved"]


@pytest.mark.slow
def test_with_rollouts_in_flight_every_completion_trains_once(root: Path, tmp_path: Path) -> None:
    """Workers take weights between two tokens while rank 0 goes on writing."""
    words = arguments(
        root, tmp_path / "ahead", algorithm__lookahead=1, rollout__update_in_flight="true", rollout__processes=2,
        rollout__weights="device", rollout__lease_prompts=2, data__eval="",
    )  # fmt: skip
    run_dir = train_here(words)
    ledger = run_parts.ledger(run_dir)
    assert ledger["conserved"]
    assert set(run_parts.trained_keys(run_dir).values()) == {1}
    assert run_parts.trained_keys(run_dir).total() == 6 * 8 * 4
    assert ledger["explorer"]["trained"] + ledger["learner"]["trained"] == 6 * 8 * 4
    assert [line["step"] for line in training_lines(run_dir)] == list(range(1, 7))
    assert max(line["off_policy/staleness_max"] for line in training_lines(run_dir)) <= 1
