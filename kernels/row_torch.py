"""Row operations on a chunk of logits in plain PyTorch: statistics, and the logits' gradient in place.

No graph, and no second buffer of the chunk's size: the work goes through a tile of rows that fits a core's cache.
Shapes: C rows of the chunk, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.arguments import LossRows, LossSettings, working_dtype
from kernels.row_loss import row_loss, weighted
from kernels.rows import RowResult, RowStatistics, RowWeights

CHUNK_BYTES = 128 << 20
CHUNK_ROWS = 256
TILE_BYTES = 1 << 20
FLOOR = -1.0e4
"""Stands for −inf once the row's maximum is subtracted: exp gives 0 too, and 0·FLOOR is 0 where 0·−inf is NaN."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 (float64 for float64): half-precision products are emulated, and slow, on a CPU."""
    return working_dtype(dtype)


def logits_dtype(dtype: torch.dtype, fp32_logits: bool) -> torch.dtype:
    """As the products' operands; there is no cheaper choice here."""
    return working_dtype(dtype)


def statistics(logits: Tensor, targets: Tensor, inverse_temperature: Tensor) -> RowStatistics:
    """Log-prob of the target, entropy, maximum and log of the sum, each [C], from raw logits [C, V].

    The log-prob is −softplus(log Σ_{j≠y} e^{z_j} − z_y): z_y − logsumexp would round to 0 past a 14-nat margin.
    """
    columns = torch.empty(4, logits.shape[0], dtype=logits.dtype, device=logits.device)
    for rows, x, e in _tiles(logits, scratch=2):
        index = targets[rows].long()[:, None]
        torch.mul(logits[rows], inverse_temperature[rows, None], out=x)
        top = x.amax(1, keepdim=True)
        x.sub_(top)
        own = x.gather(1, index)
        x.clamp_(min=FLOOR)
        torch.exp(x, out=e)
        own_exp = e.gather(1, index)
        others = e.scatter_(1, index, 0).sum(1, keepdim=True)
        total = others + own_exp
        moment = e.mul_(x).sum(1, keepdim=True) + own_exp * own.clamp(min=FLOOR)
        log_sum = total.log()
        logprob = -_softplus(others.log() - own)
        columns[:, rows] = torch.cat([logprob, log_sum - moment / total, top, log_sum], dim=1).T
    return RowStatistics(*columns)


def gradient(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    stats: RowStatistics,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrites raw logits with ∂L/∂logits, given ∂L/∂logprob and ∂L/∂entropy (None: 0) per row.

        dz_j = (g·(1[j = y] − p_j) − e·p_j·(log p_j + entropy)) / temperature

    The target's entry uses 1 − p = −expm1(logprob). A row whose two gradients are 0 becomes 0 whatever it held.
    """
    assert dtype == logits.dtype, "products and logits share a dtype on this path"
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    e_all = zero.expand_as(grad_logprob) if grad_entropy is None else grad_entropy
    dead = (grad_logprob == 0) & (e_all == 0)
    for rows, x in _tiles(logits, scratch=1):
        z, scale = logits[rows], inverse_temperature[rows]
        g, e, logprob, entropy = grad_logprob[rows], e_all[rows], stats.logprob[rows], stats.entropy[rows]
        torch.mul(z, scale[:, None], out=x)
        x.sub_(stats.maximum[rows, None]).sub_(stats.log_sum[rows, None])
        if grad_entropy is None:
            torch.exp(x, out=z).mul_((-g * scale)[:, None])
        else:
            torch.exp(x.clamp_(min=FLOOR), out=z)
            z.mul_(x.add_(entropy[:, None]).mul_(-e[:, None]).sub_(g[:, None])).mul_(scale[:, None])
        floor = logprob.clamp(min=FLOOR)
        own = weighted(g, -torch.expm1(logprob)) - weighted(e, floor.exp() * (floor + entropy))
        z.scatter_(1, targets[rows].long()[:, None], (own * scale)[:, None])
        z.masked_fill_(dead[rows, None], 0)
    return logits


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    rows: LossRows,
    weights: RowWeights,
    settings: LossSettings,
    dtype: torch.dtype,
) -> RowResult:
    """Statistics, loss and, in place, ∂(Σ weight·(loss − entropy_coef·entropy))/∂logits of a chunk."""
    stats = statistics(logits, targets, inverse_temperature)
    losses = row_loss(stats.logprob, rows, settings)
    g = losses.gradient(weights.loss)
    dz = gradient(logits, targets, inverse_temperature, stats, g, weights.entropy, dtype)
    return RowResult(stats, losses.loss, losses.metrics, dz)


def _tiles(logits: Tensor, scratch: int) -> Iterator[tuple]:
    """Spans of rows with scratch tensors of their shape; one row when a row alone fills the cache."""
    count, width = logits.shape
    step = max(1, min(count, TILE_BYTES // (width * logits.element_size())))
    buffers = [torch.empty(step, width, dtype=logits.dtype, device=logits.device) for _ in range(scratch)]
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), *(b[: stop - start] for b in buffers)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact to the last bits at both ends; −inf gives 0 and inf gives inf."""
    return x.clamp(min=0) + torch.exp(-x.abs()).log1p()
