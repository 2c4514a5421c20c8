"""The specification: plain PyTorch, autograd, any float dtype. Everything else in this package must agree with it.

Shapes: T tokens of a packed batch, S sequences in it, V vocabulary, H hidden size.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import KL_BOUND, LOG_RATIO_BOUND, LossRows, LossSettings, working_dtype


class LogProb(NamedTuple):
    """Per-token log-prob of the target and entropy of the distribution, both [T] in nats."""

    logprob: Tensor
    entropy: Tensor


def selected_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> LogProb:
    """Log-prob of each target under a linear head, and the entropy of the head's distribution.

        z = hidden @ weight.T / temperature,  logprob_t = z[t, y_t] − logsumexp(z_t),  entropy_t = −Σ_v p log p

    Shapes: hidden [T, H], weight [V, H], targets [T], temperature a float or [T]. Results [T] in nats, float32
    (float64 for float64 inputs); the product itself is in that dtype too. A −inf logit has p = 0 and adds nothing to
    the entropy.
    """
    dtype = working_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logprob_of_logits(logits, targets, temperature=temperature)


def logprob_of_logits(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> LogProb:
    """The same from logits [T, V]."""
    scale = temperature.to(logits.dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(logits / scale, dim=-1)
    logprob = log_p.gather(1, targets.long()[:, None])[:, 0]
    # exp(−inf)·(−inf) is NaN in value and gradient; the limit is 0.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return LogProb(logprob, entropy)


def policy_loss(logprob: Tensor, rows: LossRows, settings: LossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token [T] and metrics; the equations stand at `kernels.ops.policy_loss`."""
    live = torch.ones_like(logprob, dtype=torch.bool) if rows.mask is None else rows.mask
    still = torch.zeros_like(logprob)
    log_pi = torch.where(live, logprob, still)
    anchor = torch.where(live, rows.anchor.to(logprob.dtype), still)
    advantage = torch.where(live, rows.advantage.to(logprob.dtype), still)
    weight = torch.ones_like(still) if rows.is_weight is None else rows.is_weight.detach().to(logprob.dtype)

    log_ratio = (log_pi - anchor).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if settings.ratio == "sequence":
        assert rows.segments is not None
        log_ratio = _sequence_mean(log_ratio, live, rows.segments.bounds)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    negative = advantage < 0
    if settings.ratio == "cispo":
        policy = -clipped.detach() * advantage * log_pi
        low, high, dual = ratio < clipped, ratio > clipped, torch.zeros_like(negative)
    else:
        policy = torch.maximum(-advantage * ratio, -advantage * clipped)
        dual = negative & (ratio > settings.dual_clip)
        policy = torch.where(dual, -advantage * settings.dual_clip, policy)
        low, high = negative & (ratio < clipped), (advantage > 0) & (ratio > clipped)
    policy = torch.where(live & (weight != 0), weight * policy, still)

    kl, kl_term = _kl(log_pi, rows, live, settings)
    metrics = {"ratio": ratio, "clipped_low": low, "clipped_high": high, "dual_clipped": dual, "kl": kl}
    return policy + kl_term, {k: torch.where(live, v.detach(), 0).float() for k, v in metrics.items()}


def _kl(log_pi: Tensor, rows: LossRows, live: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """The k3 estimate per token, and β·kl_weight times it."""
    still = torch.zeros_like(log_pi)
    if rows.ref is None:
        return still, still
    on = live if rows.kl_weight is None else live & (rows.kl_weight != 0)
    gap = torch.where(on, rows.ref.detach().to(log_pi.dtype) - log_pi, still).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    kl = (gap.expm1() - gap).clamp(max=KL_BOUND)
    scale = settings.kl_coef if rows.kl_weight is None else settings.kl_coef * rows.kl_weight.to(log_pi.dtype)
    return kl, torch.where(on, scale * kl, still)


def _sequence_mean(values: Tensor, live: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Each token gets the mean of its sequence's live values; a sequence without any gets 0."""
    means = []
    for start, stop in pairwise(bounds):
        own = live[start:stop]
        mean = torch.where(own, values[start:stop], 0).sum() / own.sum().clamp(min=1)
        means.append(mean.expand(stop - start))
    return torch.cat(means) if means else values


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: LossRows,
    settings: LossSettings,
    *,
    entropy_coef: float,
    token_weight: Tensor | None,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Σ token_weight·(loss − entropy_coef·entropy), log-probs, entropies, metrics; `kernels.ops.linear_policy_loss`."""
    logprob, entropy = selected_logprob(hidden, weight, targets, temperature=temperature)
    loss, metrics = policy_loss(logprob, rows, settings)
    per_token = loss - entropy_coef * entropy if entropy_coef else loss
    if token_weight is not None:
        # where(), not a product: 0 · NaN is NaN, in the gradient as well.
        per_token = torch.where(token_weight != 0, token_weight.to(loss.dtype) * per_token, 0)
    return per_token.sum(), logprob.detach(), entropy.detach(), metrics
