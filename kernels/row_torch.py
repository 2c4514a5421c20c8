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
CHUNK_ROWS = 512
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
    return _statistics(logits, targets, inverse_temperature, overwrite=False)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient·factor in `dtype`, in place where that is the gradient's own."""
    return gradient.mul_(factor).to(dtype)


def _statistics(logits: Tensor, targets: Tensor, inverse_temperature: Tensor, *, overwrite: bool) -> RowStatistics:
    """`overwrite` leaves e^{z − max} in the logits' place, with 0 in the target's column."""
    columns = torch.empty(4, logits.shape[0], dtype=logits.dtype, device=logits.device)
    plain = _all_one(inverse_temperature)
    for rows, x, *spare in _tiles(logits, scratch=1 if overwrite else 2):
        z, index = logits[rows], targets[rows].long()[:, None]
        scale = None if plain else inverse_temperature[rows, None]
        top = z.amax(1, keepdim=True) if scale is None else z.amax(1, keepdim=True).mul_(scale)
        _shifted(z, scale, top, out=x)
        own = x.gather(1, index)
        x.clamp_(min=FLOOR)
        e = torch.exp(x, out=z if overwrite else spare[0])
        own_exp = e.gather(1, index)
        others = e.scatter_(1, index, 0).sum(1, keepdim=True)
        total = others + own_exp
        moment = x.mul_(e).sum(1, keepdim=True) + own_exp * own.clamp(min=FLOOR)
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
    plain = _all_one(inverse_temperature)
    for rows, x in _tiles(logits, scratch=1):
        z, g, inverse_sum = logits[rows], grad_logprob[rows, None], (-stats.log_sum[rows, None]).exp()
        scale = None if plain else inverse_temperature[rows, None]
        _shifted(z, scale, stats.maximum[rows, None], out=x)
        if grad_entropy is None:
            torch.exp(x, out=z).mul_(-g * inverse_sum if scale is None else -g * inverse_sum * scale)
            continue
        torch.exp(x.clamp_(min=FLOOR), out=z)
        # log p + entropy = x − log_sum + entropy
        e, constant = grad_entropy[rows, None], stats.entropy[rows, None] - stats.log_sum[rows, None]
        z.mul_(x.add_(constant).mul_(-e).sub_(g)).mul_(inverse_sum if scale is None else inverse_sum * scale)
    return _finish(logits, targets, inverse_temperature, stats, grad_logprob, grad_entropy)


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
    stats = _statistics(logits, targets, inverse_temperature, overwrite=weights.entropy is None)
    losses = row_loss(stats.logprob, rows, settings)
    g = losses.gradient(weights.loss)
    if weights.entropy is not None:
        dz = gradient(logits, targets, inverse_temperature, stats, g, weights.entropy, dtype)
    else:
        logits.mul_((-g * inverse_temperature * (-stats.log_sum).exp())[:, None])
        dz = _finish(logits, targets, inverse_temperature, stats, g, None)
    return RowResult(stats, losses.loss, losses.metrics, dz)


def _finish(
    logits: Tensor, targets: Tensor, scale: Tensor, stats: RowStatistics, g: Tensor, e: Tensor | None
) -> Tensor:
    """Writes the target's column, once and from small numbers, and clears rows that have no gradient."""
    own, dead = weighted(g, -torch.expm1(stats.logprob)), g == 0
    if e is not None:
        floor = stats.logprob.clamp(min=FLOOR)
        own, dead = own - weighted(e, floor.exp() * (floor + stats.entropy)), dead & (e == 0)
    logits.scatter_(1, targets.long()[:, None], (own * scale)[:, None])
    # Written, not multiplied: a masked row may hold NaN. Waiting for the list costs nothing on a CPU.
    return logits.index_fill_(0, dead.nonzero()[:, 0], 0)


def _shifted(z: Tensor, scale: Tensor | None, top: Tensor, out: Tensor) -> Tensor:
    """z·scale − top, in one pass where the temperature is 1."""
    return torch.sub(z, top, out=out) if scale is None else torch.mul(z, scale, out=out).sub_(top)


def _all_one(scale: Tensor) -> bool:
    return bool((scale == 1).all())


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
