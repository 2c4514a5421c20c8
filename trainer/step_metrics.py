"""What a step's groups say about themselves, by TRL's metric names where the meaning is the same (docs/metrics.md)."""

from collections.abc import Sequence

import numpy as np

from core.anneal import Quota
from core.schema import Group, ScoredCompletion, Source


def group_metrics(groups: Sequence[Group], quota: Quota, step: int) -> dict[str, float]:
    """Rewards, zero-variance groups, lengths and staleness of one step's groups.

    A group whose rewards are all equal has no advantage: `all_fail` where they are ≤ 0, `all_pass` otherwise.
    """
    rewards = [np.array([row.reward for row in group.rows]) for group in groups]
    flat = np.concatenate(rewards)
    zero = [values for values in rewards if np.ptp(values) == 0]
    failed = sum(1 for values in zero if values[0] <= 0)
    rows = [row for group in groups for row in group.rows]
    metrics = {
        "reward": flat.mean(),
        "reward_std": np.mean([values.std(ddof=1) if len(values) > 1 else 0.0 for values in rewards]),
        "frac_reward_zero_std": len(zero) / len(groups),
        "groups/all_fail": failed / len(groups),
        "groups/all_pass": (len(zero) - failed) / len(groups),
        "mix/alpha": quota.explorer / sum(quota),
        "mix/explorer_quota": quota.explorer,
        "mix/learner_quota": quota.learner,
        "off_policy/mixed_versions": np.mean([bool(row.completion.spans) for row in rows]) if rows else 0.0,
        "off_policy/staleness_max": max((staleness(row, step) for row in rows), default=0),
    }
    lengths = np.array([len(row.completion.tokens) for row in rows])
    metrics |= {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated(rows),
    }
    for source in Source:
        own = [row for row in rows if row.completion.key.source is source]
        metrics[f"{source}/rows"] = len(own)
        if own:
            metrics[f"{source}/reward"] = np.mean([row.reward for row in own])
            metrics[f"{source}/length"] = np.mean([len(row.completion.tokens) for row in own])
            metrics[f"{source}/truncated"] = truncated(own)
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def staleness(row: ScoredCompletion, step: int) -> int:
    """Training steps between the weights that sampled a learner row and those it trains; an explorer is never stale."""
    completion = row.completion
    return 0 if completion.key.source is Source.EXPLORER else step - 1 - completion.version


def truncated(rows: Sequence[ScoredCompletion]) -> float:
    """Share of completions cut by the length limit."""
    return sum(row.completion.finish == "length" for row in rows) / len(rows)
