"""Rows about worker processes: killed, stopped, hung, slow, cut off."""

import os
import signal
import threading
import time
from unittest import mock

from bench.faults.parts import Sink, eventually
from bench.faults.rows import Verdict, row
from bench.faults.stream import LIVENESS_S, PoolOfQuickWorkers, resident_bytes
from core.schema import Completion
from rollout.pool import WorkersLost

PACE = "0.004"


@row("F1", "kill -9 of one explorer of three", quick=True)
def kill_one(seed: int) -> Verdict:
    with PoolOfQuickWorkers("kill-one") as stream:
        stream.spawn(3, QUICK_PACE_S=PACE)
        stream.submit(24)
        stream.wait(60)
        victim = stream.pids()[seed % 3]
        os.kill(victim, signal.SIGKILL)
        seconds = stream.event("gone")
        counts = stream.settle()
        stream.event("restarted")
        eventually(lambda: len(stream.ready()) == 3, "the killed one is back")
        lost_with_it = stream.account()["lost"]
    return Verdict(
        "tolerated", f"leases regranted, restarted and rejoined; {lost_with_it} made again", seconds, **counts
    )


@row("F2", "kill -9 of all explorers, again and again", quick=True)
def kill_all(seed: int) -> Verdict:
    with PoolOfQuickWorkers("kill-all", max_restarts=0) as stream:
        stream.spawn(2, QUICK_PACE_S=PACE)
        stream.submit(24)
        stream.wait(16)
        for pid in stream.pids():
            os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        try:
            eventually(stream.pool.check, "the pool gives up")
        except WorkersLost as problem:
            text = str(problem)
            seconds = time.monotonic() - start
        assert "no explorer worker is left" in text, text
        assert "killed by SIGKILL" in text, text
    return Verdict("stopped", text.partition(". ")[0], seconds)


@row("F3", "SIGSTOP of an explorer, then SIGCONT", quick=True)
def stop_one(seed: int) -> Verdict:
    with PoolOfQuickWorkers("stop-one") as stream:
        stream.spawn(2, QUICK_PACE_S=PACE)
        stream.submit(24)
        stream.wait(40)
        victim = stream.pids()[seed % 2]
        os.kill(victim, signal.SIGSTOP)
        seconds = stream.event("dead")
        os.kill(victim, signal.SIGCONT)
        stream.event("revived")
        counts = stream.settle()
        late = stream.account()["rejected"].get("duplicate", 0)
    return Verdict(
        "tolerated", f"dead after silence, its leases regranted; back, {late} late answers refused", seconds, **counts
    )


@row("F3b", "SIGSTOP of all explorers", quick=True)
def stop_all(seed: int) -> Verdict:
    with PoolOfQuickWorkers("stop-all") as stream:
        stream.spawn(2, QUICK_PACE_S=PACE)
        stream.submit(16)
        stream.wait(40)
        pids = stream.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        eventually(lambda: stream.pool.counters()["events"].get("dead") == 2, "both are dead")
        seconds = time.monotonic() - start
        said = stream.pool.waiting_for().line
        assert "silent for" in said, said
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        counts = stream.settle()
    return Verdict("tolerated", f'said "{said[:60]}…"; both came back', seconds, **counts)


def _hung(name: str, fault: str, event: str) -> Verdict:
    with PoolOfQuickWorkers(name) as stream:
        stream.spawn(1, QUICK_FAIL=fault)
        stream.submit(4)
        seconds = stream.event(event)
        stacks = ""
        if event == "hung":
            eventually(lambda: "Current thread" in stream.log("explorer-0"), "its stacks are in its log")
            assert "faults/engine.py" in stream.log("explorer-0"), stream.log("explorer-0")
            stacks = ", its stacks in its log"
        stream.spawn(1)
        counts = stream.settle()
        return Verdict("tolerated", f"found {event}{stacks}; leases regranted", seconds, **counts)


@row("F4", "explorer alive and beating, its engine stuck", quick=True)
def stuck(seed: int) -> Verdict:
    return _hung("stuck", "hang", "hung")


@row("F4b", "explorer stuck in C code that holds the interpreter", quick=True)
def stuck_in_c(seed: int) -> Verdict:
    return _hung("stuck-in-c", "hang with the interpreter", "dead")


@row("F17", "explorer whose engine answers NaN log-probs, ids beyond the vocabulary; beside another, alone", quick=True)
def poisoned(seed: int) -> Verdict:
    said, rejected = [], 0
    for fault in ("nan", "phantom"):
        with PoolOfQuickWorkers(f"poisoned-by-{fault}") as stream:
            stream.spawn(1, QUICK_FAIL=fault)
            stream.submit(1)
            eventually(lambda: stream.account()["rejected"].get("invalid", 0) >= 16, "all it says is refused")
            os.kill(stream.pids()[0], signal.SIGSTOP)
            stream.event("dead")
            stream.spawn(1)
            counts = stream.settle()
            rejected += stream.account()["rejected"]["invalid"]
            assert counts == {"lost": 0, "duplicated": 0}, counts
        with PoolOfQuickWorkers(f"only-{fault}") as stream:
            stream.spawn(1, QUICK_FAIL=fault)
            stream.submit(1)
            start = time.monotonic()
            try:
                eventually(stream.pool.check, "the pool gives up")
            except WorkersLost as problem:
                said.append(str(problem))
            seconds = time.monotonic() - start
            assert not stream.sink.completions
    assert all("was lost 9 times" in text and "invalid: explorer-0" in text for text in said), said
    assert len(said) == 2, said
    text = (
        f"{rejected} refused, made again by the other; alone: stopped, with the lease, the worker and the value named"
    )
    return Verdict("stopped", text, seconds)


class _SlowSink(Sink):
    """Takes nothing until it is let go: the pool's thread stands still, as a trainer that is too slow."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def __call__(self, purpose: str, completion: Completion) -> None:
        self.go.wait()
        super().__call__(purpose, completion)


def _slow_consumer(name: str, pause_s: float) -> Verdict:
    sink = _SlowSink()
    with PoolOfQuickWorkers(name, sink=sink, credit=256) as stream:
        stream.spawn(2)
        pids: list[int | str] = [*stream.pids(), "self"]
        stream.submit(400)
        time.sleep(min(3.0, pause_s / 2))
        before = [resident_bytes(pid) for pid in pids]
        time.sleep(pause_s - min(3.0, pause_s / 2))
        grown = max(resident_bytes(pid) - size for pid, size in zip(pids, before))
        sink.go.set()
        counts = stream.settle()
        assert not stream.pool.counters()["events"].get("dead"), "a trainer's own pause is nobody's silence"
    assert grown < 8 << 20, f"memory grew by {grown / 1e6:.1f} MB while nothing was taken"
    return Verdict(
        "tolerated", f"{pause_s:g} s nothing taken: workers held, memory {grown / 1e6:+.1f} MB", None, **counts
    )


@row("F7", "slow consumer: nothing taken for 30 s")
def slow_consumer(seed: int) -> Verdict:
    return _slow_consumer("slow-consumer", 30.0)


@row("F7b", "slow consumer: nothing taken for longer than liveness", quick=True)
def slow_consumer_briefly(seed: int) -> Verdict:
    return _slow_consumer("slow-consumer-briefly", LIVENESS_S + 2)


@row("F8", "one explorer 50 times slower than the other", quick=True)
def straggler(seed: int) -> Verdict:
    with PoolOfQuickWorkers("straggler") as stream:
        stream.spawn(1, QUICK_PACE_S="0.05")
        stream.spawn(1, QUICK_PACE_S="0.001")
        stream.submit(24)
        counts = stream.settle()
        shares = [worker["received"] for _, worker in sorted(stream.pool.counters()["workers"].items())]
    assert shares[0] < shares[1], shares
    return Verdict(
        "tolerated",
        f"every lease answered; {shares[0]} completions by the slow one, {shares[1]} by the other",
        None,
        **counts,
    )


@row("F23", "wall clock jumps by an hour, forwards and backwards", quick=True)
def clock(seed: int) -> Verdict:
    jumps = iter(range(10**9))
    with (
        mock.patch("time.time", side_effect=lambda: 1e9 + 3600.0 * (-1) ** next(jumps)),
        PoolOfQuickWorkers("clock") as stream,
    ):
        stream.spawn(2, QUICK_PACE_S="0.001")
        stream.submit(12)
        counts = stream.settle()
        events = stream.pool.counters()["events"]
    assert not events.get("dead"), events
    assert not events.get("hung"), events
    return Verdict("tolerated", "nobody found dead: only the monotonic clock is read", None, **counts)
