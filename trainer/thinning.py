"""Long curves in no more points than a chart can show: a page of 5,000 steps is as large as one of 800."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

COLUMNS = 400  # more than a chart is wide, in points of 1/72 inch


def outline(values: Sequence[float]) -> NDArray[np.intp]:
    """Places of the values that a line must pass, in order; NaN is a gap.

    All of them up to 2 · COLUMNS. Of more, the lowest, the highest and the ends of gaps of each of COLUMNS pieces: a
    piece is narrower than the line that is drawn, which looks the same.

    Example: steps[outline(values)], values[outline(values)]
    """
    numbers, places = np.asarray(values, dtype=float), np.arange(len(values))
    if len(places) <= 2 * COLUMNS:
        return places
    kept = {0, len(places) - 1}
    for piece in np.array_split(places, COLUMNS):
        gaps = np.isnan(numbers[piece])
        kept.update(piece[gaps][:1], piece[gaps][-1:])
        if (drawn := piece[~gaps]).size:
            kept.update((drawn[numbers[drawn].argmin()], drawn[numbers[drawn].argmax()]))
    return np.array(sorted(kept))


def turns(values: Sequence[float]) -> NDArray[np.intp]:
    """Places of the values that differ from a neighbour, and both ends: all that a staircase of them needs.

    Example: turns([1.0, 1.0, 1.0, 0.5, 0.5])  # [0, 2, 3, 4]
    """
    numbers = np.asarray(values, dtype=float)
    changes = numbers[1:] != numbers[:-1]
    return np.flatnonzero(np.concatenate([[True], changes]) | np.concatenate([changes, [True]]))


def columns(values: Sequence[float]) -> list[float]:
    """The values, or where they are more than 2 · COLUMNS, the means of COLUMNS pieces of them.

    Example: columns([0.25, 0.5])  # [0.25, 0.5]
    """
    if len(values) <= 2 * COLUMNS:
        return list(values)
    return [float(piece.mean()) for piece in np.array_split(np.asarray(values, dtype=float), COLUMNS)]
