"""From scored completions to groups with advantages (Algorithm 1, lines 16 to 18; eq. 1)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from core.advantages import group_advantages, source_baseline_advantages
from core.config import Algorithm
from core.schema import CompletionKey, Group, Prompt, ScoredCompletion, Source

Rows = list[ScoredCompletion]


def form_groups(
    scored: Sequence[ScoredCompletion], prompts: Sequence[Prompt], algorithm: Algorithm
) -> tuple[tuple[Group, ...], list[CompletionKey]]:
    """Groups in prompt order, and the keys of learner rows that `rescue` replaced.

    - `in_group`: explorer and learner rows of a prompt are one group.
    - `authors_code`: they are two groups, explorer groups first: advantages never mix.
    - `rescue`: learner rows only; where all of them fail (reward ≤ 0), correct explorer rows replace the last ones.
    """
    by_slot: dict[int, Rows] = defaultdict(list)
    for row in sorted(scored, key=lambda row: row.completion.key):
        by_slot[row.completion.key.slot].append(row)
    rescued: list[CompletionKey] = []
    parts: list[tuple[int, Rows]] = []
    for slot, rows in sorted(by_slot.items()):
        if algorithm.mixing == "authors_code":
            parts.extend(
                (slot, part) for part in (of_source(rows, Source.EXPLORER), of_source(rows, Source.LEARNER)) if part
            )
        elif algorithm.mixing == "rescue":
            kept, replaced = rescue(rows)
            rescued.extend(replaced)
            parts.append((slot, kept))
        else:
            parts.append((slot, rows))
    if algorithm.mixing == "authors_code":
        parts.sort(key=lambda part: part[1][0].completion.key.source is Source.LEARNER)  # stable: explorer phase first
    groups = tuple(with_advantages(prompts[slot], slot, rows, algorithm) for slot, rows in parts)
    return groups, rescued


def rescue(rows: Rows) -> tuple[Rows, list[CompletionKey]]:
    """Replace the last learner rows of an all-fail group by its correct explorer rows."""
    learner, explorer = of_source(rows, Source.LEARNER), of_source(rows, Source.EXPLORER)
    correct = [row for row in explorer if row.reward > 0][: len(learner)]
    if not correct or any(row.reward > 0 for row in learner):
        return learner, []
    kept = len(learner) - len(correct)
    return correct + learner[:kept], [row.completion.key for row in learner[kept:]]


def of_source(rows: Rows, source: Source) -> Rows:
    """The rows that `source` sampled."""
    return [row for row in rows if row.completion.key.source is source]


def with_advantages(prompt: Prompt, slot: int, rows: Rows, algorithm: Algorithm) -> Group:
    """One group, standardised by eq. 1 over all of it or, for learner rows, over the learner's part."""
    rewards = np.array([row.reward for row in rows])
    labels = np.zeros(len(rows), dtype=int)
    if algorithm.baseline == "source":
        is_explorer = np.array([row.completion.key.source is Source.EXPLORER for row in rows])
        advantages = source_baseline_advantages(rewards, labels, is_explorer, scale=algorithm.advantage_scale)
    else:
        advantages = group_advantages(rewards, labels, scale=algorithm.advantage_scale)
    step = rows[0].completion.key.step
    return Group(prompt=prompt, step=step, slot=slot, rows=tuple(rows), advantages=tuple(advantages.tolist()))
