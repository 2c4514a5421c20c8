"""Questions to the pool's thread while it is busy: those that need an answer wait for it, the others say so."""

import threading
from collections.abc import Callable, Iterator

import pytest

from rollout.pool import WorkerPool

PoolMaker = Callable[..., WorkerPool]


@pytest.fixture
def stalled(make_pool: PoolMaker) -> Iterator[tuple[WorkerPool, threading.Event]]:
    """A pool whose thread stands still until the event is set."""
    pool, go = make_pool(), threading.Event()
    pool._errands.send(go.wait)
    yield pool, go
    go.set()


def test_a_stall_longer_than_the_answer_time_ends_no_run(
    stalled: tuple[WorkerPool, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, go = stalled
    monkeypatch.setattr("rollout.pool._ANSWER_S", 0.05)
    assert "busy for more than 0.05 s" in pool.waiting_for().line
    pool.check()
    release = threading.Timer(0.3, go.set)
    release.start()
    assert pool.counters()["balanced"]
    assert pool.quiet(lambda sources: sources["explorer"]["received"]) == 0
    release.join()


def test_a_stall_without_end_is_named(
    stalled: tuple[WorkerPool, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.pool._STUCK_S", 0.05)
    with pytest.raises(TimeoutError, match=r"busy for more than 0\.05 s"):
        stalled[0].counters()
