"""Score functions of a learner on rollouts, and what section 3.1 and Appendix E of the paper say of them.

Shapes: N rollouts of one prompt, L tokens of each, P parameters. u_t = ∇_θ log π_θ(a_t|s_t) is the learner's score of
the token at t, whoever sampled it: that is what an update adds up.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from core.schema import Prompt, Sampling
from rollout.engine import Engine, Request


class Gram(NamedTuple):
    """Inner products of the scores of one prompt's rollouts.

    inner [L, L]: mean over rollouts of ⟨u_t, u_s⟩; means [L, L]: ⟨ū_t, ū_s⟩ of their means over rollouts.
    """

    inner: np.ndarray
    means: np.ndarray
    rollouts: int


class Growth(NamedTuple):
    """E‖Σ_{t≤l} u_t‖² for l = 1 … L and the slope of its logarithm over log l, with a 95 % interval over prompts.

    Example: Growth(values=[...], exponent=1.02, low=0.97, high=1.08)
    """

    values: list[float]
    exponent: float
    low: float
    high: float


def load(model_dir: Path) -> Any:
    """A model whose attention autograd can batch."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def add_noise(model: Any, scale: float, seed: int) -> None:
    """δ_θ of eq. 12 in place: Gaussian noise on every weight, `scale` times its tensor's root mean square."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            size = float(weight.square().mean().sqrt())
            weight += scale * size * torch.randn(weight.shape, generator=generator)


def rollouts(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, count: int) -> list[list[list[int]]]:
    """Token ids of `count` completions of every prompt."""
    requests = [Request(prompt.token_ids, range(count * i, count * (i + 1))) for i, prompt in enumerate(prompts)]
    rows: list[list[list[int]]] = [[] for _ in prompts]
    for one in sorted(engine.generate(requests, sampling), key=lambda one: (one.request, one.sample)):
        rows[one.request].append(one.token_ids.tolist())
    return rows


@torch.no_grad()
def greedy_match(
    sampler: Any, base: Any, prompts: Sequence[Prompt], length: int, temperature: float, stops: Sequence[int] = ()
) -> np.ndarray:
    """Pr(M_t = 1) for t = 1 … length, exactly: the chance that `sampler` draws the base policy's greedy trace.

        Pr(M_t = 1) = Π_{j≤t} π(a*_j | s*_j),  a* the greedy tokens of the base policy            (eq. 8)

    Constant after one of the `stops`. Mean over prompts; [length].
    """
    chances = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        for _ in range(length):
            ids = torch.cat([ids, base(ids).logits[:, -1:].argmax(-1)], dim=1)
        start = len(prompt.token_ids)
        logprob = F.log_softmax(sampler(ids).logits[0, start - 1 : -1] / temperature, -1)
        trace = ids[0, start:]
        ended = torch.isin(trace, torch.tensor(stops, dtype=trace.dtype)).cumsum(0).roll(1) > 0
        ended[0] = False
        taken = logprob.gather(-1, trace[:, None])[:, 0].masked_fill(ended, 0.0)
        chances.append(taken.cumsum(0).exp().numpy())
    return np.mean(chances, axis=0)


def gram(model: Any, prompt: Prompt, rows: Sequence[Sequence[int]], length: int, tensors: str) -> Gram | None:
    """The inner products over the rollouts of at least `length` tokens, cut to it; None for fewer than two.

    `tensors`: a pattern of parameter names; others count as constants.
    """
    kept = [row[:length] for row in rows if len(row) >= length]
    if len(kept) < 2:
        return None
    weights = [weight for name, weight in model.named_parameters() if re.search(tensors, name)]
    if not weights:
        raise ValueError(f"--tensors {tensors!r} matches no parameter of the learner")
    inner, total = np.zeros((length, length)), torch.zeros(())
    for row in kept:
        scores = _scores(model, weights, prompt, row)
        inner += (scores @ scores.T).double().numpy()
        total = total + scores
    mean = total / len(kept)
    return Gram(inner / len(kept), (mean @ mean.T).double().numpy(), len(kept))


def _scores(model: Any, weights: Sequence[Tensor], prompt: Prompt, row: Sequence[int]) -> Tensor:
    """u_t of every token, [L, P]."""
    ids, start = torch.tensor([[*prompt.token_ids, *row]]), len(prompt.token_ids)
    logprob = F.log_softmax(model(ids, use_cache=False).logits[0, start - 1 : -1], -1)
    taken = logprob.gather(-1, ids[0, start:, None])[:, 0]
    grads = torch.autograd.grad(taken, list(weights), torch.eye(len(row)), is_grads_batched=True)
    return torch.cat([grad.reshape(len(row), -1) for grad in grads], dim=1)


def growth(grams: Sequence[Gram], *, first: int = 3, draws: int = 400) -> Growth:
    """How E‖Σ_{t≤l} u_t‖² grows: exponent 1 is a random walk (eq. 18), 2 is coherent (Appendix E.2).

    The slope is fitted from l = `first` on; its interval is a bootstrap over prompts.
    """
    each = np.array([[one.inner[: end + 1, : end + 1].sum() for end in range(len(one.inner))] for one in grams])
    rng = np.random.Generator(np.random.Philox(0))
    slopes = [_slope(each[rng.integers(0, len(each), len(each))].mean(0), first) for _ in range(draws)]
    low, high = np.percentile(slopes, [2.5, 97.5])
    return Growth(each.mean(0).tolist(), _slope(each.mean(0), first), float(low), float(high))


def _slope(values: np.ndarray, first: int) -> float:
    places = np.arange(1, len(values) + 1)
    slope, _ = np.polyfit(np.log(places[first - 1 :]), np.log(values[first - 1 :]), 1)
    return float(slope)


def correlation(grams: Sequence[Gram]) -> list[float]:
    """Cross-step correlation of the score projections by lag, over t and prompts, [L], lag 0 first.

        Σ_v Cov(z_t, z_s) / √(Σ_v Var z_t · Σ_v Var z_s),  z_t = ⟨u_t, v⟩

    over an orthonormal basis of directions v, so for the average one: Σ_v Cov(z_t, z_s) = E⟨u_t, u_s⟩ − ⟨ū_t, ū_s⟩.
    Numerators and denominators are summed first: tokens that every rollout shares have no variance.
    """
    above, below = np.zeros(len(grams[0].inner)), np.zeros(len(grams[0].inner))
    for one in grams:
        covariance = (one.inner - one.means) * one.rollouts / (one.rollouts - 1)
        scale = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
        for lag in range(len(above)):
            above[lag] += np.trace(covariance, lag)
            below[lag] += np.trace(np.outer(scale, scale), lag)
    return (above / np.maximum(below, np.finfo(float).tiny)).tolist()


def alignment(grams: Sequence[Gram]) -> list[float]:
    """E⟨u_t, u_s⟩ / √(E‖u_t‖² E‖u_s‖²) by lag, the cross terms of eq. 16, mean over t and prompts; [L]."""
    inner = np.mean([one.inner for one in grams], axis=0)
    scale = np.sqrt(np.diag(inner))
    normed = inner / np.outer(scale, scale)
    return [float(np.trace(normed, lag)) / (len(normed) - lag) for lag in range(len(normed))]


def lags(values: Sequence[float]) -> tuple[float, float]:
    """Means over small (1 to 3) and large lags (half of the length and more)."""
    half = math.ceil(len(values) / 2)
    return float(np.mean(values[1:4])), float(np.mean(values[half:]))
