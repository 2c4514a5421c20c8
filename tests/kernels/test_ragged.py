"""Sums over sequences, group advantages, packing: each Triton kernel against its plain twin, and both against loops."""

import pytest
import torch

from kernels.arguments import Segments
from kernels.group_advantage import group_advantage
from kernels.packing import pack, sequence_sum, unpack
from kernels.ragged_triton import TOKEN_BLOCK

BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])
LENGTHS = [[], [0], [1], [0, 5, 0, 0, 3, 0], [TOKEN_BLOCK + 3, 1, 2 * TOKEN_BLOCK]]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@BOTH
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequence_sum(impl, lengths):
    values = torch.randn(sum(lengths))
    wanted = torch.tensor([float(part.double().sum()) for part in values.split(lengths)])
    torch.testing.assert_close(sequence_sum(values, bounds(lengths), impl=impl), wanted, atol=1e-4, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("lengths", LENGTHS)
def test_unpack_puts_each_sequence_in_its_row(impl, lengths):
    values = torch.randn(sum(lengths))
    rows = unpack(values, bounds(lengths), width=max(lengths, default=0) + 2, fill=-7.0, impl=impl)
    assert rows.shape == (len(lengths), max(lengths, default=0) + 2)
    for row, part in zip(rows, values.split(lengths)):
        assert torch.equal(row[: len(part)], part)
        assert bool((row[len(part) :] == -7).all())


def test_unpack_refuses_a_width_that_would_cut():
    with pytest.raises(ValueError, match="at least the longest sequence, 5"):
        unpack(torch.zeros(5), torch.tensor([0, 5]), width=4)


@BOTH
@pytest.mark.parametrize("shape", [[], [(1, 0)], [(2, 3), (1, 0), (4, 1)], [(TOKEN_BLOCK, 40), (3, TOKEN_BLOCK)]])
def test_pack_finds_the_predictor_of_every_answer_token(impl, shape):
    lengths = [prompt + answer for prompt, answer in shape]
    tokens = torch.randint(0, 1000, (sum(lengths),))
    packed = pack(tokens, bounds(lengths), torch.tensor([p for p, _ in shape], dtype=torch.int64), impl=impl)
    rows, owner, positions, start = [], [], [], 0
    for s, (prompt, answer) in enumerate(shape):
        rows += [start + prompt + k - 1 for k in range(answer)]
        owner += [s] * answer
        positions += range(prompt + answer)
        start += prompt + answer
    assert packed.rows.tolist() == rows
    assert packed.owner.tolist() == owner
    assert packed.positions.tolist() == positions
    assert packed.targets.tolist() == [int(tokens[row + 1]) for row in rows]
    assert packed.cu_answers.tolist() == bounds([a for _, a in shape]).tolist()


def test_pack_refuses_a_prompt_that_nothing_predicts():
    with pytest.raises(ValueError, match="between 1 and the sequence's length"):
        pack(torch.arange(3), torch.tensor([0, 3]), torch.tensor([0]))


@BOTH
@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_advantage_and_its_keep_list(impl, scale):
    groups = [[1.0, 0.0, 0.0], [], [0.3] * 7, [2.0], [0.0], [5.0, 5.0, 6.0, 5.0]]
    rewards = torch.tensor([r for group in groups for r in group])
    out = group_advantage(rewards, bounds([len(g) for g in groups]), scale=scale, impl=impl)
    wanted = []
    for group in groups:
        r = torch.tensor(group, dtype=torch.float64)
        mean, std = (r.mean(), r.std()) if len(group) > 1 else (0.0, 1.0)
        constant = len(set(group)) == 1 and len(group) > 1
        wanted.append(r * 0 if constant else (r - mean) / (std + 1e-6 if scale == "std" else 1.0))
    torch.testing.assert_close(out.advantage.double(), torch.cat(wanted), atol=1e-6, rtol=1e-5)
    assert not out.advantage[3:10].any()
    assert out.kept.tolist() == [3, 0, 0, 1, 0, 4]
    count = int(out.kept.sum())
    assert out.rows[:count].tolist() == [0, 1, 2, 10, 12, 13, 14, 15]
    assert out.rows[count:].tolist() == [-1] * 8


@BOTH
def test_no_groups_at_all(impl):
    out = group_advantage(torch.zeros(0), torch.tensor([0]), impl=impl)
    assert [len(part) for part in out] == [0, 0, 0]


def test_group_advantage_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="std or none"):
        group_advantage(torch.zeros(2), torch.tensor([0, 2]), scale="mad")


@pytest.mark.parametrize(
    "bad", [torch.tensor([1, 2]), torch.tensor([0, 3]), torch.tensor([0, 2, 1, 2]), torch.zeros(2)]
)
def test_bounds_that_do_not_cover_the_tokens_are_refused(bad):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        Segments.of(bad, 2, torch.device("cpu"))
