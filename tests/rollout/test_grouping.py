"""Groups: exact quotas, advantages over the right rows, and the three mixings."""

import numpy as np
import pytest

from core.config import Algorithm
from core.schema import Completion, CompletionKey, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from rollout.grouping import form_groups

PROMPTS = tuple(Prompt(uid=str(slot), token_ids=(slot + 2,), text=str(slot), answer="1") for slot in range(2))


def row(source: Source, slot: int, sample: int, reward: float) -> ScoredCompletion:
    key = CompletionKey(source=source, step=1, slot=slot, sample=sample)
    completion = Completion(
        key=key,
        prompt_uid=str(slot),
        token_bytes=pack_tokens([5]),
        logprob_bytes=pack_logprobs([-1.0]),
        finish="stop",
        version=0,
        worker="w",
        started_s=0.0,
        finished_s=0.0,
    )
    return ScoredCompletion(completion=completion, reward=reward, text="")


def rows(slot: int, explorer: list[float], learner: list[float]) -> list[ScoredCompletion]:
    both = ((Source.EXPLORER, explorer), (Source.LEARNER, learner))
    return [row(source, slot, i, reward) for source, rewards in both for i, reward in enumerate(rewards)]


def test_in_group_advantages_are_over_the_combined_group_whoever_arrived_first() -> None:
    scored = rows(0, [1, 0], [1, 1]) + rows(1, [0, 0], [0, 1])
    groups, rescued = form_groups(scored[::-1], PROMPTS, Algorithm(group_size=4))
    assert rescued == []
    assert [group.slot for group in groups] == [0, 1]
    sources = [row.completion.key.source for row in groups[0].rows]
    assert sources == [Source.EXPLORER, Source.EXPLORER, Source.LEARNER, Source.LEARNER]
    rewards = np.array([1, 0, 1, 1])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(groups[0].advantages, expected)


def test_source_baseline_standardises_learner_rows_among_themselves() -> None:
    algorithm = Algorithm(group_size=4, baseline="source")
    (group,), _ = form_groups(rows(0, [1, 1], [0, 1]), PROMPTS, algorithm)
    half = 0.5 / (np.std([0, 1], ddof=1) + 1e-6)
    np.testing.assert_allclose(group.advantages[2:], [-half, half])


def test_authors_code_makes_two_groups_per_prompt_explorer_phase_first() -> None:
    algorithm = Algorithm(group_size=4, mixing="authors_code")
    groups, _ = form_groups(rows(0, [1, 0], [1, 1, 0]) + rows(1, [0, 1], [0, 1, 0]), PROMPTS, algorithm)
    assert [(group.slot, len(group.rows)) for group in groups] == [(0, 2), (1, 2), (0, 3), (1, 3)]
    np.testing.assert_allclose(sum(groups[0].advantages), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("explorer", "learner", "kept", "replaced"),
    [
        ([1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0], [2, 3]),  # all fail: correct explorer rows take the last places
        ([1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], []),  # the learner has a success: left alone
        ([0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], []),  # nobody is right
        ([1, 1, 1], [-1, -1], [1, 1], [0, 1]),  # rewards of ±1, and more rescuers than rows
    ],
)
def test_rescue(explorer: list[float], learner: list[float], kept: list[float], replaced: list[int]) -> None:
    algorithm = Algorithm(group_size=4, mixing="rescue")
    (group,), rescued = form_groups(rows(0, explorer, learner), PROMPTS, algorithm)
    assert [row.reward for row in group.rows] == kept
    assert [key.sample for key in rescued] == replaced
    assert all(key.source is Source.LEARNER for key in rescued)
