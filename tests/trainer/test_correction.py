import math

import pytest
import torch

from core.config import Config, Correction, SourceCorrection
from core.configcheck import check_config
from core.configeffect import effect_problems
from trainer.correction import (
    LUFFY_GAMMA,
    WEIGHTS,
    Evidence,
    correction_weight,
    needs_explorer_scores,
)

LENGTHS = (3, 1, 4)
OLD = (-0.1, -2.0, -3.5, -0.7, -1.0, -0.2, -5.0, -0.05)
MU = (-0.3, -1.0, -5.5, -0.7, -4.0, -0.1, -1.0, -0.5)
OMEGA = (-1.3, -0.4, -2.5, -2.7, -0.9, -6.1, -3.0, -0.1)
ADVANTAGE = (1.0, 1.0, 1.0, -1.0, -2.0, -2.0, -2.0, -2.0)
ROW = (0, 0, 0, 1, 2, 2, 2, 2)


def evidence(*, share=0.5, explorer=None, old=OLD, mu=MU):
    return Evidence(
        old_T=torch.tensor(old),
        sampler_T=torch.tensor(mu),
        explorer_T=None if explorer is None else torch.tensor(explorer),
        explorer_share_T=torch.full((8,), share),
        advantage_T=torch.tensor(ADVANTAGE),
        row_T=torch.tensor(ROW),
        length_R=torch.tensor(LENGTHS),
    )


def weight(name, given=None, **settings):
    correction = SourceCorrection(anchor="learner", weight=name, **settings)
    return correction_weight(correction, given or evidence()).tolist()


def row_sums():
    return [sum(o - m for o, m, row in zip(OLD, MU, ROW) if row == r) for r in range(3)]


def test_none_is_one():
    assert weight("none") == [1.0] * 8


def test_token_tis_is_the_capped_ratio():
    assert weight("token_tis", cap=2.0) == pytest.approx([min(math.exp(o - m), 2.0) for o, m in zip(OLD, MU)])


def test_icepop_is_zero_outside_the_band():
    ratios = [math.exp(o - m) for o, m in zip(OLD, MU)]
    expected = [r if 0.5 <= r <= 5.0 else 0.0 for r in ratios]
    assert 0.0 in expected
    assert weight("icepop", low=0.5, high=5.0) == pytest.approx(expected)


def test_sequence_tis_is_the_capped_product_on_every_token_of_the_row():
    expected = [min(math.exp(row_sums()[row]), 2.0) for row in ROW]
    assert weight("sequence_tis", cap=2.0) == pytest.approx(expected)


def test_geometric_mask_keeps_rows_whose_mean_ratio_is_in_the_band():
    means = [math.exp(total / length) for total, length in zip(row_sums(), LENGTHS)]
    assert [0.9 <= mean <= 1.1 for mean in means] == [False, True, False]
    assert weight("geometric_mask", low=0.9, high=1.1) == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_mixture_is_the_balance_heuristic_and_bounded(share):
    for explorer, omega in ((None, MU), (OMEGA, OMEGA)):  # explorer rows take π_ω from μ, learner rows from the scores
        expected = [math.exp(o) / (share * math.exp(w) + (1 - share) * math.exp(o)) for o, w in zip(OLD, omega)]
        found = weight("mixture", evidence(share=share, explorer=explorer), cap=0.01)
        assert found == pytest.approx(expected)
        assert max(found) <= 1 / (1 - share) * (1 + 1e-6)


def test_mixture_of_an_all_explorer_group_is_the_capped_ratio():
    expected = [min(math.exp(o - m), 2.0) for o, m in zip(OLD, MU)]
    assert weight("mixture", evidence(share=1.0), cap=2.0) == pytest.approx(expected)


def test_luffy_is_the_gradient_factor_of_its_shaped_probability():
    log_p = torch.tensor(OLD, dtype=torch.float64, requires_grad=True)
    shaped = log_p.exp() / (log_p.exp() + LUFFY_GAMMA)
    (gradient,) = torch.autograd.grad(shaped.sum(), log_p)  # d f(π) / d log π
    assert weight("luffy") == pytest.approx(gradient.tolist())


def test_topr_tapers_only_negative_rows():
    taper = [min(math.exp(total), 1.0) for total in row_sums()]
    expected = [1.0 if a >= 0 else taper[row] for a, row in zip(ADVANTAGE, ROW)]
    assert weight("topr") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["token_tis", "icepop", "sequence_tis", "geometric_mask", "mixture", "topr"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_log_ratios_stay_finite(name, sign):
    given = evidence(
        old=tuple(-1.0 if sign > 0 else -5000.0 for _ in OLD), mu=tuple(-5000.0 if sign > 0 else -1.0 for _ in MU)
    )
    assert all(math.isfinite(value) for value in weight(name, given, cap=1e9, low=0.0, high=1e9))


@pytest.mark.parametrize("name", ["token_tis", "icepop", "sequence_tis", "geometric_mask", "mixture", "topr"])
def test_on_policy_rows_weigh_exactly_one(name):
    assert weight(name, evidence(mu=OLD)) == [1.0] * 8


@pytest.mark.parametrize("bound", ["cap", "low", "high"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_bound_that_is_refused_as_idle_is_one_that_the_weight_does_not_read(name, bound):
    given, wide = evidence(share=1.0), {"cap": 1e9, "low": 0.0, "high": 1e9}
    narrow = {bound: {"cap": 0.01, "low": 0.99, "high": 0.01}[bound]}
    reads = weight(name, given, **wide | narrow) != weight(name, given, **wide)
    settings = SourceCorrection(anchor="learner", weight=name, **narrow)
    config = Config(correction=Correction(explorer=settings))
    assert any(f"explorer.{bound} = " in problem for problem in effect_problems(config)) is not reads


@pytest.mark.parametrize(
    ("anchor", "name", "expected"),
    [("sampler", "none", False), ("learner", "none", True), ("sampler", "token_tis", True), ("sampler", "luffy", True)],
)
def test_which_rows_need_the_old_policy(anchor, name, expected):
    assert SourceCorrection(anchor=anchor, weight=name).needs_old is expected


def test_only_mixture_on_learner_rows_needs_the_explorer(tiny_config):
    assert not needs_explorer_scores(tiny_config({"correction.explorer.weight": "mixture"}).correction)
    assert needs_explorer_scores(tiny_config({"correction.learner.weight": "mixture"}).correction)


RECOMPUTED = {"correction.explorer.anchor": "learner", "correction.learner.weight": "none"}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"explorer.top_p": 0.95}, ("explorer.top_p = 0.95", "correction.explorer.anchor")),
        ({"explorer.top_k": 20}, ("explorer.top_k = 20", "correction.explorer.anchor")),
        (RECOMPUTED | {"explorer.top_p": 0.9, "correction.explorer.weight": "topr"}, ("explorer.top_p", "topr")),
        (RECOMPUTED | {"explorer.top_p": 0.9, "correction.learner.weight": "mixture"}, ("explorer.top_p", "mixture")),
        ({"rollout.top_p": 0.9}, ("rollout.top_p = 0.9", "correction.learner.weight")),
    ],
)
def test_a_ratio_to_truncated_log_probs_is_refused_by_key(tiny_config, overrides, names):
    with pytest.raises(ValueError) as caught:
        check_config(tiny_config(overrides))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"explorer.temperature": 0.7, "rollout.temperature": 1.5},  # μ is whatever sampled: the ratio is exact
        RECOMPUTED | {"explorer.top_p": 0.95},
        RECOMPUTED | {"explorer.top_k": 20, "correction.explorer.weight": "luffy"},
        {"algorithm.anneal_steps": 0, "explorer.top_p": 0.95},  # plain GRPO asks nothing of the explorer
        {"correction.learner.weight": "none", "rollout.top_p": 0.9},
    ],
)
def test_ratios_of_one_kind_pass(tiny_config, overrides):
    config = tiny_config(overrides)
    check_config(config)
    assert config.correction.learner.needs_old
