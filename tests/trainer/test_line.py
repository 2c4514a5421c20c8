"""Rows of one prompt share its tokens in a line, and train as rows by themselves."""

import numpy as np
import pytest
import torch
from decoders import FAMILIES, SHAPE, build, close
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.attention import use_packed_attention
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.line import lay_out
from trainer.packing import QUADRATIC_TOKENS, Extent, pack_rows
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
# Lengths of a prompt and of its completions, prompt by prompt.
CASES = {
    "one prompt": [(5, [3, 1, 7])],
    "several prompts": [(5, [3, 1, 7]), (1, [2, 4]), (9, [1]), (2, [6, 6, 6, 1])],
    "nothing to share": [(4, [3]), (1, [2, 5])],
    "long rows": [(140, [3, 20]), (2, [150, 1])],
}


def make_rows(case):
    generator = np.random.default_rng(len(case))
    rows = []
    for prompt, completions in case:
        ids = tuple(generator.integers(0, SHAPE["vocab_size"], prompt).tolist())
        rows += [(ids, generator.integers(0, SHAPE["vocab_size"], size).astype(np.int32)) for size in completions]
    return rows


def test_a_line_by_hand():
    rows = [((5, 6, 7), np.array([8, 9])), ((5, 6, 7), np.array([1])), ((4,), np.array([2, 3]))]
    line = lay_out(rows, share=True)
    inputs = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in line.inputs.items()}
    assert inputs == {
        #             shared  first row  second  third
        "input_ids": [[5, 6, 7, 8, 7, 4, 2]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1]],
        "cu_seq_lens_q": [0, 2, 4, 5, 7],
        "cu_seq_lens_k": [0, 2, 6, 9, 11],
        "key_index": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6],
        "max_length_q": 2,
        "max_length_k": 4,
    }
    assert line.state_T.tolist() == [2, 3, 4, 5, 6]
    alone = lay_out(rows, share=False)
    assert alone.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 7, 4, 2]]
    assert "key_index" not in alone.inputs
    assert torch.equal(alone.inputs["cu_seq_lens_q"], alone.inputs["cu_seq_lens_k"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "checkpointing", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.float64, False, 1e-12)],
)
def test_rows_that_share_a_prompt_are_rows_by_themselves(family, case, dtype, checkpointing, tolerance):
    alone, packed = build(family, dtype), build(family, dtype)
    use_packed_attention(packed)
    if checkpointing:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        packed.train()
    rows = make_rows(CASES[case])
    line = lay_out(rows, share=True)
    found = packed.get_decoder()(**line.inputs, use_cache=False).last_hidden_state[0][torch.from_numpy(line.state_T)]
    expected = []
    for prompt, tokens in rows:
        ids = torch.tensor([[*prompt, *tokens.tolist()]])
        states = alone.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected.append(states[len(prompt) - 1 : -1])
    expected = torch.cat(expected)
    assert close(found, expected, tolerance)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.get_decoder().parameters()]) for m in (packed, alone))
    # transformers' RMSNorm computes in float32 whatever it is given, and adds up a shared token's rows before it.
    assert close(ours, theirs, max(tolerance, 1e-7))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss.ratio": "sequence", "loss.aggregation": "sequence_mean", "rollout.temperature": 0.7},
        {"learner.gradient_checkpointing": True, "learner.kernels": "reference"},
        {"correction.learner.weight": "sequence_tis", "loss.kl_rows": "all"},
    ],
)
def test_training_with_shared_prompts_is_padded_training(tiny_config, made_up_groups, learner_dir, overrides):
    groups, found, sizes = made_up_groups(explorer=1, learner=5), [], []
    for packed in ({"learner.micro_batch_tokens": 0}, {"learner.share_prompts": False}, {}):
        config = tiny_config({"learner.micro_batch_tokens": 120, "learner.warmup_updates": 0, **packed, **overrides})
        learner = load(config, learner_dir)
        batch = pack_step(groups, config)
        learner.begin_step(batch)
        metrics = learner.update(batch.mini_batches[0])
        found.append((metrics, learner.backend.optimizer.gradient.clone()))
        sizes.append(sum(micro.inputs["input_ids"].numel() for micro in batch.mini_batches[0].micro_batches))
    assert sizes[2] < sizes[1] < sizes[0]
    padded, padded_gradient = found[0]
    for metrics, gradient in found[1:]:
        for name, value in padded.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert close(gradient, padded_gradient, 1e-6)


def test_ratios_on_policy_are_exactly_one(tiny_config, made_up_groups, learner_dir):
    config = tiny_config({"learner.micro_batch_tokens": 200, "correction.explorer.anchor": "learner"})
    learner = load(config, learner_dir)
    batch = pack_step(made_up_groups(), config)
    assert any("key_index" in micro.inputs for micro in batch.mini_batches[0].micro_batches)
    learner.begin_step(batch)
    learner.update(batch.mini_batches[0])
    metrics = learner.end_step()
    assert metrics["explorer/ratio_max"] == metrics["learner/ratio_max"] == 1.0


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=8)), min_size=1, max_size=8
    ),
    st.integers(60, 400),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_sharing_never_takes_longer_nor_more_memory(families, max_tokens, ranks):
    rows = [Extent(prompt + size, prompt, i) for i, (prompt, sizes) in enumerate(families) for size in sizes]
    bins = pack_rows(rows, max_tokens=max_tokens, ranks=ranks, share=True)
    assert sorted(row for members in bins for row in members) == list(range(len(rows)))
    assert all(sum(rows[i].length for i in members) <= max_tokens for members in bins)
    assert len(bins) % ranks == 0
    alone = pack_rows(rows, max_tokens=max_tokens, ranks=ranks)
    assert len(bins) == len(alone)
    assert time_of(bins, rows, ranks) <= time_of(alone, rows, ranks) + 1e-9


def test_whole_groups_stay_together_where_that_is_balanced():
    rows = [Extent(30, 14, family) for family in range(16) for _ in range(8)]
    bins = pack_rows(rows, max_tokens=2048, ranks=2, share=True)
    assert len(bins) == 2
    for members in bins:
        found = {rows[i].family: sum(rows[j].family == rows[i].family for j in members) for i in members}
        assert set(found.values()) == {8}


def test_groups_are_split_where_ranks_would_wait():
    rows = [Extent(100, 10, family) for family in range(3) for _ in range(8)]
    bins = pack_rows(rows, max_tokens=2048, ranks=4, share=True)
    assert [len(members) for members in bins] == [6, 6, 6, 6]


def time_of(bins, rows, ranks):
    """The largest costs of all rounds, where rows of one family in one bin compute their prompt once."""

    def cost(length):
        return length + length**2 / QUADRATIC_TOKENS

    def total(members):
        families = {rows[i].family: [j for j in members if rows[j].family == rows[i].family] for i in members}
        spared = sum((len(found) - 1) * cost(rows[found[0]].prompt) for found in families.values())
        return sum(cost(rows[i].length) for i in members) - spared

    costs = sorted(map(total, bins), reverse=True)
    return sum(costs[::ranks])


def load(config, learner_dir):
    return Learner.load(config, model_dir=learner_dir, explorer_dir=None, world=WORLD)
