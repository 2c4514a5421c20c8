"""What the policy ratio divides by, and the detached weight on the loss, per source.

Shape suffixes: T completion tokens of a micro-batch, packed; R its rows. All log-probs are fp32 [T]. π_old is the
learner at the start of the step, μ the policy that sampled the row (π_ω for explorer rows).

Log-probs of the learner are always those at `rollout.temperature`, on explorer rows too: that is the distribution
that trains. μ is the distribution that sampled, at whatever temperature that was, so π/μ is the importance ratio even
where `explorer.temperature` differs. A truncated support (top_p, top_k) is different: μ is then renormalised over
tokens that the learner does not know, and no ratio to it is computed.

`anchor = "sampler"` already divides by μ: together with token_tis, icepop, sequence_tis, mixture or topr the same
discrepancy would be corrected twice, which core.configcheck refuses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core.config import Correction, SourceCorrection
from core.schema import Source

MAX_LOG_RATIO = 20.0
LUFFY_GAMMA = 0.1


class Evidence(NamedTuple):
    """What a weight is computed from.

    Example: Evidence(old_T=old, sampler_T=mu, explorer_T=None, explorer_share_T=share, advantage_T=a, row_T=row,
    length_R=n)
    """

    old_T: Tensor  # log π_old
    sampler_T: Tensor  # log μ
    explorer_T: Tensor | None  # log π_ω, scored; only `mixture` on learner rows needs it
    explorer_share_T: Tensor  # G_w / G of the row's group
    advantage_T: Tensor
    row_T: Tensor  # int64
    length_R: Tensor  # int64


def correction_of(correction: Correction, source: Source) -> SourceCorrection:
    """The settings of one source."""
    return correction.explorer if source is Source.EXPLORER else correction.learner


def needs_explorer_scores(correction: Correction) -> bool:
    """True where learner rows need the explorer's log-probs, and so the explorer's weights on the trainer."""
    return correction.learner.weight == "mixture"


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """log(numerator / denominator) of log-probs, clamped to ±20 so that its exponential is finite."""
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def correction_weight(settings: SourceCorrection, evidence: Evidence) -> Tensor:
    """The detached factor on each token's policy loss, fp32 [T], by `settings.weight` (c is the cap):

        none            1
        token_tis       min(ρ_t, c),  ρ_t = π_old/μ                                     (verl, AReaL)
        icepop          ρ_t inside [low, high], else 0
        sequence_tis    min(Π_t ρ_t, c) on every token of the row
        geometric_mask  1 where low ≤ (Π_t ρ_t)^(1/L) ≤ high, else 0, on every token of the row
        mixture         π_old / (α π_ω + (1 − α) π_old),  α = G_w/G                       (balance heuristic)
        luffy           γ π_old / (π_old + γ)²,  γ = 0.1                                  (arXiv:2504.14945)
        topr            1 where A ≥ 0, else min(Π_t ρ_t, 1)                               (arXiv:2503.14286)

    Every log-ratio, also one summed over a row, is clamped to ±20. `mixture` is at most 1/(1 − α); at α = 1 it is the
    plain ratio, capped at c.
    """
    return WEIGHTS[settings.weight](settings, evidence)


def _none(settings: SourceCorrection, given: Evidence) -> Tensor:
    return torch.ones_like(given.sampler_T)


def _token_tis(settings: SourceCorrection, given: Evidence) -> Tensor:
    return log_ratio(given.old_T, given.sampler_T).exp().clamp(max=settings.cap)


def _icepop(settings: SourceCorrection, given: Evidence) -> Tensor:
    ratio_T = log_ratio(given.old_T, given.sampler_T).exp()
    return torch.where((ratio_T >= settings.low) & (ratio_T <= settings.high), ratio_T, 0.0)


def _row_log_ratio(given: Evidence) -> Tensor:
    """Σ_t log ρ_t of each row [R]; a segmented sum, whose order is fixed."""
    log_ratio_T = log_ratio(given.old_T, given.sampler_T)
    return torch.segment_reduce(log_ratio_T, "sum", lengths=given.length_R, unsafe=True)


def _sequence_tis(settings: SourceCorrection, given: Evidence) -> Tensor:
    weight_R = _row_log_ratio(given).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=settings.cap)
    return weight_R[given.row_T]


def _geometric_mask(settings: SourceCorrection, given: Evidence) -> Tensor:
    mean_R = (_row_log_ratio(given) / given.length_R).exp()
    inside_R = (mean_R >= settings.low) & (mean_R <= settings.high)
    return inside_R[given.row_T].to(given.old_T.dtype)


def _mixture(settings: SourceCorrection, given: Evidence) -> Tensor:
    """1 / (α π_ω/π_old + 1 − α); the plain ratio exceeds its bound only where the group is all explorer."""
    explorer_T = given.sampler_T if given.explorer_T is None else given.explorer_T
    share_T = given.explorer_share_T
    weight_T = 1 / (share_T * log_ratio(explorer_T, given.old_T).exp() + (1 - share_T))
    return torch.where(share_T == 1, weight_T.clamp(max=settings.cap), weight_T)


def _luffy(settings: SourceCorrection, given: Evidence) -> Tensor:
    """LUFFY maximises f(π)·A with f(π) = π/(π + γ) in place of the ratio π/μ. Its gradient is

        f'(π) ∇π · A = γ/(π + γ)² · π ∇log π · A,

    and that of the anchored ratio at π = π_old is ∇log π · A, so γπ_old/(π_old + γ)² turns one into the other.
    """
    old_T = given.old_T.exp()
    return LUFFY_GAMMA * old_T / (old_T + LUFFY_GAMMA) ** 2


def _topr(settings: SourceCorrection, given: Evidence) -> Tensor:
    taper_R = _row_log_ratio(given).clamp(-MAX_LOG_RATIO, 0.0).exp()
    return torch.where(given.advantage_T >= 0, 1.0, taper_R[given.row_T])


WEIGHTS: dict[str, Callable[[SourceCorrection, Evidence], Tensor]] = {
    "none": _none,
    "token_tis": _token_tis,
    "icepop": _icepop,
    "sequence_tis": _sequence_tis,
    "geometric_mask": _geometric_mask,
    "mixture": _mixture,
    "luffy": _luffy,
    "topr": _topr,
}
