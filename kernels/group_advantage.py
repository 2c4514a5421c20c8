"""Group advantages on the device, with the rows that are worth training.

For rewards that are on the device already, such as a reward model's. The trainer's come from processes on the host:
core/advantages.py.

Shapes: N completions, P groups; group p owns rewards [cu_groups[p], cu_groups[p+1]).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import segments
from kernels.arguments import Implementation, Segments, check_rows, implementation


class GroupAdvantage(NamedTuple):
    """What a group's rewards are worth to the loss.

    advantage [N]; kept [P]: completions of the group that have a gradient, its size or 0; rows [N]: their row
    numbers, of which the first kept.sum() count and the rest are −1, so that the list needs no host sync to be made.
    """

    advantage: Tensor
    kept: Tensor
    rows: Tensor


def group_advantage(
    rewards: Tensor, cu_groups: Tensor, *, scale: str = "std", eps: float = 1e-6, impl: Implementation = "auto"
) -> GroupAdvantage:
    """Rewards against their group's mean, over its sample standard deviation (DeepSeekMath, arXiv:2402.03300, eq. 9).

        A_i = (r_i − mean) / (std + eps);  scale="none": A_i = r_i − mean (Dr.GRPO, arXiv:2503.20783)

    As verl: ddof 1, and a group of one has mean 0 and std 1. A group whose rewards are equal gets exactly 0 and is not
    kept: with no KL term and no entropy bonus its rows can leave the batch.

    Shapes: rewards [N], cu_groups [P+1]. float32.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be std or none, got {scale!r}")
    check_rows("rewards", rewards, rewards.numel())
    groups = Segments.of(cu_groups, rewards.shape[0], rewards.device)
    if implementation(impl, rewards.device) == "triton":
        from kernels import ragged_triton

        advantage, kept = ragged_triton.group_advantage(rewards, groups, divide=scale == "std", eps=eps)
        return GroupAdvantage(advantage, kept, ragged_triton.keep_list(kept, groups))
    r = rewards.float()
    size = torch.diff(groups.offsets).float()
    mean = torch.where(size > 1, segments.segment_sum(r, groups) / size.clamp(min=1), 0)
    centred = r - segments.spread(mean, groups)
    deviation = (segments.segment_sum(centred.square(), groups) / (size - 1).clamp(min=1)).sqrt()
    deviation = torch.where(size > 1, deviation, 1)
    differ = _differ(r, size, groups)
    advantage = centred / (segments.spread(deviation, groups) + eps) if scale == "std" else centred
    kept = torch.where(differ, torch.diff(groups.offsets), 0)
    live = segments.spread(differ, groups)
    rows = torch.full_like(live, -1, dtype=torch.int64)
    chosen = live.nonzero()[:, 0]
    rows[: chosen.shape[0]] = chosen
    return GroupAdvantage(torch.where(live, advantage, 0), kept, rows)


def _differ(rewards: Tensor, size: Tensor, groups: Segments) -> Tensor:
    """Per group: whether its rewards differ; a lone reward counts when it is not 0."""
    if rewards.numel() == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    most = torch.segment_reduce(rewards, "max", offsets=groups.offsets, axis=0, unsafe=True, initial=-torch.inf)
    least = torch.segment_reduce(rewards, "min", offsets=groups.offsets, axis=0, unsafe=True, initial=torch.inf)
    return torch.where(size > 1, most > least, (size == 1) & (most != 0))
