import math

import numpy as np
import pytest
import torch

from core.config import Config, Correction, Explorer, SourceCorrection
from core.schema import Source
from trainer.loss_metrics import MAXIMA, SUMS, Tally, measure
from trainer.micro_batch import MicroBatch
from trainer.objective import Outcome, Scores

OLD = (-1.0, -2.0, -0.5, -1.5, -3.0)
NOW = (-1.1, -1.8, -0.4, -1.6, -2.0)
MU = (-1.2, -1.0, -0.5, -2.5, -3.5)
SOURCE = (0, 0, 1, 1, 1)
IN_LOSS = (1, 0, 1, 1, 1)


def micro_batch():
    zeros = torch.zeros(5)
    return MicroBatch(
        index=0,
        sources=frozenset(Source),
        inputs={"input_ids": torch.zeros(1, 6, dtype=torch.int64)},
        state_T=torch.arange(5),
        target_T=torch.zeros(5, dtype=torch.int64),
        row_T=torch.zeros(5, dtype=torch.int64),
        start_R1=torch.tensor([0, 5], dtype=torch.int32),
        source_T=torch.tensor(SOURCE),
        advantage_T=zeros,
        sampler_T=torch.tensor(MU),
        explorer_share_T=zeros,
        token_weight_T=0.2 * torch.tensor(IN_LOSS),
        current_T=torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]),
    )


def measured():
    """Explorer rows are not scored by the learner, learner rows are."""
    scores = Scores(
        anchor_T=torch.tensor(OLD),
        is_weight_T=torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0]),
        ref_T=torch.zeros(5),
        kl_weight_T=(torch.tensor(SOURCE) == 1).float(),
        old_T=torch.tensor(OLD),
    )
    outcome = Outcome(
        loss=torch.tensor(0.0),
        logprob_T=torch.tensor(NOW),
        entropy_T=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
        metrics={
            "ratio": torch.tensor([1.3, 0.0, 1.0, 0.7, 4.0]),
            "clipped_low": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]),
            "clipped_high": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]),
            "dual_clipped": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
            "kl": torch.tensor([9.0, 9.0, 0.2, 0.4, 0.6]),
        },
    )
    correction = Correction(
        explorer=SourceCorrection(anchor="sampler", weight="none"),
        learner=SourceCorrection(anchor="learner", weight="token_tis"),
    )
    return tuple(tensor.numpy() for tensor in measure(micro_batch(), scores, outcome, correction))


def test_one_update_by_hand():
    tally = Tally(Config())
    tally.add(*measured(), first_visit=True, num_tokens=10)
    metrics = tally.metrics()
    explorer = [n - m for n, m in zip(NOW[:2], MU[:2])]
    learner = [o - m for o, m in zip(OLD[2:], MU[2:])]
    for source, log_ratios in (("explorer", explorer), ("learner", learner)):
        w = [math.exp(d) for d in log_ratios]
        assert metrics[f"{source}/ess"] == pytest.approx(sum(w) ** 2 / (len(w) * sum(x * x for x in w)))
        assert metrics[f"{source}/kl_k1"] == pytest.approx(-sum(log_ratios) / len(w))
        assert metrics[f"{source}/kl_k3"] == pytest.approx(sum(math.exp(d) - d - 1 for d in log_ratios) / len(w))
    expected = {
        "explorer/ratio_mean": 1.3,  # the row outside of the loss does not count
        "explorer/ratio_max": 1.3,
        "learner/ratio_mean": 5.7 / 3,
        "learner/ratio_max": 4.0,
        "explorer/clip_fraction": 1.0,
        "learner/clip_fraction": 2 / 3,
        "explorer/weight_mean": 1.0,
        "learner/weight_mean": 1.0,
        "explorer/masked_fraction": 0.0,
        "learner/masked_fraction": 1 / 3,
        "clip_ratio/low_mean": 1 / 4,
        "clip_ratio/high_mean": 1 / 4,
        "clip_ratio/region_mean": 2 / 4,
        "kl": 0.4,
        "entropy": 0.3,
        "sampling/sampling_logp_difference/mean": 1.5 / 3,
        "sampling/sampling_logp_difference/max": 1.0,
        "sampling/sampling_logp_difference/current_max": 0.5,
        "tokens/computed": 5 / 10,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_later_updates_count_for_clipping_only():
    sums, maxima = measured()
    tally = Tally(Config())
    tally.add(sums, maxima, first_visit=True, num_tokens=10)
    first = tally.metrics()
    tally.add(3 * sums, 5 * maxima, first_visit=True, num_tokens=10)
    later = tally.metrics()
    assert later["learner/ratio_mean"] == first["learner/ratio_mean"]
    assert later["learner/ratio_max"] == first["learner/ratio_max"]
    assert later["sampling/sampling_logp_difference/max"] == pytest.approx(5.0)
    only_clipped = np.zeros_like(sums)
    for name in ("tokens", "live", "clipped", "low", "region"):
        only_clipped[:, SUMS.index(name)] = 100.0
    tally.add(only_clipped, maxima, first_visit=False, num_tokens=10)
    last = tally.metrics()
    assert last["learner/clip_fraction"] > 0.9
    for name in ("ratio_mean", "ess", "kl_k1", "weight_mean"):
        assert last[f"learner/{name}"] == later[f"learner/{name}"]


def test_the_ratio_is_that_of_the_first_update_with_the_source():
    sums, maxima = measured()
    explorer_only, learner_only = sums.copy(), sums.copy()
    explorer_only[1], learner_only[0] = 0, 0
    tally = Tally(Config())
    tally.add(explorer_only, maxima * [[1], [0]], first_visit=True, num_tokens=10)
    assert not [name for name in tally.metrics() if name.startswith("learner/")]
    tally.add(learner_only, maxima * [[0], [1]], first_visit=True, num_tokens=10)
    metrics = tally.metrics()
    assert (metrics["explorer/ratio_mean"], metrics["learner/ratio_mean"]) == pytest.approx((1.3, 1.9))
    assert metrics["learner/ratio_max"] == maxima[1, MAXIMA.index("ratio")]


def test_what_was_not_measured_is_absent_and_not_0():
    assert Tally(Config()).metrics() == {}
    tally = Tally(Config())
    tally.add(*(np.zeros_like(array) for array in measured()), first_visit=True, num_tokens=10)
    assert tally.metrics() == {"tokens/computed": 0.0}  # every row was skipped
    sums, maxima = measured()
    sums[1] = 0.0  # α = 1: the penalty reaches learner rows only
    tally.add(sums, maxima, first_visit=True, num_tokens=10)
    metrics = tally.metrics()
    assert "kl" not in metrics
    assert metrics["entropy"] == pytest.approx(0.15)


def test_a_source_whose_rows_all_left_the_loss_has_no_ratio():
    sums, maxima = measured()
    for name in ("live", "ratio", "low", "high", "region", "clipped"):
        sums[0, SUMS.index(name)] = 0.0
    tally = Tally(Config())
    tally.add(sums, maxima, first_visit=True, num_tokens=10)
    metrics = tally.metrics()
    assert not {"explorer/ratio_mean", "explorer/ratio_max", "explorer/clip_fraction"} & metrics.keys()
    assert {"explorer/ess", "explorer/weight_mean", "learner/ratio_max"} <= metrics.keys()


def test_without_scores_the_gap_to_the_sampler_is_that_of_the_first_update():
    """Later updates see π_θ, which moved: that is no sign of stale weights."""
    sums, maxima = measured()
    moved = sums.copy()
    moved[:, SUMS.index("gap")] += 100.0
    for weight, expected in (("token_tis", (sums + moved, 7.0)), ("none", (sums, 1.0))):
        learner = SourceCorrection(anchor="sampler", weight=weight)
        tally = Tally(Config(correction=Correction(learner=learner)))
        tally.add(sums, maxima, first_visit=True, num_tokens=10)
        tally.add(moved, 7 * maxima, first_visit=True, num_tokens=10)
        metrics = tally.metrics()
        gap, tokens = (expected[0][1, SUMS.index(name)] for name in ("gap", "tokens"))
        assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap / tokens)
        assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(expected[1])


def test_a_truncated_sampler_is_compared_with_nothing():
    explorer = Explorer(top_p=0.9)
    tally = Tally(Config(explorer=explorer))
    tally.add(*measured(), first_visit=True, num_tokens=10)
    metrics = tally.metrics()
    assert not {"explorer/ess", "explorer/kl_k1", "explorer/kl_k3"} & metrics.keys()
    assert {"explorer/ratio_mean", "explorer/weight_mean", "learner/ess", "learner/kl_k1"} <= metrics.keys()
