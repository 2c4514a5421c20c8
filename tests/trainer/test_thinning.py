"""Curves of many steps: fewer points, the same line."""

import math

import numpy as np
import pytest

from trainer.thinning import COLUMNS, columns, outline, turns

LONG = 10 * COLUMNS


@pytest.mark.parametrize("size", [0, 1, 2 * COLUMNS])
def test_what_a_chart_can_show_is_shown(size: int) -> None:
    values = list(np.random.default_rng(0).normal(size=size))
    assert outline(values).tolist() == list(range(size))
    assert columns(values) == values


def test_of_each_piece_the_extremes_are_kept() -> None:
    values = np.random.default_rng(0).normal(size=LONG)
    places = outline(values)
    assert len(places) <= 2 * COLUMNS + 2
    assert (np.diff(places) > 0).all()
    assert places[0] == 0
    assert places[-1] == LONG - 1
    kept = set(places.tolist())
    for piece in np.array_split(np.arange(LONG), COLUMNS):
        shown = [values[place] for place in piece if place in kept]
        assert (min(shown), max(shown)) == (values[piece].min(), values[piece].max())


def test_a_gap_stays_a_gap() -> None:
    values = np.ones(LONG)
    values[[5, 6, 7, 2000]] = math.nan
    values[40:80] = math.nan
    shown = outline(values)
    gaps = {place for place in shown.tolist() if math.isnan(values[place])}
    assert {5, 7, 2000, 40, 79} <= gaps
    assert gaps <= {5, 6, 7, 2000, *range(40, 80)}


def test_a_staircase_keeps_both_sides_of_each_stair() -> None:
    assert turns([1.0, 1.0, 1.0, 0.5, 0.5]).tolist() == [0, 2, 3, 4]
    assert turns([1.0]).tolist() == [0]
    assert turns([1.0, 0.0, 1.0]).tolist() == [0, 1, 2]
    assert turns([0.5] * 9).tolist() == [0, 8]


def test_a_column_is_the_mean_of_its_steps() -> None:
    values = np.arange(LONG, dtype=float)
    heights = columns(values)
    assert len(heights) == COLUMNS
    assert heights[0] == np.arange(10).mean()
    assert np.mean(heights) == values.mean()
