"""Waiting with an end: says what is missing and who owes it, and stops by name where nothing moves any more."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from rollout.buffer import ReplayBuffer
from rollout.status import Waiting

POLL_S = 0.5


class Starved(RuntimeError):
    """Nothing moved for stream.starvation_s: no token, no completion, no reward."""


class Debtor(Protocol):
    """Somebody who owes completions or rewards: the worker pool, the rewarder."""

    def check(self) -> None:
        """Raise where it has failed, so that waiting for it is in vain."""

    def waiting_for(self) -> Waiting:
        """What it still owes, and when that last moved."""


class Patience:
    """Waits for completions of a buffer that `debtors` owe, `limit_s` seconds at most from the last that moved.

    Every half second `meanwhile` is called, and `on_wait(line, seconds)` is told what is waited for and for how long
    nothing has moved.

    Example: Patience(buffer, (pool, rewards), limit_s=600.0, meanwhile=read, on_wait=show).wait("step 3", left, whole)
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        debtors: Sequence[Debtor],
        *,
        limit_s: float,
        meanwhile: Callable[[], None],
        on_wait: Callable[[str, float], None],
    ) -> None:
        self._buffer, self._debtors, self._limit_s = buffer, debtors, limit_s
        self._meanwhile, self._on_wait = meanwhile, on_wait

    def wait(self, what: str, missing: Callable[[], int], complete: Callable[[], bool]) -> None:
        """Sleep until `complete()`, which is asked at every arrival; `missing()` counts what is left of `what`.

        Raises Starved, what a debtor has failed with, and what the buffer was given by `fail`.
        """
        best, since = missing(), time.monotonic()
        while not self._buffer.wait(complete, POLL_S):
            for debtor in self._debtors:
                debtor.check()
            self._meanwhile()
            left, now = missing(), time.monotonic()
            if left < best:
                best, since = left, now
            # A long completion, or a reward that takes its time, is no standstill.
            owed = [debtor.waiting_for() for debtor in self._debtors]
            since = max(since, *(one.moved_s for one in owed))
            waiting = f"{left} completions of {what}: {'; '.join(one.line for one in owed if one.line)}"
            if now - since > self._limit_s:
                raise Starved(f"waited {now - since:.0f} s (stream.starvation_s) for {waiting}")
            self._on_wait(waiting, now - since)
