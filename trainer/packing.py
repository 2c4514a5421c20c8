"""Which rows share a forward pass, where forward passes are filled to a number of tokens instead of rows."""

from collections.abc import Sequence

QUADRATIC_TOKENS = 24_576  # row length at which attention costs as much as all else: 12 x a hidden size of 2048


def pack_rows(lengths: Sequence[int], *, max_tokens: int, ranks: int) -> list[list[int]]:
    """Positions of `lengths` in bins of at most `max_tokens`; their number is a multiple of `ranks`.

    Every row is in one bin. The largest cost of a bin is kept small (longest processing time first: each row, by
    falling cost, goes to the cheapest bin that has room), and bins come by falling cost, so that the `ranks` bins of
    one round, which wait for each other, are alike. The cost of a row of L tokens is L + L² / 24576. The same
    lengths always give the same bins; bins are empty where there are fewer rows than ranks.

    Example: pack_rows([5, 3, 3, 2], max_tokens=8, ranks=2) == [[0, 3], [1, 2]]

    Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969).
    """
    assert max(lengths) <= max_tokens, f"a row of {max(lengths)} tokens does not fit into {max_tokens}"
    costs = [length + length**2 / QUADRATIC_TOKENS for length in lengths]
    order = sorted(range(len(lengths)), key=lambda row: -costs[row])  # stable: equal rows keep their order
    rounds = -(-sum(lengths) // (max_tokens * ranks))
    while (bins := _fill(order, lengths, costs, rounds * ranks, max_tokens)) is None:
        rounds += 1
    bins.sort(key=lambda rows: -sum(costs[row] for row in rows))
    return [sorted(rows) for rows in bins]


def _fill(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """None where some row finds no bin with room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room, cost = [max_tokens] * num_bins, [0.0] * num_bins
    for row in order:
        candidates = [i for i in range(num_bins) if room[i] >= lengths[row]]
        if not candidates:
            return None
        best = min(candidates, key=cost.__getitem__)
        bins[best].append(row)
        room[best] -= lengths[row]
        cost[best] += costs[row]
    return bins
