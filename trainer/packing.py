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
    costs = _Costs(rows, share=share)
    rounds = -(-sum(costs.length) // (max_tokens * ranks))
    while (best := _layout(costs, families, 1, max_tokens, rounds, ranks)) is None:
        rounds += 1
    size = 1
    while share and size < max(map(len, families)):
        size *= 2
        layout = _layout(costs, families, size, max_tokens, rounds, ranks)
        if layout is not None and layout.time <= best.time:
            best = layout
    return best.bins


class _Costs:
    """Of a forward and backward pass over neighbours. With `share`, each but the first of a family does without its
    prompt."""

    def __init__(self, rows: Sequence[Extent], *, share: bool) -> None:
        self.length = [row.length for row in rows]
        self._alone = [_cost(row.length) for row in rows]
        self._spared = [_cost(row.prompt) if share and row.family is not None else 0.0 for row in rows]
        self._family = [row.family for row in rows]

    def of(self, members: Iterable[int]) -> float:
        """In tokens of a short row."""
        total, before = 0.0, None
        for i in members:
            family = self._family[i]
            total += self._alone[i] - (self._spared[i] if family == before else 0.0)
            before = family
        return total


class _Unit(NamedTuple):
    """Neighbours that stay together."""

    rows: list[int]
    room: int
    cost: float


class _Layout(NamedTuple):
    time: float  # the largest costs of all rounds
    bins: list[list[int]]


def _layout(
    costs: _Costs, families: Sequence[list[int]], size: int, max_tokens: int, rounds: int, ranks: int
) -> _Layout | None:
    """None where units of `size` rows do not fit into so many rounds."""
    units = [unit for members in families for unit in _units(costs, members, size, max_tokens)]
    units.sort(key=lambda unit: -unit.cost)  # stable: equal units keep their order
    filled = _fill(units, rounds * ranks, max_tokens)
    if filled is None:
        return None
    bins = [sorted(row for unit in members for row in unit.rows) for members in filled]
    priced = sorted(((costs.of(members), members) for members in bins), key=lambda pair: pair[0], reverse=True)
    return _Layout(sum(cost for cost, _ in priced[::ranks]), [members for _, members in priced])


def _units(costs: _Costs, members: Iterable[int], size: int, max_tokens: int) -> Iterator[_Unit]:
    """Neighbours by at most `size` rows and `max_tokens` tokens."""
    piece: list[int] = []
    tokens = 0
    for row in members:
        if len(piece) == size or tokens + costs.length[row] > max_tokens:
            yield _Unit(piece, tokens, costs.of(piece))
            piece, tokens = [], 0
        piece.append(row)
        tokens += costs.length[row]
    yield _Unit(piece, tokens, costs.of(piece))


def _cost(length: int) -> float:
    return length + length**2 / QUADRATIC_TOKENS


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
