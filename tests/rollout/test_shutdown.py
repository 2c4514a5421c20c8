"""Closing the pool in any state leaves no process, and every wait in it is bounded."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults.parts import eventually, make_lease
from core.schema import Source
from rollout import pool as pool_module
from rollout.fingerprint import file_digest
from rollout.pool import WorkerPool

State = Callable[[WorkerPool, Path], None]


def workers(pool: WorkerPool, state: str = "ready") -> list[dict[str, object]]:
    return [worker for worker in pool.counters()["workers"].values() if worker["state"] == state]


def starting(pool: WorkerPool, model: Path) -> None:
    eventually(lambda: pool._children.pids())


def idle(pool: WorkerPool, model: Path) -> None:
    eventually(lambda: workers(pool))


def generating(pool: WorkerPool, model: Path) -> None:
    pool.submit([make_lease(number) for number in range(8)])
    eventually(lambda: pool.counters()["sources"]["explorer"]["received"])


def hanging(pool: WorkerPool, model: Path) -> None:
    pool.submit([make_lease()])
    eventually(lambda: any(worker["owed"] for worker in workers(pool)))  # one lease, and it never comes


def stopped(pool: WorkerPool, model: Path) -> None:
    idle(pool, model)
    for pid in pool._children.pids().values():
        os.kill(pid, signal.SIGSTOP)


def killed(pool: WorkerPool, model: Path) -> None:
    """It is about to be started again."""
    idle(pool, model)
    for pid in pool._children.pids().values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not pool._children.pids())


def handed_over(pool: WorkerPool, model: Path) -> None:
    idle(pool, model)
    pool.hand_over()
    eventually(lambda: workers(pool, "gone"))


@pytest.mark.parametrize(
    ("state", "environment"),
    [
        (starting, {}),
        (idle, {}),
        (generating, {"QUICK_PACE_S": "0.05"}),
        (hanging, {"QUICK_FAIL": "hang"}),
        (hanging, {"QUICK_FAIL": "hang with the interpreter"}),
        (stopped, {}),
        (killed, {}),
        (handed_over, {}),
    ],
)
def test_no_process_is_left(
    make_pool: Callable[..., WorkerPool], model: Path, monkeypatch: pytest.MonkeyPatch, state: State,
    environment: dict[str, str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pool = make_pool()
    pool.publish_weights(1, model / "model.safetensors", file_digest(model / "model.safetensors"))
    pool.spawn(Source.EXPLORER, 0)
    state(pool, model)
    known = {pid for pid in pool._children.pids().values()} | {
        int(worker["pid"]) for worker in pool.counters()["workers"].values()
    }
    pool.close("the test is over")
    assert [pid for pid in known if Path(f"/proc/{pid}").exists()] == []
    assert not pool._thread.is_alive()


def test_the_waits_of_a_close_add_up_to_less_than_five_seconds() -> None:
    exits, terminations, kills = 3 * [pool_module._GRACE_S]
    assert pool_module._LEAVE_S + exits + terminations + kills < 5
