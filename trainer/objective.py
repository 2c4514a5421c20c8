"""From a micro-batch and the model to log-probs, and to the loss (eq. 2 with per-source correction).

Shape suffixes: R rows, L longest row, T packed completion tokens, H hidden, V vocabulary. Logits [T, V] never exist:
every log-prob and the loss go through the fused head of `kernels.ops`, in scoring and in training alike, on
micro-batches of the same shape, so that an on-policy ratio is exactly 1.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from core.config import Config, Correction
from core.schema import Source
from kernels.arguments import Implementation
from trainer.correction import Evidence, correction_of, correction_weight
from trainer.micro_batch import SOURCES, MicroBatch


class Forward(Protocol):
    """A `kernels.head.LogprobModel`, or an engine around one that shards it."""

    def __call__(self, inputs: dict[str, Any], rows: Tensor, targets: Tensor, /, *args: Tensor, **options: Any) -> Any:
        """(logprob, entropy), or the outputs of `linear_policy_loss` where anchor and advantage are given."""


class Scores(NamedTuple):
    """What the loss of a micro-batch needs besides π_θ: fixed at the start of the step."""

    anchor_T: Tensor  # log of what the ratio divides by
    is_weight_T: Tensor | None  # None: 1 everywhere
    ref_T: Tensor | None  # log π_ref; None: no KL here
    kl_weight_T: Tensor | None  # multiplier of the KL term; None: 1 everywhere
    old_T: Tensor | None  # log π_old, where `is_old_T`; for metrics


class Outcome(NamedTuple):
    """One forward pass with the loss; all but the loss is detached."""

    loss: Tensor  # scalar, this micro-batch's share of the update's loss
    logprob_T: Tensor
    entropy_T: Tensor
    metrics: dict[str, Tensor]  # per token: ratio, clipped_low, clipped_high, dual_clipped, kl


@torch.no_grad()
def score(forward: Forward, batch: MicroBatch, *, temperature: float, impl: Implementation) -> Tensor:
    """log-prob of every completion token under the model at `temperature`, fp32 [T]."""
    logprob_T, _ = forward(batch.inputs, batch.state_T, batch.target_T, temperature=temperature, impl=impl)
    return logprob_T


def fix_scores(
    batch: MicroBatch, config: Config, *, old_T: Tensor | None, explorer_T: Tensor | None, ref_T: Tensor | None
) -> Scores:
    """Choose each row's anchor, and compute its weight, by the correction of its source.

    `explorer_T` is log π_ω scored at `explorer.temperature` (explorer rows use their μ instead); a pass that no row
    of the micro-batch needs is None.
    """
    anchor_T, is_weight_T = batch.sampler_T, None
    for position, source in enumerate(SOURCES):
        settings = correction_of(config.correction, source)
        if source not in batch.sources or not settings.needs_old:
            continue
        assert old_T is not None, f"{source} rows need π_old"
        selected_T = batch.source_T == position
        if settings.anchor == "learner":
            anchor_T = torch.where(selected_T, old_T, anchor_T)
        if settings.weight != "none":
            weight_T = correction_weight(settings, _evidence(batch, source, old_T, explorer_T))
            is_weight_T = torch.where(selected_T, weight_T, 1.0 if is_weight_T is None else is_weight_T)
    kl_weight_T = None
    if ref_T is not None and config.loss.kl_rows == "learner":
        kl_weight_T = (batch.source_T == SOURCES.index(Source.LEARNER)).float()
    return Scores(anchor_T, is_weight_T, ref_T, kl_weight_T, old_T)


def policy_objective(forward: Forward, batch: MicroBatch, scores: Scores, config: Config) -> Outcome:
    """This micro-batch's share of the update's loss, ready for its backward pass.

        Σ_t token_weight_t · (is_weight_t · clip_loss_t + β · kl_weight_t · k3_t − c · entropy_t)

    The shares of all micro-batches and ranks add up to the update's loss.
    """
    loss_settings = config.loss
    loss, logprob_T, entropy_T, metrics = forward(
        batch.inputs,
        batch.state_T,
        batch.target_T,
        scores.anchor_T,
        batch.advantage_T,
        is_weight=scores.is_weight_T,
        ref_logprob=scores.ref_T,
        clip_low=loss_settings.clip_low,
        clip_high=loss_settings.clip_high,
        dual_clip=loss_settings.dual_clip,
        kl_coef=loss_settings.kl_coef if scores.ref_T is not None else 0.0,
        entropy_coef=loss_settings.entropy_coef,
        token_weight=batch.token_weight_T,
        temperature=config.rollout.temperature,
        impl=config.learner.kernels,
        ratio=loss_settings.ratio,
        cu_seqlens=batch.start_R1 if loss_settings.ratio == "sequence" else None,
        kl_weight=scores.kl_weight_T,
    )
    return Outcome(loss, logprob_T.detach(), entropy_T.detach(), metrics)


def scored_by_learner(correction: Correction, batch: MicroBatch) -> Tensor:
    """bool [T]: tokens whose source asks for π_old."""
    flags = [correction_of(correction, source).needs_old for source in SOURCES] + [False]  # the last: NO_SOURCE = -1
    return torch.tensor(flags, device=batch.source_T.device)[batch.source_T]


def _evidence(batch: MicroBatch, source: Source, old_T: Tensor, explorer_T: Tensor | None) -> Evidence:
    return Evidence(
        old_T=old_T,
        sampler_T=batch.sampler_T,
        explorer_T=explorer_T if source is Source.LEARNER else None,
        explorer_share_T=batch.explorer_share_T,
        advantage_T=batch.advantage_T,
        row_T=batch.row_T,
        length_R=batch.start_R1.diff().to(old_T.device, torch.int64, non_blocking=True),
    )
