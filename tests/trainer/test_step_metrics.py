"""What a step's groups say about themselves."""

import pytest
from msgspec.structs import replace

from core.anneal import Quota
from core.schema import pack_logprobs, pack_tokens
from trainer.step_metrics import group_metrics


def lengthened(row, length):
    completion = replace(
        row.completion, token_bytes=pack_tokens([5] * length), logprob_bytes=pack_logprobs([-1.0] * length),
        finish="stop",
    )  # fmt: skip
    return replace(row, completion=completion)


def test_answers_longer_than_what_trains_of_them_count_as_cut(made_up_groups):
    [group] = made_up_groups(prompts=1, explorer=2, learner=2)
    rows = [lengthened(row, length) for row, length in zip(group.rows, (20, 12, 13, 4))]
    metrics = group_metrics([replace(group, rows=tuple(rows))], Quota(2, 2), 1, limit=12)
    assert metrics["completions/clipped_ratio"] == pytest.approx(2 / 4)
    assert metrics["explorer/truncated"] == metrics["learner/truncated"] == pytest.approx(1 / 2)
    assert metrics["completions/max_length"] == 20  # as they were generated


def test_alpha_is_the_share_of_rows_that_are_the_explorers(made_up_groups):
    """Under rescue the quota says what is generated, not what trains."""
    assert group_metrics(made_up_groups(explorer=1, learner=3), Quota(3, 4), 1, limit=12)["mix/alpha"] == 0.25
    assert group_metrics(made_up_groups(explorer=0, learner=4), Quota(3, 4), 1, limit=12)["mix/alpha"] == 0.0
