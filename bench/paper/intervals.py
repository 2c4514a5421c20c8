"""Means with confidence intervals, paired differences over seeds, and the verdict rules of the evidence page.

Everything is in points (percentage points) unless said otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Rule = Literal["greater", "less", "equal", "not_less"]
Verdict = Literal["reproduced", "not reproduced", "undecided"]

# The smallest gain in the paper's Table 1 is 1.2 points: an effect below 1 is none.
SMALLEST_EFFECT = 1.0
# Two arms are called equal where their difference surely is smaller than this.
EQUAL_WITHIN = 2.0
# Two-sided 95 % points of Student's t by degrees of freedom; above 30 the next lower entry.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean of n values and half of its 95 % confidence interval; `half` is infinite for n = 1.

    Example: Interval(mean=1.9, half=0.8, n=8).low -> 1.1
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.half:.1f}" if math.isfinite(self.half) else "")

    def signed(self) -> str:
        """With its sign, as a difference is written."""
        return f"{self.mean:+.1f}" + (f" ± {self.half:.1f}" if math.isfinite(self.half) else "")


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student-t interval: t(0.975, n−1) · s / √n. Raises ValueError for no values."""
    if not values:
        raise ValueError("an interval needs at least one value")
    n = len(values)
    if n == 1:
        return Interval(float(values[0]), math.inf, 1)
    quantile = _T95[min(n - 1, len(_T95)) - 1]
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def paired(arm: Mapping[int, float], control: Mapping[int, float]) -> Interval | None:
    """The interval of arm − control over the seeds that both have; None where there is no such seed."""
    seeds = sorted(arm.keys() & control.keys())
    return interval([arm[seed] - control[seed] for seed in seeds]) if seeds else None


def judge(difference: Interval | None, rule: Rule) -> Verdict:
    """Whether a paired difference (arm − control) bears out what the paper says of it.

    greater    reproduced: the interval lies above 0; not reproduced: it lies below 1 point
    less       the same with the sign changed
    equal      reproduced: the interval lies within ± 2 points; not reproduced: it lies outside of ± 1 point
    not_less   reproduced: the interval lies above − 2 points; not reproduced: it lies below 0

    Everything else, one seed included, is undecided at this scale.
    """
    if difference is None or not math.isfinite(difference.half):
        return "undecided"
    low, high = difference.low, difference.high
    if rule == "less":
        low, high = -high, -low
    match rule:
        case "greater" | "less":
            yes, no = low > 0, high < SMALLEST_EFFECT
        case "equal":
            yes, no = max(abs(low), abs(high)) < EQUAL_WITHIN, low > SMALLEST_EFFECT or high < -SMALLEST_EFFECT
        case "not_less":
            yes, no = low > -EQUAL_WITHIN, high < 0
    return "reproduced" if yes else "not reproduced" if no else "undecided"


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that says several things: one that fails, fails it; one that is open leaves it open."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "undecided"


def at_compute(spent: Sequence[float], values: Sequence[float], budget: float) -> float:
    """The value of a learning curve where `budget` was spent, linear between its points and constant beyond them."""
    return float(np.interp(budget, spent, values))
