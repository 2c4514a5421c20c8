"""What a step's groups say about themselves, by TRL's metric names where the meaning is the same (docs/metrics.md)."""

from collections.abc import Sequence

import numpy as np

from core.anneal import Quota
from core.diversity import Sample, group_diversity, spread, without_answers
from core.schema import Group, ScoredCompletion, Source

# Self-BLEU takes about 4.5 µs × completions² × tokens per group, edit diversity 0.1 ns × tokens² per pair and more for
# short ones: with these bounds, and Self-BLEU every tenth step, both are about 1 % of a run (docs/metrics.md).
DIVERSITY_ROWS, DIVERSITY_GROUPS, SELF_BLEU_GROUPS = 4, 64, 16


def group_metrics(groups: Sequence[Group], quota: Quota, step: int, *, limit: int) -> dict[str, float]:
    """Rewards, zero-variance groups, lengths and staleness of one step's groups, of which `limit` tokens a row train.

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
        "mix/alpha": np.mean([row.completion.key.source is Source.EXPLORER for row in rows]) if rows else 0.0,
        "mix/explorer_quota": quota.explorer,
        "mix/learner_quota": quota.learner,
        "off_policy/mixed_versions": np.mean([bool(row.completion.spans) for row in rows]) if rows else 0.0,
        "off_policy/staleness_max": max((staleness(row, step) for row in rows), default=0),
    }
    lengths = np.array([row.completion.num_tokens for row in rows])
    metrics |= {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated(rows, limit),
    }
    for source in Source:
        own = [row for row in rows if row.completion.key.source is source]
        metrics[f"{source}/rows"] = len(own)
        if own:
            metrics[f"{source}/reward"] = np.mean([row.reward for row in own])
            metrics[f"{source}/length"] = np.mean([row.completion.num_tokens for row in own])
            metrics[f"{source}/truncated"] = truncated(own, limit)
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def diversity_metrics(groups: Sequence[Group], *, self_bleu: bool) -> dict[str, float]:
    """How much the completions of a prompt differ, per source; nothing for a source with fewer than 4 a group.

    `S/edit_diversity`, `S/unique_answer_ratio`, and `S/self_bleu` where asked for: means over evenly spaced groups,
    each over the first 4 completions of the source, so that they compare across steps, quotas and sources.
    """
    groups = spread(groups, DIVERSITY_GROUPS)
    whole = without_answers(row.text for group in groups for row in group.rows)
    metrics: dict[str, float] = {}
    for source in Source:
        own = [[row for row in group.rows if row.completion.key.source is source][:DIVERSITY_ROWS] for group in groups]
        samples = [[Sample(row.text, row.completion.tokens.tolist()) for row in rows] for rows in own]
        found = group_diversity(
            samples,
            rows=DIVERSITY_ROWS,
            self_bleu_limit=SELF_BLEU_GROUPS if self_bleu else None,
            whole_texts=whole,
        )
        metrics |= {f"{source}/{name}": value for name, value in found.items()}
    return metrics


def staleness(row: ScoredCompletion, step: int) -> int:
    """Training steps between the weights that sampled a learner row and those it trains; an explorer is never stale."""
    completion = row.completion
    return 0 if completion.key.source is Source.EXPLORER else step - 1 - completion.version


def truncated(rows: Sequence[ScoredCompletion], limit: int) -> float:
    """Share of completions that were cut by their own length limit, or are by that of training."""
    return sum(row.completion.finish == "length" or row.completion.num_tokens > limit for row in rows) / len(rows)
