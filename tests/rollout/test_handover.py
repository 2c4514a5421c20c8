"""An explorer's process joins the learner's rollouts when nothing is wanted of explorers any more."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults.parts import Sink, eventually, make_lease
from core.schema import Source
from rollout.fingerprint import file_digest
from rollout.pool import WorkerPool


def states(pool: WorkerPool) -> dict[str, list[tuple[str, str]]]:
    """By process: (role, state) of each of its sessions, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, worker in pool.counters()["workers"].items():
        found.setdefault(name.rpartition(".")[0], []).append((worker["role"], worker["state"]))
    return found


def test_an_idle_explorer_goes_on_as_a_learner_worker(make_pool: Callable[..., WorkerPool], sink: Sink, model: Path):
    pool = make_pool()
    weights = model / "model.safetensors"
    pool.publish_weights(3, weights, file_digest(weights))
    pool.spawn(Source.EXPLORER, 0)
    pool.submit([make_lease()])
    sink.wait(16, pool.check)
    pids = {worker["pid"] for worker in pool.counters()["workers"].values()}
    pool.submit([make_lease(source=Source.LEARNER, step=4, version=3)])  # there is no learner worker
    pool.hand_over()
    sink.wait(32, pool.check)
    assert states(pool) == {"explorer-0": [("explorer", "gone"), ("learner", "ready")]}
    assert {worker["pid"] for worker in pool.counters()["workers"].values()} == pids  # the same process
    learner_rows = [row for row in sink.completions if row.key.source is Source.LEARNER]
    assert {row.version for row in learner_rows} == {3}
    counts = pool.counters()
    assert counts["balanced"]
    assert counts["events"]["restarted"] == 0


def test_one_that_works_finishes_first(
    make_pool: Callable[..., WorkerPool], sink: Sink, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QUICK_PACE_S", "0.05")
    pool = make_pool()
    weights = model / "model.safetensors"
    pool.publish_weights(1, weights, file_digest(weights))
    pool.spawn(Source.EXPLORER, 0)
    pool.submit([make_lease()])
    sink.wait(1, pool.check)
    pool.hand_over()
    pool.submit([make_lease(source=Source.LEARNER, version=1)])
    sink.wait(32, pool.check)
    assert [row.key.source for row in sink.completions] == [Source.EXPLORER] * 16 + [Source.LEARNER] * 16


def test_a_killed_one_is_started_again_and_handed_over_again(
    make_pool: Callable[..., WorkerPool], sink: Sink, model: Path
):
    import os
    import signal

    pool = make_pool()
    weights = model / "model.safetensors"
    pool.publish_weights(1, weights, file_digest(weights))
    pool.spawn(Source.EXPLORER, 0)
    pool.hand_over()
    eventually(lambda: ("learner", "ready") in states(pool).get("explorer-0", []), "handed over")
    (pid,) = {worker["pid"] for worker in pool.counters()["workers"].values()}
    os.kill(pid, signal.SIGKILL)
    pool.submit([make_lease(source=Source.LEARNER, version=1)])
    sink.wait(16, pool.check)
    assert states(pool)["explorer-0"][-1] == ("learner", "ready")
    assert pool.counters()["events"]["restarted"] == 1
