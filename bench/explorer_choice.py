"""What decides whether a model is worth having as an explorer, from counts of right completions before training.

Per prompt there are n completions of each model, drawn independently; `own` and `others` are how many of the learner's
and of the candidate's are right. Groups hold G completions, G_w of them the candidate's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.diversity import pass_at_k

GOOD_ESS = 0.3


class Difference(NamedTuple):
    """A mean over prompts and its standard error; prompts are paired.

    Example: Difference(mean=0.04, stderr=0.01).low -> 0.0204
    """

    mean: float
    stderr: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - 1.96 * self.stderr

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + 1.96 * self.stderr

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {196 * self.stderr:.1f} points"


class Counts(NamedTuple):
    """Right completions of `n` per prompt.

    Example: Counts(n=16, own=[0, 3], others=[1, 2])
    """

    n: int
    own: Sequence[int]
    others: Sequence[int]


def difference(values: Sequence[float]) -> Difference:
    """Mean over prompts and its standard error."""
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Difference(float(np.mean(values)), stderr)


def pass_difference(counts: Counts, k: int) -> Difference:
    """pass@k of the candidate less that of the learner, over the same prompts."""
    n, own, others = counts
    return difference([pass_at_k(n, other, k) - pass_at_k(n, mine, k) for mine, other in zip(own, others)])


def mixed_share(counts: Counts, quota: int, group_size: int) -> float:
    """Share of groups with both right and wrong completions, so with a gradient: G_w = quota, from unbiased estimates.

    1 − P(all right) − P(all wrong), each the product of the two sources' (hypergeometric) chances.
    """
    return float(np.mean(_mixed(counts, quota, group_size)))


def mixed_gain(counts: Counts, group_size: int) -> Difference:
    """By how much the share of groups with a gradient rises, averaged over G_w = 1 … G as linear annealing goes."""
    alone = np.array(_mixed(counts, 0, group_size))
    gains = [np.array(_mixed(counts, quota, group_size)) - alone for quota in range(1, group_size + 1)]
    return difference(np.mean(gains, axis=0).tolist())


def rescue_gain(counts: Counts, group_size: int, quota: int) -> Difference:
    """Share of prompts where the whole learner group fails and one of `quota` explorer completions is right, less the
    same with `quota` more completions of the learner."""
    n, own, others = counts
    values = []
    for mine, other in zip(own, others):
        fails = _chance(n, n - mine, group_size)
        control = pass_at_k(n, mine, group_size + quota) - pass_at_k(n, mine, group_size)
        values.append(fails * pass_at_k(n, other, quota) - control)
    return difference(values)


def fail_share(n: int, right: Sequence[int], group_size: int) -> float:
    """Share of a model's own groups in which all fail."""
    return float(np.mean([_chance(n, n - count, group_size) for count in right]))


def crossover(counts: Counts, ks: Sequence[int], *, surely: bool = False) -> int | None:
    """The smallest k from which on the candidate's pass@k is at least the learner's; `surely`: beyond the noise."""
    found = None
    for k in sorted(ks, reverse=True):
        ahead = pass_difference(counts, k)
        if (ahead.low if surely else ahead.mean) < 0:
            break
        found = k
    return found


def recommend(candidates: Mapping[str, Mapping[str, Any]], steps: int) -> tuple[dict[str, Any], list[str]]:
    """Settings (`explorer.model`, `algorithm.mixing`, `algorithm.anneal_steps`) and why, from the rows of candidates.

    In-group mixing where the average share of groups with a gradient rises beyond its noise: the cheapest of the
    candidates that are not surely worse than the best. T_mix is half of the steps, as in the paper, or 5 of 16 (its
    Figure 7) where the effective sample size is low. Else rescue, where the candidate solves more of what the learner
    fails at than more learner samples do. Else no explorer.
    """
    mixing = {name: row for name, row in candidates.items() if row["mixed_gain"].low > 0}
    if mixing:
        best = max(row["mixed_gain"].mean for row in mixing.values())
        near = [name for name, row in mixing.items() if row["mixed_gain"].high >= best]
        name = min(near, key=lambda one: candidates[one]["seconds_per_completion"])
        row = candidates[name]
        good = row["ess"] >= GOOD_ESS
        anneal = max(2, steps // 2 if good else round(steps * 5 / 16))
        reasons = [
            f"averaged over the annealing, {row['mixed_gain']} more groups have both right and wrong completions",
            f"a completion costs {row['cost_ratio']:.2f} of the learner's",
            f"effective sample size {row['ess']:.2f} is {'at least' if good else 'below'} {GOOD_ESS}: "
            f"T_mix is {'half' if good else '5 of 16'} of the steps",
        ]
        return _settings(name, "in_group", anneal), reasons
    rescuing = {name: row for name, row in candidates.items() if row["rescue_gain"].low > 0}
    if rescuing:
        name = max(rescuing, key=lambda one: rescuing[one]["rescue_gain"].mean)
        row = candidates[name]
        reasons = [
            f"in-group mixing does not surely raise the share of groups with a gradient ({row['mixed_gain']})",
            "where the learner's whole group fails, it is right more often than further samples of the learner: "
            f"{row['rescue_gain']}",
        ]
        return _settings(name, "rescue", steps // 2), reasons
    reasons = [
        f"{name}: groups with a gradient {row['mixed_gain']}, rescued prompts {row['rescue_gain']}: not surely above 0"
        for name, row in candidates.items()
    ]
    return {"explorer.model": "", "algorithm.mixing": "in_group", "algorithm.anneal_steps": 0}, reasons


def _settings(name: str, mixing: str, anneal_steps: int) -> dict[str, Any]:
    return {"explorer.model": name, "algorithm.mixing": mixing, "algorithm.anneal_steps": anneal_steps}


def _mixed(counts: Counts, quota: int, group_size: int) -> list[float]:
    n, own, others = counts
    rest = group_size - quota
    values = []
    for mine, other in zip(own, others):
        all_right = _chance(n, other, quota) * _chance(n, mine, rest)
        all_wrong = _chance(n, n - other, quota) * _chance(n, n - mine, rest)
        values.append(1 - all_right - all_wrong)
    return values


def _chance(n: int, marked: int, drawn: int) -> float:
    """That all of `drawn` of n completions are among the `marked` ones: C(marked, drawn) / C(n, drawn)."""
    return math.comb(marked, drawn) / math.comb(n, drawn)
