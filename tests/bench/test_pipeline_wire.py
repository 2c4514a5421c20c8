"""Rates and memory of the wire's benchmark."""

import pytest

from bench.pipeline.wire import TOKENS, Mark, rates


def test_rates_lie_between_the_first_mark_and_the_last():
    marks = [Mark(1000 * i, 10.0 + i, 2.0 + 0.02 * i, 1.0 + 0.01 * i, 10**8 + 3000 * i) for i in range(5)]
    row = rates(marks)
    assert row["completions_per_s"] == pytest.approx(1000)
    assert row["mb_per_s"] == pytest.approx(1000 * TOKENS * 8 / 1e6)
    assert (row["trainer_us"], row["worker_us"]) == pytest.approx((20, 10))
    assert row["slope"] == pytest.approx(3.0), "bytes per completion"
    assert row["grown_mb"] == pytest.approx(0.012)
    assert row["resident_mb"][0] == [0, 100.0]
