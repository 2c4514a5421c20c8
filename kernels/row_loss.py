"""The policy loss of each token and its derivative in closed form: what `reference.policy_loss` is to autograd.

The Triton kernels compute the same formulas (`kernels.tl_math`); this is the CPU production path.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.arguments import KL_BOUND, LOG_RATIO_BOUND, LossRows, LossSettings, Segments
from kernels.segments import segment_sum, sequence_total, spread


@dataclass(frozen=True)
class RowLoss:
    """Loss and slopes per token, all [T]. `slope` is ∂loss_t/∂logprob_t through the token itself.

    With a sequence ratio the tokens of a sequence share s: `shared` is ∂loss_t/∂log s and `share` is ∂log s/∂logprob_t.
    """

    loss: Tensor
    slope: Tensor
    metrics: dict[str, Tensor]
    shared: Tensor | None = None
    share: Tensor | None = None
    segments: Segments | None = None
    total: Callable[[Tensor, Segments], Tensor] = sequence_total

    def gradient(self, upstream: Tensor) -> Tensor:
        """∂(Σ_t upstream_t·loss_t)/∂logprob [T]; rows with upstream 0 get exactly 0 whatever their slopes hold."""
        gradient = weighted(upstream, self.slope)
        if self.shared is None:
            return gradient
        assert self.share is not None
        assert self.segments is not None
        return gradient + self.total(weighted(upstream, self.shared), self.segments) * self.share


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, and 0 where the weight is 0, even if the value is infinite or NaN."""
    return torch.where(weight != 0, weight * value, 0)


def row_loss(logprob: Tensor, rows: LossRows, settings: LossSettings) -> RowLoss:
    """Loss, slopes and metrics of each token; equations at `kernels.ops.policy_loss`."""
    dtype = logprob.dtype
    live = torch.ones_like(logprob, dtype=torch.bool) if rows.mask is None else rows.mask
    log_pi = torch.where(live, logprob, 0)
    advantage = torch.where(live, rows.advantage.to(dtype), 0)
    raw = log_pi - torch.where(live, rows.anchor.to(dtype), 0)
    log_ratio = raw.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # Negated, so that a NaN reaches the gradient as well as the loss.
    free = ~(raw.abs() > LOG_RATIO_BOUND) & live
    share = None
    if settings.ratio == "sequence":
        assert rows.segments is not None
        count = segment_sum(live.to(dtype), rows.segments).clamp_(min=1)
        log_ratio = spread(segment_sum(log_ratio, rows.segments) / count, rows.segments)
        share = free / spread(count, rows.segments)

    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    policy, slope, flags = _surrogate(ratio, clipped, advantage, log_pi, settings)
    if rows.is_weight is not None:
        weight = rows.is_weight.to(dtype)
        policy, slope = weighted(weight, policy), weighted(weight, slope)
    if settings.ratio == "token":
        slope = torch.where(free, slope, 0)
    kl, kl_loss, kl_slope = _kl(log_pi, rows, live, settings)
    metrics = {"ratio": ratio, **flags, "kl": kl}
    metrics = {name: torch.where(live, value, 0).float() for name, value in metrics.items()}
    loss = torch.where(live, policy, 0) + kl_loss
    if share is None:
        return RowLoss(loss, torch.where(live, slope, 0) + kl_slope, metrics)
    return RowLoss(loss, kl_slope, metrics, torch.where(live, slope, 0), share, rows.segments)


def _surrogate(
    ratio: Tensor, clipped: Tensor, advantage: Tensor, log_pi: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The clipped surrogate, its derivative in the log-ratio (in logprob for cispo), and the clip flags."""
    negative = advantage < 0
    below, above = ratio < clipped, ratio > clipped
    if settings.ratio == "cispo":
        slope = -clipped * advantage
        flags = {"clipped_low": below, "clipped_high": above, "dual_clipped": torch.zeros_like(below)}
        return slope * log_pi, slope, flags
    dual = negative & (ratio > settings.dual_clip)
    low, high = negative & below, (advantage > 0) & above
    value = torch.where(dual, settings.dual_clip, torch.where(low | high, clipped, ratio))
    slope = torch.where(dual | low | high, 0, -advantage * ratio)
    return -advantage * value, slope, {"clipped_low": low, "clipped_high": high, "dual_clipped": dual}


def _kl(log_pi: Tensor, rows: LossRows, live: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    """The k3 estimate, β·kl_weight times it, and that product's derivative in logprob."""
    still = torch.zeros_like(log_pi)
    if rows.ref is None:
        return still, still, still
    scale = torch.full_like(log_pi, settings.kl_coef)
    on = live
    if rows.kl_weight is not None:
        scale, on = scale * rows.kl_weight.to(log_pi.dtype), live & (rows.kl_weight != 0)
    raw = torch.where(on, rows.ref.to(log_pi.dtype) - log_pi, 0)
    gap = raw.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    grown = gap.expm1()
    kl = (grown - gap).clamp(max=KL_BOUND)
    free = ~((raw.abs() > LOG_RATIO_BOUND) | (grown - gap > KL_BOUND)) & on
    return kl, torch.where(on, scale * kl, 0), torch.where(free, -scale * grown, 0)
