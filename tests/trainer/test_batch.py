import numpy as np
import pytest
import torch

from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from trainer.batch import pack_step
from trainer.micro_batch import NO_SOURCE

EOS = 1


def row(source, sample, tokens, *, finish="stop", slot=0, logprobs=None, version=2):
    logprobs = [-0.5 * (i + 1) for i in range(len(tokens))] if logprobs is None else logprobs
    completion = Completion(
        key=CompletionKey(source=source, step=3, slot=slot, sample=sample),
        prompt_uid="p",
        token_bytes=pack_tokens(tokens),
        logprob_bytes=pack_logprobs(logprobs),
        finish=finish,
        version=version,
        worker="w",
        started_s=0.0,
        finished_s=0.0,
    )
    return ScoredCompletion(completion=completion, reward=1.0, text="")


def group(prompt_ids, rows, advantages, slot=0):
    prompt = Prompt(uid="p", token_ids=prompt_ids, text="", answer="")
    return Group(prompt=prompt, step=3, slot=slot, rows=tuple(rows), advantages=tuple(advantages))


def one_group():
    rows = [
        row(Source.EXPLORER, 0, [7, 8, EOS]),
        row(Source.LEARNER, 0, [9, EOS]),
        row(Source.LEARNER, 1, [10, 11, 12, 13], finish="length", version=1),
    ]
    return group((5, 6), rows, (-1.0, 0.5, 2.0))


def test_one_group_by_hand(tiny_config):
    batch = pack_step([one_group()], tiny_config({"algorithm.group_size": 3, "learner.micro_batch_rows": 3}))
    assert (batch.step, batch.num_tokens, len(batch.mini_batches)) == (3, 9, 1)
    (micro,) = batch.mini_batches[0].micro_batches
    # Explorer first, then by falling length.
    assert micro.inputs["input_ids"].tolist() == [[5, 6, 7, 8, EOS, 0], [5, 6, 10, 11, 12, 13], [5, 6, 9, EOS, 0, 0]]
    assert micro.target_T.tolist() == [7, 8, EOS, 10, 11, 12, 13, 9, EOS]
    assert micro.state_T.tolist() == [1, 2, 3, 7, 8, 9, 10, 13, 14]
    assert micro.row_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert micro.start_R1.tolist() == [0, 3, 7, 9]
    assert micro.source_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert micro.advantage_T.tolist() == [-1.0] * 3 + [2.0] * 4 + [0.5] * 2
    assert micro.sampler_T.tolist() == [-0.5, -1.0, -1.5, -0.5, -1.0, -1.5, -2.0, -0.5, -1.0]
    assert micro.explorer_share_T.tolist() == pytest.approx([1 / 3] * 9)
    assert micro.token_weight_T.tolist() == pytest.approx([1 / 9] * 9)
    assert micro.current_T.tolist() == [0.0] * 7 + [1.0] * 2  # step 3 begins with weights 2; explorers have others
    assert micro.sources == {Source.EXPLORER, Source.LEARNER}


def test_every_state_predicts_the_next_token(tiny_config, made_up_groups):
    for mini_batch in pack_step(made_up_groups(), tiny_config()).mini_batches:
        for micro in mini_batch.micro_batches:
            assert torch.equal(micro.inputs["input_ids"].flatten()[micro.state_T + 1], micro.target_T)


def test_the_eos_token_is_trained(tiny_config):
    batch = pack_step([one_group()], tiny_config({"algorithm.group_size": 3, "learner.micro_batch_rows": 3}))
    (micro,) = batch.mini_batches[0].micro_batches
    assert (micro.token_weight_T[micro.target_T == EOS] > 0).tolist() == [True, True]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 9] * 9),
        ("sequence_mean", [1 / 9] * 3 + [1 / 12] * 4 + [1 / 6] * 2),
        ("dr_grpo", [1 / 36] * 9),
    ],
)
def test_aggregations(tiny_config, aggregation, expected):
    config = tiny_config(
        {"algorithm.group_size": 3, "learner.micro_batch_rows": 3, "loss.aggregation": aggregation}
    )  # max_response_tokens = 12
    (micro,) = pack_step([one_group()], config).mini_batches[0].micro_batches
    assert micro.token_weight_T.tolist() == pytest.approx(expected)


def test_rows_that_leave_the_loss_keep_the_others_weights(tiny_config):
    config = tiny_config(
        {
            "algorithm.group_size": 3,
            "learner.micro_batch_rows": 3,
            "learner.skip_zero_gradient": False,
            "loss.overlong": "mask",
            "correction.explorer_negatives": "drop",
        }
    )
    (micro,) = pack_step([one_group()], config).mini_batches[0].micro_batches
    assert micro.token_weight_T.tolist() == pytest.approx([0.0] * 7 + [1 / 9] * 2)


def test_dropping_negatives_spares_learner_rows_and_positive_explorer_rows(tiny_config):
    rows = [row(Source.EXPLORER, 0, [7]), row(Source.EXPLORER, 1, [8]), row(Source.LEARNER, 0, [9])]
    config = tiny_config(
        {
            "algorithm.group_size": 3,
            "learner.micro_batch_rows": 3,
            "learner.skip_zero_gradient": False,
            "correction.explorer_negatives": "drop",
        }
    )
    (micro,) = pack_step([group((5,), rows, (1.0, -1.0, -1.0))], config).mini_batches[0].micro_batches
    assert dict(zip(micro.target_T.tolist(), (micro.token_weight_T > 0).tolist())) == {7: True, 8: False, 9: True}


@pytest.mark.parametrize(("overlong", "weight"), [("keep", 1 / 13), ("mask", 0.0)])
def test_a_completion_above_the_limit_is_cut_and_counts_as_truncated(tiny_config, overlong, weight):
    long = row(Source.EXPLORER, 0, list(range(2, 22)))
    config = tiny_config(
        {
            "algorithm.group_size": 2,
            "learner.micro_batch_rows": 2,
            "learner.skip_zero_gradient": False,
            "loss.overlong": overlong,
        }
    )
    (micro,) = (
        pack_step([group((5,), [long, row(Source.LEARNER, 0, [9])], (1.0, -1.0))], config).mini_batches[0].micro_batches
    )
    assert micro.target_T.tolist() == [*range(2, 14), 9]
    assert micro.sampler_T[:12].tolist() == pytest.approx([-0.5 * (i + 1) for i in range(12)])
    assert micro.token_weight_T.tolist() == pytest.approx([weight] * 12 + [1 / 13])


@pytest.mark.parametrize(
    ("loss", "explorer", "learner"),
    [
        ({"loss.kl_coef": 0.0}, False, False),
        ({"loss.kl_coef": 1e-3}, False, True),
        ({"loss.kl_coef": 1e-3, "loss.kl_rows": "all"}, True, True),
        ({"loss.kl_coef": 0.0, "loss.entropy_coef": 1e-3}, True, True),
        ({"loss.kl_coef": 0.0, "learner.skip_zero_gradient": False}, True, True),
    ],
)
@pytest.mark.parametrize("packed", [0, 64])
def test_rows_without_a_gradient_are_not_computed_and_count(tiny_config, loss, explorer, learner, packed):
    config = tiny_config({"algorithm.group_size": 2, "learner.micro_batch_tokens": packed, **loss})
    equal = group((5,), [row(Source.EXPLORER, 0, [7, 7]), row(Source.LEARNER, 0, [8, 8])], (0.0, 0.0))
    differ = group((6,), [row(Source.EXPLORER, 0, [9, 9]), row(Source.LEARNER, 0, [10, 10])], (-1.0, 1.0), slot=1)
    (mini,) = pack_step([equal, differ], config).mini_batches
    computed = {token for micro in mini.micro_batches for token in micro.target_T.tolist()}
    assert computed == {9, 10} | ({7} if explorer else set()) | ({8} if learner else set())
    assert (mini.num_rows, mini.num_tokens) == (4, 8)
    weights = [weight for micro in mini.micro_batches for weight in micro.token_weight_T.tolist()]
    assert weights == pytest.approx([1 / 8] * len(weights))


@pytest.mark.parametrize("packed", [0, 64])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_without_a_gradient_stays_an_update(tiny_config, packed, world_size):
    config = tiny_config({"algorithm.group_size": 1, "learner.micro_batch_tokens": packed, "loss.kl_coef": 0.0})
    equal = group((5,), [row(Source.LEARNER, 0, [8, 9])], (0.0,))
    for rank in range(world_size):
        (mini,) = pack_step([equal], config, rank=rank, world_size=world_size).mini_batches
        (micro,) = mini.micro_batches
        assert (micro.source_T.tolist(), micro.token_weight_T.tolist(), micro.sources) == ([NO_SOURCE], [0.0], set())
        assert (mini.num_rows, mini.num_tokens) == (1, 2)


def test_mini_batches_follow_prompt_order(tiny_config, made_up_groups):
    groups = made_up_groups(prompts=5)
    batch = pack_step(groups, tiny_config())
    assert [mini.num_rows for mini in batch.mini_batches] == [8, 8, 4]  # a prompt was dropped: the last is short
    for mini, members in zip(batch.mini_batches, (groups[:2], groups[2:4], groups[4:])):
        expected = sorted(t for g in members for r in g.rows for t in r.completion.tokens.tolist())
        assert sorted(t for micro in mini.micro_batches for t in micro.target_T.tolist()) == expected


def test_authors_code_trains_explorer_rows_before_learner_rows(tiny_config, made_up_groups):
    config = tiny_config({"algorithm.mixing": "authors_code", "algorithm.epochs": 2})
    batch = pack_step(made_up_groups(explorer=3, learner=2), config)
    assert [len(phase) for phase in batch.phases] == [2, 2]
    sources = [{s for micro in mini.micro_batches for s in micro.source_T.tolist()} for mini in batch.updates(2)]
    assert sources == [{0}] * 4 + [{1}] * 4
    assert [mini.num_rows for mini in batch.mini_batches] == [6, 6, 4, 4]


def test_a_phase_without_rows_is_left_out(tiny_config, made_up_groups):
    config = tiny_config({"algorithm.mixing": "authors_code"})
    assert len(pack_step(made_up_groups(explorer=0, learner=4), config).phases) == 1


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_ranks_share_the_rows_of_one_rank(tiny_config, made_up_groups, world_size, rows):
    config = tiny_config({"learner.micro_batch_rows": rows})
    groups = made_up_groups(prompts=3)
    alone = pack_step(groups, config)
    ranks = [pack_step(groups, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    for i, mini in enumerate(alone.mini_batches):
        shares = [batch.mini_batches[i] for batch in ranks]
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert all((share.num_rows, share.num_tokens) == (mini.num_rows, mini.num_tokens) for share in shares)
        assert tokens_and_weights([mini]) == tokens_and_weights(shares)
        for together in zip(*(share.micro_batches for share in shares)):
            assert len({micro.sources for micro in together}) == 1
            assert len({micro.index for micro in together}) == 1


def tokens_and_weights(mini_batches):
    return sorted(
        (token, weight, source, sampler)
        for mini in mini_batches
        for micro in mini.micro_batches
        for token, weight, source, sampler in zip(
            micro.target_T.tolist(), micro.token_weight_T.tolist(), micro.source_T.tolist(), micro.sampler_T.tolist()
        )
        if source != NO_SOURCE
    )


def test_a_rank_without_rows_gets_a_placeholder_of_weight_zero(tiny_config):
    config = tiny_config({"algorithm.group_size": 3, "learner.micro_batch_rows": 1})
    ranks = [pack_step([one_group()], config, rank=rank, world_size=4) for rank in range(4)]
    empty = [batch for batch in ranks if batch.mini_batches[0].micro_batches[0].source_T.tolist() == [NO_SOURCE]]
    assert len(empty) == 1
    micro = empty[0].mini_batches[0].micro_batches[0]
    assert micro.token_weight_T.tolist() == [0.0]
    assert micro.sources == {Source.EXPLORER, Source.LEARNER}


def test_rows_of_similar_length_share_a_micro_batch(tiny_config, made_up_groups):
    batch = pack_step(made_up_groups(prompts=8, longest=12, seed=5), tiny_config({"algorithm.mini_batch_prompts": 8}))
    (mini,) = batch.mini_batches
    for source in (0, 1):
        widths = [m.inputs["input_ids"].shape[1] for m in mini.micro_batches if set(m.source_T.tolist()) == {source}]
        assert widths == sorted(widths, reverse=True)
    assert sum(len(m.sources) == 2 for m in mini.micro_batches) <= 1


def test_packing_is_deterministic(tiny_config, made_up_groups):
    first, second = (pack_step(made_up_groups(), tiny_config()) for _ in range(2))
    for a, b in zip(first.mini_batches, second.mini_batches):
        for x, y in zip(a.micro_batches, b.micro_batches):
            assert torch.equal(x.inputs["input_ids"], y.inputs["input_ids"])
            assert all(torch.equal(getattr(x, name), getattr(y, name)) for name in ("target_T", "sampler_T"))
    assert np.isfinite(first.num_tokens)
