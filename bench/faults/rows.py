"""What a row of the fault table is, and the registry that `bench.faults` runs."""

from collections.abc import Callable
from typing import Literal, NamedTuple


class Verdict(NamedTuple):
    """What a fault came to. A row that does not hold raises AssertionError instead.

    `tolerated`: the run went on, with exact counts; `stopped`: it ended and named the cause; `refused`: not let in.
    """

    outcome: Literal["tolerated", "stopped", "refused"]
    what: str
    detection_s: float | None = None  # from the fault to when the run knew
    lost: int = 0
    duplicated: int = 0


Check = Callable[[int], Verdict]


class Row(NamedTuple):
    """One line of the table: `check(seed)` injects the fault and judges."""

    name: str
    fault: str
    quick: bool
    check: Check


class NotHere(Exception):
    """This machine lacks what the fault needs; the message says what."""


ROWS: list[Row] = []

# Faults of the plan that no row injects, and why.
LEFT_OUT = {
    "F23b": "clock moved by the system: the wall clock of this machine is shared; F23 moves it inside the process",
    "F24b": "delay and loss by `tc netem`: no such queueing discipline in this kernel; F9 to F12 do it in a proxy",
    "F26b": "a fork bomb in a reward: it would hit everything else of this user; a reward has no limit on processes",
}


def row(name: str, fault: str, *, quick: bool = False) -> Callable[[Check], Check]:
    """Register a row; `quick` ones take no whole run and belong to the tests."""

    def register(check: Check) -> Check:
        ROWS.append(Row(name, fault, quick, check))
        return check

    return register
