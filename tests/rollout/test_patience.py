"""Waiting: who owes what is said, what moves is waited for, and what does not ends by name."""

import math
import threading
import time

import pytest

from rollout.buffer import ReplayBuffer
from rollout.ledger import Ledger
from rollout.patience import Patience, Starved
from rollout.status import Waiting


class Debtor:
    """Owes `line`; `moves` for so many seconds from now on."""

    def __init__(self, line: str, moves: float = 0.0, trouble: Exception | None = None) -> None:
        self.line, self.trouble = line, trouble
        self.until = time.monotonic() + moves if moves else -math.inf

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def waiting_for(self) -> Waiting:
        return Waiting(self.line, min(self.until, time.monotonic()))


class Waits:
    """A patience with these debtors, and what it said."""

    def __init__(self, *debtors: Debtor, limit_s: float) -> None:
        self.buffer = ReplayBuffer(Ledger(), max_bytes=1)
        self.said: list[tuple[str, float]] = []
        self.looks = 0
        self.patience = Patience(
            self.buffer, debtors, limit_s=limit_s, meanwhile=self.look, on_wait=lambda *words: self.said.append(words)
        )

    def look(self) -> None:
        self.looks += 1


def test_what_is_here_is_not_waited_for() -> None:
    waits = Waits(Debtor("a", trouble=RuntimeError("never asked")), limit_s=0.1)
    waits.patience.wait("step 1", lambda: 0, lambda: True)
    assert (waits.said, waits.looks) == ([], 0)


def test_an_arrival_ends_the_wait_at_once() -> None:
    waits, here = Waits(Debtor("a"), limit_s=60.0), threading.Event()

    def arrive() -> None:
        here.set()
        waits.buffer.notify()

    start = time.monotonic()
    threading.Timer(0.05, arrive).start()
    waits.patience.wait("step 1", lambda: 1, here.is_set)
    assert time.monotonic() - start < 0.4  # less than the time between two looks


def test_who_owes_is_named_and_who_owes_nothing_is_not() -> None:
    waits = Waits(Debtor("explorer: lease 1"), Debtor(""), Debtor("2 wait for their reward"), limit_s=0.7)
    with pytest.raises(Starved) as caught:
        waits.patience.wait("step 3", lambda: 5, lambda: False)
    owed = "5 completions of step 3: explorer: lease 1; 2 wait for their reward"
    assert str(caught.value) == f"waited 1 s (stream.starvation_s) for {owed}"
    assert [line for line, _ in waits.said] == [owed]
    assert waits.looks == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_debtor_that_moves_is_waited_for(which: int) -> None:
    debtors = [Debtor("a", moves=1.5 * (which == number)) for number in range(2)]
    start, waits = time.monotonic(), Waits(*debtors, limit_s=0.6)
    with pytest.raises(Starved):
        waits.patience.wait("step 1", lambda: 5, lambda: False)
    assert time.monotonic() - start > 2.0


def test_what_becomes_less_is_waited_for() -> None:
    left = iter([5, 4, 3, 2])
    start, waits = time.monotonic(), Waits(Debtor("a"), limit_s=0.6)
    with pytest.raises(Starved):
        waits.patience.wait("step 1", lambda: next(left, 2), lambda: False)
    assert time.monotonic() - start > 2.0


def test_the_trouble_of_a_debtor_ends_the_wait() -> None:
    waits = Waits(Debtor("a"), Debtor("b", trouble=RuntimeError("no worker is left")), limit_s=60.0)
    with pytest.raises(RuntimeError, match="no worker is left"):
        waits.patience.wait("step 1", lambda: 1, lambda: False)
