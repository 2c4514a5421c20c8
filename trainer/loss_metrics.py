"""What every update measures, per source, as sums that add over micro-batches, ranks and updates.

Shape suffixes: T packed completion tokens, S sources (explorer, learner), K summed columns, M maximised columns. Sums
are fp64 tensors on the device until one copy per update; after that, numpy.

Two passes give different numbers, so they are kept apart: clipping and KL are means over all updates; weights, ESS
and KL to the sampler are those of the first visit to each row; the ratio is that of the first update that holds the
source. Rows that are not computed (learner.skip_zero_gradient) count in none of them but `tokens/computed`. A number
that nothing was measured for is left out: 0 would be a value.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from core.config import Config, Correction, full_support
from core.schema import Source
from trainer.correction import log_ratio
from trainer.micro_batch import SOURCES, MicroBatch
from trainer.objective import Outcome, Scores, scored_by_learner

SUMS = (
    "tokens",  # of all rows that were computed
    "live",  # of rows in the loss
    "ratio",
    "low",
    "high",
    "region",  # low or high
    "clipped",  # low, high or dual: no gradient from the ratio
    "kl_tokens",
    "kl",
    "entropy",
    "weight",
    "masked",  # tokens whose correction weight is 0
    "importance",  # w = π/μ, for the effective sample size
    "importance_squared",
    "k1",
    "k3",
    "gap",  # |log π − log μ|
    "current",  # sampled by π_old's own weights
)
MAXIMA = ("ratio", "gap", "current_gap")


def measure(batch: MicroBatch, scores: Scores, outcome: Outcome, correction: Correction) -> tuple[Tensor, Tensor]:
    """Sums [S, K] and maxima [S, M] of one backward pass.

    Against the sampler, x ~ μ, with d = log π − log μ:  k1 = −d and k3 = exp(d) − d − 1 both estimate KL(μ‖π). π is
    π_old where the source's correction scores it, else π_θ of this update.
    """
    policy_T = outcome.logprob_T
    if scores.old_T is not None:
        policy_T = torch.where(scored_by_learner(correction, batch), scores.old_T, policy_T)
    d_T = log_ratio(policy_T, batch.sampler_T).double()
    live_T = batch.token_weight_T != 0
    weight_T = torch.ones_like(policy_T) if scores.is_weight_T is None else scores.is_weight_T
    low_T, high_T = outcome.metrics["clipped_low"] != 0, outcome.metrics["clipped_high"] != 0
    has_kl_T = torch.zeros_like(live_T)
    if scores.ref_T is not None:
        has_kl_T = live_T if scores.kl_weight_T is None else live_T & (scores.kl_weight_T != 0)
    ratio_T = torch.where(live_T, outcome.metrics["ratio"], 0)
    gap_T, current_T = (policy_T - batch.sampler_T).abs(), batch.current_T != 0
    columns = {
        "tokens": torch.ones_like(policy_T),
        "live": live_T,
        "ratio": ratio_T,
        "low": live_T & low_T,
        "high": live_T & high_T,
        "region": live_T & (low_T | high_T),
        "clipped": live_T & (low_T | high_T | (outcome.metrics["dual_clipped"] != 0)),
        "kl_tokens": has_kl_T,
        "kl": torch.where(has_kl_T, outcome.metrics["kl"], 0),
        "entropy": outcome.entropy_T,
        "weight": weight_T,
        "masked": weight_T == 0,
        "importance": d_T.exp(),
        "importance_squared": (2 * d_T).exp(),
        "k1": -d_T,
        "k3": d_T.expm1() - d_T,
        "gap": gap_T,
        "current": current_T,
        "current_gap": torch.where(current_T, gap_T, 0),
    }
    values_KT = torch.stack([columns[name].double() for name in SUMS])
    maxima_MT = torch.stack([columns[name].double() for name in MAXIMA])
    of_source_ST = torch.stack([batch.source_T == position for position in range(len(SOURCES))])
    sums_SK = torch.where(of_source_ST[:, None], values_KT, 0).sum(-1)
    maxima_SM = torch.where(of_source_ST[:, None], maxima_MT, 0).amax(-1)
    return sums_SK, maxima_SM


def over_ranks(measured_NK: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """Of [loss, sums, maxima] of N ranks: loss and sums [S, K] added up in their order, and the maxima [S, M] of all.

    Example: loss, sums, maxima = over_ranks(world.gathered(torch.cat([loss, sums.flatten(), maxima.flatten()])))
    """
    values_NK = measured_NK.cpu().numpy()
    size = 1 + 2 * len(SUMS)
    added_K, maxima_K = values_NK[:, :size].sum(0), values_NK[:, size:].max(0)
    return float(added_K[0]), added_K[1:].reshape(2, len(SUMS)), maxima_K.reshape(2, len(MAXIMA))


class Tally:
    """One step's sums, by the pass they belong to. All arrays are [S, K] or [S, M], fp64."""

    def __init__(self, config: Config) -> None:
        self.config = config
        shape, maxima_shape = (len(SOURCES), len(SUMS)), (len(SOURCES), len(MAXIMA))
        self.every_update, self.first_visit, self.first_update = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.first_visit_maxima, self.first_update_maxima = np.zeros(maxima_shape), np.zeros(maxima_shape)
        self.num_tokens = 0

    def add(self, sums: np.ndarray, maxima: np.ndarray, *, first_visit: bool, num_tokens: int) -> None:
        """Count one update of `num_tokens` completion tokens, computed or not; `first_visit` where its mini-batch
        trains for the first time in this step."""
        self.every_update += sums
        if not first_visit:
            return
        self.num_tokens += num_tokens
        unseen = self.first_update[:, SUMS.index("tokens")] == 0
        self.first_update[unseen], self.first_update_maxima[unseen] = sums[unseen], maxima[unseen]
        self.first_visit += sums
        self.first_visit_maxima = np.maximum(self.first_visit_maxima, maxima)

    def metrics(self) -> dict[str, float]:
        """The step's numbers by the names of metrics.jsonl; a source without rows has none."""
        computed = self.first_visit[:, SUMS.index("tokens")].sum()
        metrics = overall_metrics(self.every_update) | _means({"tokens/computed": (computed, self.num_tokens)})
        for position, source in enumerate(SOURCES):
            every, first, ratio = (
                dict(zip(SUMS, table[position])) for table in (self.every_update, self.first_visit, self.first_update)
            )
            found = _means(
                {
                    "ratio_mean": (ratio["ratio"], ratio["live"]),
                    "clip_fraction": (every["clipped"], every["live"]),
                    "masked_fraction": (first["masked"], first["tokens"]),
                    "weight_mean": (first["weight"], first["tokens"]),
                }
            )
            if ratio["live"]:
                found["ratio_max"] = float(self.first_update_maxima[position, MAXIMA.index("ratio")])
            if not _renormalised(self.config, source):
                found |= _against_sampler(first)
            metrics |= {f"{source}/{name}": value for name, value in found.items()}
        return metrics | self._sampling_gap()

    def _sampling_gap(self) -> dict[str, float]:
        """|log π_old − log μ| of learner rows. Where no pass scores π_old, only the first update's π_θ is π_old."""
        scored, learner = self.config.correction.learner.needs_old, SOURCES.index(Source.LEARNER)
        sums, maxima = (
            (self.first_visit, self.first_visit_maxima) if scored else (self.first_update, self.first_update_maxima)
        )
        gap = dict(zip(SUMS, sums[learner]))
        if not gap["tokens"] or _renormalised(self.config, Source.LEARNER):
            return {}
        highest = dict(zip(MAXIMA, maxima[learner]))
        found = {"mean": float(gap["gap"] / gap["tokens"]), "max": float(highest["gap"])}
        if gap["current"]:
            found["current_max"] = float(highest["current_gap"])
        return {f"sampling/sampling_logp_difference/{name}": value for name, value in found.items()}


def overall_metrics(sums_SK: np.ndarray) -> dict[str, float]:
    """KL, entropy and clip fractions over all sources."""
    total = dict(zip(SUMS, sums_SK.sum(0)))
    return _means(
        {
            "kl": (total["kl"], total["kl_tokens"]),
            "entropy": (total["entropy"], total["tokens"]),
            "clip_ratio/low_mean": (total["low"], total["live"]),
            "clip_ratio/high_mean": (total["high"], total["live"]),
            "clip_ratio/region_mean": (total["region"], total["live"]),
        }
    )


def _against_sampler(first: Mapping[str, float]) -> dict[str, float]:
    """ESS = (Σw)² / (n Σw²) as a fraction of n tokens, KL estimates and weights."""
    count = first["tokens"]
    spread = count * first["importance_squared"]
    return _means(
        {"ess": (first["importance"] ** 2, spread), "kl_k1": (first["k1"], count), "kl_k3": (first["k3"], count)}
    )


def _renormalised(config: Config, source: Source) -> bool:
    """μ is over other tokens than π: no ratio and no difference of the two means anything."""
    return not full_support(config.explorer if source is Source.EXPLORER else config.rollout)


def _means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """total / count of each (total, count), without those that count nothing."""
    return {name: float(total / count) for name, (total, count) in sums.items() if count}
