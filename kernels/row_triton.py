"""Row operations on a chunk of logits with Triton: the launches, and the shapes and dtypes that they need.

Shapes: C rows of the chunk, T tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kernels import linear_logprob, ragged_triton
from kernels import policy_loss as policy
from kernels.arguments import LossRows, LossSettings
from kernels.ragged_triton import TOKEN_BLOCK, check_device
from kernels.row_loss import RowLoss
from kernels.rows import METRICS, RowResult, RowStatistics, RowWeights

CHUNK_BYTES = 1280 << 20
CHUNK_ROWS = 4096
# Measured on an H200, 2,048 float32 rows of 151,936: 8 warps whose lanes keep sums of their own take 0.37 ms for the
# statistics, 32 warps that meet in every block 0.54; a wide program's second read does not come from the L2 cache.
ROW_WARPS = 8
LINE_BYTES = ROW_WARPS * 32 * 16  # what its threads load at once, 16 bytes each
DEPTH = 4  # such loads in flight
GRADIENT_BLOCK = 4096
SCALE_BLOCK = 1024
# No fused multiply-add: the kernel that scores and the one that trains must round alike, whatever surrounds the sums.
ROW_OPTIONS: dict[str, Any] = {"num_warps": ROW_WARPS, "enable_fp_fusion": False}
RATIOS = {"token": 0, "sequence": 1, "cispo": 2}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """As given; raises ValueError for float64, which the kernels would round to float32."""
    if dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32, got float64 inputs; use impl='reference' or 'torch'")
    return dtype


def logits_dtype(dtype: torch.dtype, fp32_logits: bool) -> torch.dtype:
    """float32, or the operands' dtype when half-size logits were asked for."""
    return torch.float32 if fp32_logits else dtype


def statistics(logits: Tensor, targets: Tensor, inverse_temperature: Tensor) -> RowStatistics:
    """As `kernels.row_torch.statistics`."""
    check_device(logits)
    count, columns = logits.shape
    table = torch.empty(4, count, device=logits.device)
    arguments = (logits, logits.stride(0), targets, inverse_temperature, table, columns)
    linear_logprob.statistics_kernel[(count,)](*arguments, **tile(logits.itemsize, columns), **ROW_OPTIONS)
    return RowStatistics(*table)


def gradient(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    stats: RowStatistics,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `kernels.row_torch.gradient`."""
    check_device(logits)
    out = _narrow(logits, dtype)
    linear_logprob.gradient_kernel[(logits.shape[0],)](
        logits, logits.stride(0), out, out.stride(0), targets, inverse_temperature, *stats,
        grad_logprob.contiguous(), _contiguous(grad_entropy),
        logits.shape[1], BLOCK=_block(logits), **ROW_OPTIONS,
    )  # fmt: skip
    return out


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor,
    rows: LossRows,
    weights: RowWeights,
    settings: LossSettings,
    dtype: torch.dtype,
) -> RowResult:
    """As `kernels.row_torch.loss_and_gradient`: one kernel; with a sequence ratio one before the loss and one after."""
    if settings.ratio == "sequence":
        stats = statistics(logits, targets, inverse_temperature)
        losses = row_loss(stats.logprob, rows, settings)
        g = losses.gradient(weights.loss)
        dz = gradient(logits, targets, inverse_temperature, stats, g, weights.entropy, dtype)
        return RowResult(stats, losses.loss, losses.metrics, dz)
    check_device(logits)
    out = _narrow(logits, dtype)
    table = torch.empty(10, logits.shape[0], device=logits.device)
    linear_logprob.loss_kernel[(logits.shape[0],)](
        logits, logits.stride(0), out, out.stride(0), targets, inverse_temperature, table,
        *_loss_arguments(rows), weights.loss, weights.entropy, *_numbers(settings),
        logits.shape[1], RATIO=RATIOS[settings.ratio], **tile(logits.itemsize, logits.shape[1]), BLOCK=_block(logits),
        **ROW_OPTIONS,
    )  # fmt: skip
    return RowResult(RowStatistics(*table[:4]), table[4], dict(zip(METRICS, table[5:])), out)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.row_torch.scaled`, in one pass: the weight's gradient takes 2.5 GB at H = 4096."""
    check_device(gradient)
    assert gradient.is_contiguous()
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    size = gradient.numel()
    if size:
        grid = (triton.cdiv(size, SCALE_BLOCK),)
        linear_logprob.scale_kernel[grid](gradient, factor.float(), out, size, BLOCK=SCALE_BLOCK)
    return out


def row_loss(logprob: Tensor, rows: LossRows, settings: LossSettings) -> RowLoss:
    """As `kernels.row_loss.row_loss`."""
    check_device(logprob)
    logprob = logprob.contiguous()
    mean = share = None
    if settings.ratio == "sequence":
        assert rows.segments is not None
        mean, share = ragged_triton.mean_log_ratio(logprob, rows, rows.segments)
    table = torch.empty(8, logprob.shape[0], device=logprob.device)
    if logprob.shape[0]:
        policy.policy_loss_kernel[(triton.cdiv(logprob.shape[0], TOKEN_BLOCK),)](
            logprob, *_loss_arguments(rows), mean, table, logprob.shape[0], *_numbers(settings),
            RATIO=RATIOS[settings.ratio], BLOCK=TOKEN_BLOCK,
        )  # fmt: skip
    loss, slope, shared, *metrics = table
    named = dict(zip(METRICS, metrics))
    if mean is None:
        return RowLoss(loss, slope, named)
    return RowLoss(loss, slope, named, shared, share, rows.segments, ragged_triton.sequence_total)


def tile(itemsize: int, columns: int) -> dict[str, int]:
    """What a program's threads look at in one step of the statistics; the same for every kernel that forms them."""
    return {"DEPTH": DEPTH, "LANES": min(LINE_BYTES // itemsize, triton.next_power_of_2(columns))}


def _block(logits: Tensor) -> int:
    return min(GRADIENT_BLOCK, triton.next_power_of_2(logits.shape[1]))


def _narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first V entries of each row's memory seen as `dtype`: bfloat16 rows then lie two widths apart."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _loss_arguments(rows: LossRows) -> tuple[Tensor | None, ...]:
    values = (rows.anchor, rows.advantage, rows.is_weight, rows.ref, rows.kl_weight, rows.mask)
    return tuple(_contiguous(v) for v in values)


def _numbers(settings: LossSettings) -> tuple[float, ...]:
    # float() because Triton would bake an integer 1 into the kernel and compile another one.
    bounds = 1 - settings.clip_low, 1 + settings.clip_high, settings.dual_clip, settings.kl_coef
    return tuple(float(bound) for bound in bounds)
