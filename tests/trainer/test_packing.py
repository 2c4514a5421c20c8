"""Rows packed one after the other train as rows by themselves; who packs with whom is balanced and deterministic."""

import pytest
import torch
from decoders import FAMILIES, SHAPE, build, close
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core.configcheck import check_config
from core.configkeys import ConfigError
from trainer.attention import use_packed_attention
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.micro_batch import NO_SOURCE
from trainer.objective import policy_objective
from trainer.packing import QUADRATIC_TOKENS, Extent, pack_rows
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def one_line(lengths):
    """Token ids, and the decoder's inputs for all rows in one line."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator) for length in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
    return rows, inputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(7, 1, 12, 2, 1), (1, 1, 1), (9,), (30, 2), (140, 1, 3)])
@pytest.mark.parametrize(
    ("dtype", "checkpointing", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.float64, False, 1e-12)],
)
def test_packed_rows_are_rows_by_themselves(family, lengths, dtype, checkpointing, tolerance):
    alone, packed = build(family, dtype), build(family, dtype)
    use_packed_attention(packed)
    if checkpointing:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        packed.train()
    rows, inputs = one_line(lengths)
    expected = [alone.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    found = packed.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]
    assert close(found, torch.cat(expected), tolerance)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    (found * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.get_decoder().parameters()]) for m in (packed, alone))
    assert close(ours, theirs, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_still_reads_plain_rows(family):
    plain, packed = build(family), build(family)
    use_packed_attention(packed)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(packed(input_ids=ids, use_cache=False).logits, plain(input_ids=ids).logits)


def test_sliding_windows_are_refused():
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match=r"sliding_attention layers.*micro_batch_tokens=0"):
        use_packed_attention(Qwen3ForCausalLM(config))


def test_a_window_that_only_the_config_names_is_refused():
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, sliding_window=8)
    with pytest.raises(ValueError, match=r"sliding_attention layers.*micro_batch_tokens=0"):
        use_packed_attention(MistralForCausalLM(config))
    use_packed_attention(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)))


def test_a_model_that_keeps_its_own_attention_is_refused():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"attention of bloom cannot be replaced.*micro_batch_tokens=0"):
        use_packed_attention(BloomForCausalLM(config))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(40, 200),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_bins_hold_every_row_once_within_the_budget(lengths, max_tokens, ranks):
    rows = [Extent(length) for length in lengths]
    bins = pack_rows(rows, max_tokens=max_tokens, ranks=ranks)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= max_tokens for rows in bins)
    assert len(bins) % ranks == 0
    assert bins == pack_rows(rows, max_tokens=max_tokens, ranks=ranks)
    cost = [sum(lengths[row] + lengths[row] ** 2 / QUADRATIC_TOKENS for row in rows) for rows in bins]
    assert cost == sorted(cost, reverse=True)
    # Longest processing time first: no bin is above the mean by more than its last row, which is not above the largest.
    assert max(cost) <= sum(cost) / len(cost) + max(lengths) * (1 + max(lengths) / QUADRATIC_TOKENS) + 1e-9


def test_the_ranks_of_a_round_have_alike_costs():
    lengths = torch.randint(50, 1000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = pack_rows([Extent(length) for length in lengths], max_tokens=4096, ranks=8)
    totals = torch.tensor([sum(lengths[row] for row in rows) for rows in bins]).view(-1, 8)
    assert len(bins) == 8 * -(-sum(lengths) // (4096 * 8))
    assert ((totals.amax(1) - totals.amin(1)) / totals.amax(1)).max() < 0.02


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss.ratio": "sequence", "loss.aggregation": "sequence_mean", "rollout.temperature": 0.7},
        {"learner.gradient_checkpointing": True, "learner.kernels": "reference"},
    ],
)
def test_packed_training_is_padded_training(tiny_config, made_up_groups, learner_dir, overrides):
    groups, found = made_up_groups(explorer=1, learner=3), []
    for tokens in (0, 60):
        config = tiny_config({"learner.micro_batch_tokens": tokens, "learner.warmup_updates": 0, **overrides})
        learner = load(config, learner_dir)
        batch = pack_step(groups, config)
        learner.begin_step(batch)
        metrics = learner.update(batch.mini_batches[0])
        found.append((metrics, learner.backend.optimizer.gradient.clone()))
    (padded, gradient), (packed, packed_gradient) = found
    for name, value in padded.items():
        assert packed[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert (packed_gradient - gradient).norm() <= 1e-6 * gradient.norm()


def test_packed_ratios_on_policy_are_exactly_one(tiny_config, made_up_groups, learner_dir):
    config = tiny_config({"learner.micro_batch_tokens": 60, "correction.explorer.anchor": "learner"})
    learner = load(config, learner_dir)
    batch = pack_step(made_up_groups(), config)
    learner.begin_step(batch)
    learner.update(batch.mini_batches[0])
    assert learner.end_step()["explorer/ratio_max"] == 1.0


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("tokens", "explorer", "learner_rows"), [(40, 1, 2), (120, 2, 6)])
def test_ranks_share_the_packed_rows(
    tiny_config, made_up_groups, learner_dir, world_size, tokens, explorer, learner_rows
):
    config = tiny_config({"learner.micro_batch_tokens": tokens})
    groups, gradients = made_up_groups(prompts=2, explorer=explorer, learner=learner_rows), []
    for size in (1, world_size):
        learner = load(config, learner_dir)
        batches = [pack_step(groups, config, rank=rank, world_size=size) for rank in range(size)]
        shares = [batch.mini_batches[0].micro_batches for batch in batches]
        assert len({len(share) for share in shares}) == 1
        for together in zip(*shares):
            assert len({micro.sources for micro in together}) == 1
            assert all(len(micro.sources) == 1 and micro.inputs["input_ids"].numel() <= tokens for micro in together)
        trained = [t for share in shares for micro in share for t in micro.target_T[micro.source_T != NO_SOURCE]]
        assert len(trained) == batches[0].num_tokens
        for batch in batches:
            learner.begin_step(batch)
            for micro in batch.mini_batches[0].micro_batches:
                outcome = policy_objective(learner.backend.forward, *learner._scored[micro.index], config)
                learner.backend.backward(outcome.loss, last=False)
        gradients.append(learner.backend.optimizer.gradient.clone())
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_budget_below_one_row_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"learner\.micro_batch_tokens = 20 cannot hold a row: use 28"):
        check_config(tiny_config({"learner.micro_batch_tokens": 20}))
    check_config(tiny_config({"learner.micro_batch_tokens": 28, "learner.micro_batch_rows": 64}), world_size=3)


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        ({"learner.offload": "optimizer"}, 1),
        ({"learner.offload": "parameters", "learner.backend": "deepspeed"}, 3),
        ({"learner.offload": "optimizer", "learner.backend": "deepspeed", "learner.zero_stage": 0}, 1),
    ],
)
def test_offload_without_the_stage_it_needs_is_refused(tiny_config, overrides, stage):
    with pytest.raises(ConfigError, match=rf"use learner\.backend=deepspeed learner\.zero_stage={stage}"):
        check_config(tiny_config(overrides))


def load(config, learner_dir):
    return Learner.load(config, model_dir=learner_dir, explorer_dir=None, world=WORLD)
