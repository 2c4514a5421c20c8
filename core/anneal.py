"""How many completions of each group the explorer makes (Algorithm 1, lines 3 to 10)."""

from fractions import Fraction
from math import ceil
from typing import NamedTuple

from core.config import Algorithm, Config


class Quota(NamedTuple):
    """Completions per prompt that each policy owes at one step.

    Example: Quota(explorer=7, learner=1)
    """

    explorer: int
    learner: int


def explorer_quota(step: int, *, group_size: int, anneal_steps: int) -> int:
    """G_w of `step` = 1, 2, ... under the linear schedule.

        α = 1 − (i−1)/(T_mix−1),  G_w = ⌈αG⌉ = ⌈G·(T_mix−i)/(T_mix−1)⌉  for i ≤ T_mix, else 0

    (arXiv:2605.30789, Algorithm 1.) In integers: the float form is one too many for some G (G=14, T_mix=8, i=7).
    T_mix = 0 is plain GRPO. T_mix = 1 would be 0/0; step 1 is then all explorer, as in the authors' script.

    Args: step ≥ 1; group_size G ≥ 1; anneal_steps T_mix ≥ 0.
    """
    if step < 1 or group_size < 1 or anneal_steps < 0:
        raise ValueError(
            f"explorer_quota needs step >= 1, group_size >= 1 and anneal_steps >= 0, "
            f"got step={step}, group_size={group_size}, anneal_steps={anneal_steps}"
        )
    if step > anneal_steps:
        return 0
    if anneal_steps == 1:
        return group_size
    return -(-group_size * (anneal_steps - step) // (anneal_steps - 1))


def quota_at(step: int, algorithm: Algorithm) -> Quota:
    """What each policy owes per prompt at `step` under the configured schedule and mixing.

    - `linear`: the paper's; `abrupt`: all explorer up to T_mix, then all learner (Figure 6);
      `constant`: ⌈αG⌉ at every step (α = 1 is the small-only run of Figure 5).
    - mixing `in_group`: G_w + G_s = G. `authors_code`: their script asks for ⌈αG⌉ and ⌈(1−α)G⌉, which is G + 1 rows on
      a fractional α. `rescue`: the learner makes all G, the explorer `rescue_quota` spare ones per prompt.
    """
    size, anneal = algorithm.group_size, algorithm.anneal_steps
    if step < 1:
        raise ValueError(f"quota_at needs step >= 1, got step={step}")
    if algorithm.mixing == "rescue":
        return Quota(algorithm.rescue_quota, size)
    match algorithm.schedule:
        case "linear":
            explorer = explorer_quota(step, group_size=size, anneal_steps=anneal)
            fractional = 1 < step <= anneal and size * (anneal - step) % (anneal - 1) != 0
        case "abrupt":
            explorer, fractional = (size if step <= anneal else 0), False
        case "constant":
            share = explorer_share(algorithm.alpha, size)
            explorer, fractional = ceil(share), share.denominator != 1
    surplus = 1 if algorithm.mixing == "authors_code" and fractional else 0
    return Quota(explorer, size - explorer + surplus)


def all_quotas(config: Config) -> list[Quota]:
    """What each policy owes per prompt at steps 1 … T by the clock; a driver meets the same quotas at other steps."""
    return [quota_at(step, config.algorithm) for step in range(1, config.algorithm.steps + 1)]


def explorer_needed(config: Config) -> bool:
    """True where some step asks the explorer for completions."""
    return any(quota.explorer for quota in all_quotas(config))


def explorer_share(alpha: float, group_size: int) -> Fraction:
    """αG for a configured decimal α, exact: 0.07 of 100 is 7, where the product of floats rounds up to 8."""
    return Fraction(str(alpha)) * group_size
