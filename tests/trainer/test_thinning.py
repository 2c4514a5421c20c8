import math

import numpy as np
import pytest

from trainer.thinning import COLUMNS, columns, outline, turns


@pytest.mark.parametrize("count", [0, 1, 2 * COLUMNS])
def test_what_a_chart_can_show_is_left_as_it_is(count: int) -> None:
    values = [float(i % 7) for i in range(count)]
    assert outline(values).tolist() == list(range(count))
    assert columns(values) == values


def test_a_long_line_keeps_its_ends_and_what_stands_out() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[31_000], values[40_000] = 90.0, -90.0, math.nan
    shown = outline(values).tolist()
    assert len(shown) < 4 * COLUMNS
    assert {0, 12_345, 31_000, 40_000, 49_999} <= set(shown)
    assert shown == sorted(shown)
    for piece in np.array_split(np.arange(50_000), COLUMNS):  # as high and as low in every column
        here = [place for place in shown if piece[0] <= place <= piece[-1]]
        assert np.nanmax(values[here]) == np.nanmax(values[piece])
        assert np.nanmin(values[here]) == np.nanmin(values[piece])


def test_a_staircase_needs_its_steps_alone() -> None:
    assert turns([1.0, 1.0, 1.0, 0.5, 0.5]).tolist() == [0, 2, 3, 4]
    assert turns([1.0]).tolist() == [0]


def test_columns_keep_the_mean() -> None:
    values = [float(i) for i in range(8 * COLUMNS)]
    found = columns(values)
    assert len(found) == COLUMNS
    assert np.mean(found) == pytest.approx(np.mean(values))
