"""Drawing one token per row: truncation, log-probs, and noise that is a pure function of (seed, position).

Shapes: B rows, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

from core.schema import Sampling

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 128  # divides the vocabularies of Qwen and Llama


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_keys(seeds: np.ndarray) -> np.ndarray:
    """Scatter the uint64 seeds [B], so that neighbouring seeds get unrelated streams: uint64 [B]."""
    return _mix(seeds + np.uint64(_GOLDEN))


def uniforms(keys: np.ndarray, positions: range) -> np.ndarray:
    """Numbers in (0, 1) of 52 bits for each row's tokens at `positions` of the completion: float64 [positions, B].

    SplitMix64 (Steele, Lea and Flood 2014) as a counter-based generator: mix(key + (position + 1)·golden).
    """
    counters = (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = _mix(keys + counters[:, None]) >> np.uint64(12)
    # The half keeps it off 0; 52 bits keep it off 1, because k + 1/2 is then exact.
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def truncate(logits: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Set the logits [B, V] of tokens outside top_k, then outside the nucleus top_p of what is left, to -inf.

    Ties with the k-th largest are kept. The nucleus is the shortest list of most probable tokens whose mass reaches
    top_p, so at least one (Holtzman et al. 2020; the same order and rule as transformers and vLLM).
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
        outside = torch.zeros_like(mass, dtype=torch.bool)
        outside[:, 1:] = mass[:, :-1] >= top_p
        logits = logits.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), -torch.inf)
    return logits


def _pick(probability: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability (float64) exceeds uniform·total: int64 [B, 1]."""
    cumulative = probability.cumsum(-1, dtype=torch.float64)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=probability.shape[-1] - 1)


def _pick_by_blocks(probability: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """`_pick` in two levels: it reads the probabilities once and writes none of float64, which on a GPU is the cost."""
    if rest := -probability.shape[-1] % _BLOCK:
        probability = F.pad(probability, (0, rest))
    blocks = probability.unflatten(-1, (-1, _BLOCK))
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1)
    before = torch.where(block > 0, cumulative.gather(-1, block - (block > 0).long()), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # The two levels round differently: below its sum, the block always has a token of positive probability to give.
    below = torch.minimum(threshold - before, torch.nextafter(inside[:, -1:], torch.zeros_like(before)))
    token = torch.searchsorted(inside, below, right=True) + block * _BLOCK
    return token.clamp_(max=probability.shape[-1] - rest - 1)


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [B] and their log-probs float32 [B] of sampling.kind.

    Inverse transform: a token of probability zero is never drawn, and one number per row is all the noise there is.
    logits [B, V], uniform float64 [B] in (0, 1). Logits that are not finite give a log-prob that is not finite; the
    caller refuses it.
    """
    logits = logits.float()
    scaled = logits if sampling.temperature == 1.0 else logits / sampling.temperature
    scaled = truncate(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
    probability = scaled.softmax(-1)
    token = (_pick_by_blocks if probability.is_cuda else _pick)(probability, uniform)
    if sampling.kind == "raw":
        return token.squeeze(-1), logits.log_softmax(-1).gather(-1, token).squeeze(-1)
    return token.squeeze(-1), probability.gather(-1, token).log_().squeeze(-1)
