"""Intervals, paired differences, verdict rules and matched compute of bench.paper."""

import math

import pytest

from bench.paper.intervals import Interval, at_compute, combine, interval, judge, paired


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    # s = 1.29099, t(0.975, 3) = 3.182: 3.182 · 1.29099 / 2
    assert found.half == pytest.approx(2.0540, abs=1e-3)
    assert (found.low, found.high) == (pytest.approx(2.5 - found.half), pytest.approx(2.5 + found.half))


def test_one_value_has_no_bound():
    assert math.isinf(interval([7.0]).half)
    assert str(interval([7.0])) == "7.0"
    assert interval([7.0]).signed() == "+7.0"


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_many_values_use_the_last_quantile():
    assert interval([0.0, 1.0] * 100).half == pytest.approx(2.042 * 0.50125 / math.sqrt(200), rel=1e-3)


def test_differences_are_paired_over_common_seeds():
    found = paired({0: 3.0, 1: 5.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 100.0})
    assert found is not None
    assert (found.mean, found.n) == (2.5, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "rule", "verdict"),
    [
        (0.1, 4.0, "greater", "reproduced"),
        (-3.0, -0.1, "greater", "not reproduced"),
        (-3.0, 0.9, "greater", "not reproduced"),  # a gain of a point is excluded
        (-1.0, 1.5, "greater", "undecided"),
        (-4.0, -0.1, "less", "reproduced"),
        (-0.9, 3.0, "less", "not reproduced"),
        (-1.5, 3.0, "less", "undecided"),
        (-1.9, 1.9, "equal", "reproduced"),
        (1.1, 5.0, "equal", "not reproduced"),
        (-6.0, -1.2, "equal", "not reproduced"),
        (-3.0, 3.0, "equal", "undecided"),
        (-1.9, 5.0, "not_less", "reproduced"),
        (-5.0, -0.1, "not_less", "not reproduced"),
        (-5.0, 1.0, "not_less", "undecided"),
    ],
)
def test_verdicts(low, high, rule, verdict):
    assert judge(Interval((low + high) / 2, (high - low) / 2, 8), rule) == verdict


def test_one_seed_decides_nothing():
    assert judge(interval([50.0]), "greater") == "undecided"
    assert judge(None, "equal") == "undecided"


def test_one_failing_part_fails_the_claim():
    assert combine(["reproduced", "not reproduced", "undecided"]) == "not reproduced"
    assert combine(["reproduced", "undecided"]) == "undecided"
    assert combine(["reproduced", "reproduced"]) == "reproduced"
    assert combine([]) == "undecided"


def test_value_at_a_budget_is_between_the_evaluations():
    assert at_compute([0.0, 10.0, 20.0], [30.0, 40.0, 60.0], 15.0) == 50.0
    assert at_compute([0.0, 10.0], [30.0, 40.0], 99.0) == 40.0
