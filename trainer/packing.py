"""Which rows share a forward pass, where forward passes are filled to a number of tokens instead of rows."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from itertools import groupby
from typing import NamedTuple

QUADRATIC_TOKENS = 24_576  # row length at which attention costs as much as all else: 12 x a hidden size of 2048


class Extent(NamedTuple):
    """A row as far as packing is concerned: `length` tokens, of which the first `prompt` may be those of its family."""

    length: int
    prompt: int = 0
    family: Hashable = None


def pack_rows(rows: Sequence[Extent], *, max_tokens: int, ranks: int, share: bool = False) -> list[list[int]]:
    """Positions of `rows` in bins of at most `max_tokens`; their number is a multiple of `ranks`.

    Every row is in one bin. The largest cost of a bin is kept small (longest processing time first: each unit, by
    falling cost, goes to the cheapest bin that has room), and bins come by falling cost, so that the `ranks` bins of
    one round, which wait for each other, are alike. A unit is one row, of cost L + L² / 24576. With `share`, it is
    2, 4, 8 … neighbours of one family, which cost their prompt once: the number that makes the rounds shortest in all,
    since larger units spare more and balance worse, of those that need no more rounds than single rows. A bin's tokens
    are always those of its rows by themselves, for which memory then suffices. The same rows always give the same bins;
    bins are empty where there are fewer units than ranks.

    Example: pack_rows([Extent(5), Extent(3), Extent(3), Extent(2)], max_tokens=8, ranks=2) == [[0, 3], [1, 2]]

    Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969).
    """
    longest = max(row.length for row in rows)
    assert longest <= max_tokens, f"a row of {longest} tokens does not fit into {max_tokens}"
    families = [list(members) for _, members in groupby(range(len(rows)), key=lambda i: rows[i].family)]
    rounds = -(-sum(row.length for row in rows) // (max_tokens * ranks))
    while (best := _layout(rows, families, 1, max_tokens, rounds, ranks, share=share)) is None:
        rounds += 1
    size = 1
    while share and size < max(map(len, families)):
        size *= 2
        layout = _layout(rows, families, size, max_tokens, rounds, ranks, share=True)
        if layout is not None and layout.time <= best.time:
            best = layout
    return best.bins


class _Unit(NamedTuple):
    """Neighbours that stay together."""

    rows: list[int]
    room: int
    cost: float


class _Layout(NamedTuple):
    time: float  # the largest costs of all rounds
    bins: list[list[int]]


def _layout(
    rows: Sequence[Extent],
    families: Sequence[list[int]],
    size: int,
    max_tokens: int,
    rounds: int,
    ranks: int,
    *,
    share: bool,
) -> _Layout | None:
    """None where units of `size` rows do not fit into so many rounds."""

    def cost(members: Sequence[int]) -> float:
        return _shared_cost(rows, members) if share else sum(_cost(rows[i].length) for i in members)

    pieces = [piece for members in families for piece in _pieces(rows, members, size, max_tokens)]
    units = [_Unit(piece, sum(rows[i].length for i in piece), cost(piece)) for piece in pieces]
    units.sort(key=lambda unit: -unit.cost)  # stable: equal units keep their order
    filled = _fill(units, rounds * ranks, max_tokens)
    if filled is None:
        return None
    bins = sorted((sorted(row for unit in members for row in unit.rows) for members in filled), key=cost, reverse=True)
    return _Layout(sum(map(cost, bins[::ranks])), bins)


def _pieces(rows: Sequence[Extent], members: Iterable[int], size: int, max_tokens: int) -> Iterator[list[int]]:
    """Neighbours by at most `size` rows and `max_tokens` tokens."""
    piece: list[int] = []
    for row in members:
        if len(piece) == size or sum(rows[i].length for i in [*piece, row]) > max_tokens:
            yield piece
            piece = []
        piece.append(row)
    yield piece


def _cost(length: int) -> float:
    return length + length**2 / QUADRATIC_TOKENS


def _shared_cost(rows: Sequence[Extent], members: Iterable[int]) -> float:
    """Of neighbours of one family, all but the first do without their prompt."""
    total, before = 0.0, None
    for row in (rows[i] for i in members):
        total += _cost(row.length) - (_cost(row.prompt) if before is not None and row.family == before else 0.0)
        before = row.family
    return total


def _fill(order: Sequence[_Unit], num_bins: int, max_tokens: int) -> list[list[_Unit]] | None:
    """None where some unit finds no bin with room."""
    bins: list[list[_Unit]] = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    cheapest = [(0.0, i) for i in range(num_bins)]  # a heap
    for unit in order:
        full = []
        while cheapest and room[cheapest[0][1]] < unit.room:
            full.append(heappop(cheapest))
        if not cheapest:
            return None
        cost, best = cheapest[0]
        bins[best].append(unit)
        room[best] -= unit.room
        heapreplace(cheapest, (cost + unit.cost, best))
        for entry in full:
            heappush(cheapest, entry)
    return bins
