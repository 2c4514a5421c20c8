"""Rows about rewards: functions that raise, hang, eat memory, die, or return no number."""

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.faults.parts import eventually
from bench.faults.processes import descendants, gone
from bench.faults.rows import Verdict, row
from core.rewards import RewardItem
from core.scoring import RewardPool
from core.scoring_worker import Outcome

HOPELESS = r"\boxed{(10^{10})!}"


class _Scores:
    """Outcomes by ticket."""

    def __init__(self) -> None:
        self.outcomes: dict[int, list[Outcome]] = {}
        self._lock = threading.Lock()

    def __call__(self, ticket: int, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.setdefault(ticket, []).append(outcome)

    def failures(self) -> Counter[str]:
        return Counter(outcomes[0].failure or "scored" for outcomes in self.outcomes.values())

    def counts(self, submitted: int) -> dict[str, int]:
        doubled = sum(len(outcomes) - 1 for outcomes in self.outcomes.values())
        return {"lost": submitted - len(self.outcomes), "duplicated": doubled}


def _item(text: str, answer: str = "4") -> RewardItem:
    return RewardItem(prompt="2 + 2", completion=text, completion_ids=(1,), answer=answer, columns={})


@row("F25", "reward raises, hangs, takes all memory, aborts: half of 40 completions", quick=True)
def fragile(seed: int) -> Verdict:
    scores = _Scores()
    texts = [f"text {number}" for number in range(40)]
    with RewardPool(
        "bench.faults.rewards:fragile", workers=2, timeout_s=0.5, on_score=scores, memory_bytes=4 << 30
    ) as pool:
        for number, text in enumerate(texts):
            pool.submit(number, _item(text))
        eventually(lambda: len(scores.outcomes) == len(texts), "all have an outcome")
        pool.check()
    failures = scores.failures()
    assert {"raised", "timeout", "crashed", "scored"} <= failures.keys(), failures
    assert all(one.reward is None for (one, *_) in scores.outcomes.values() if one.failure), "a failure was scored"
    return Verdict("tolerated", f"{dict(failures)}: never a reward of 0", 0.5, **scores.counts(len(texts)))


@row("F25b", "reward returns None, NaN, infinity", quick=True)
def no_number(seed: int) -> Verdict:
    scores = _Scores()
    with RewardPool("bench.faults.rewards:no_number", workers=1, timeout_s=5, on_score=scores) as pool:
        for number, text in enumerate(("None", "nan", "inf", "-inf", "1.5")):
            pool.submit(number, _item(text))
        eventually(lambda: len(scores.outcomes) == 5, "all have an outcome")
    failures = scores.failures()
    assert failures == {"none": 1, "non_finite": 3, "scored": 1}, failures
    return Verdict("tolerated", f"{dict(failures)}: dropped and replaced, never 0", None, **scores.counts(5))


@row("F26", r"answer \boxed{(10^{10})!} under math-verify", quick=True)
def factorial(seed: int) -> Verdict:
    scores = _Scores()
    with RewardPool("math", workers=1, timeout_s=1.0, on_score=scores) as pool:
        pool.submit(0, _item(r"\boxed{4}"))
        eventually(lambda: 0 in scores.outcomes, "math-verify is loaded")
        start = time.monotonic()
        pool.submit(1, _item(HOPELESS))
        pool.submit(2, _item(r"\boxed{4}"))
        eventually(lambda: 1 in scores.outcomes, "it is given up")
        seconds = time.monotonic() - start
        eventually(lambda: 2 in scores.outcomes, "the next one is scored")
    hopeless, after = scores.outcomes[1][0], scores.outcomes[2][0]
    assert hopeless.failure == "timeout" or hopeless.reward == 0, hopeless
    assert after.reward == 1, after
    ground = "gmpy2" if importlib.util.find_spec("gmpy2") else "no gmpy2 here: plain integers"
    text = f"{hopeless.failure or 'found wrong'} after {seconds:.1f} s ({ground}); the next one scored"
    return Verdict("tolerated", text, seconds, **scores.counts(3))


@row("F26c", "kill -9 of a reward worker", quick=True)
def killed(seed: int) -> Verdict:
    scores = _Scores()
    with _hurt(scores, signal.SIGKILL, "crashed", items=10, timeout_s=20) as (seconds, victim):
        assert not Path(f"/proc/{victim}").exists()
    failures = scores.failures()
    assert failures == {"scored": 9, "crashed": 1}, failures
    text = f"{dict(failures)}: replaced; only what it was scoring is asked for again"
    return Verdict("tolerated", text, seconds, **scores.counts(10))


@row("F26d", "SIGSTOP of a reward worker", quick=True)
def stopped(seed: int) -> Verdict:
    scores, timeout_s = _Scores(), 1.0
    with _hurt(scores, signal.SIGSTOP, "timeout", items=6, timeout_s=timeout_s) as (seconds, victim):
        pass
    gone([victim])
    failures = scores.failures()
    assert failures == {"scored": 5, "timeout": 1}, failures
    text = f"{dict(failures)}: killed at its deadline of {timeout_s:g} s and replaced"
    return Verdict("tolerated", text, seconds, **scores.counts(6))


@contextlib.contextmanager
def _hurt(
    scores: _Scores, how: signal.Signals, counted: str, *, items: int, timeout_s: float
) -> Iterator[tuple[float, int]]:
    """Signal the one worker while it scores. Seconds until the pool counted it as such a failure, and its process, once
    all is scored and the pool still stands."""
    with RewardPool("bench.faults.rewards:slow", workers=1, timeout_s=timeout_s, on_score=scores) as pool:
        for number in range(items):
            pool.submit(number, _item(f"text {number}"))
        eventually(lambda: len(scores.outcomes) >= 2, "it works")
        victim = _worker()
        os.kill(victim, how)
        start = time.monotonic()
        eventually(lambda: pool.counts[counted], f"it is counted as {counted}")
        seconds = time.monotonic() - start
        eventually(lambda: len(scores.outcomes) == items, "all have an outcome")
        yield seconds, victim


def _worker() -> int:
    """The one scoring process of this process."""
    (found,) = [pid for pid, line in descendants(os.getpid()).items() if "scoring_worker" in line]
    return found
