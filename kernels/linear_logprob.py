# mypy: disable-error-code="no-untyped-def"
# A Triton kernel is traced, not typed: only constexpr annotations mean something in its signature.
"""Triton kernels over a chunk of logits, one program per row: statistics, gradient in place, and both with the loss.

Rows sit on grid axis 0 (axes 1 and 2 end at 65,535) and a row's address is int64 (C·V passes 2^31 at 14,135 rows).
Shapes: C rows of the chunk, V = `columns` vocabulary.
"""

import triton
import triton.language as tl

from kernels.tl_math import load_or, row_gradient, row_statistics, token_loss


@triton.jit
def statistics_kernel(
    logits, row_stride, targets, inverse_temperature, table, columns, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """table [4, C]: log-prob, entropy, maximum and log of the sum of each row."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    target, scale = tl.load(targets + row), tl.load(inverse_temperature + row)
    source = logits + row * row_stride
    logprob, entropy, top, log_sum = row_statistics(source, target, scale, columns, DEPTH, LANES)
    tl.store(table + row, logprob)
    tl.store(table + count + row, entropy)
    tl.store(table + 2 * count + row, top)
    tl.store(table + 3 * count + row, log_sum)


@triton.jit
def gradient_kernel(
    logits, row_stride, out, out_stride, targets, inverse_temperature,
    logprob, entropy, maximum, log_sum, grad_logprob, grad_entropy, columns, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites each row by the logits' gradient; grad_entropy None is 0."""
    row = tl.program_id(0).to(tl.int64)
    target, scale = tl.load(targets + row), tl.load(inverse_temperature + row)
    g = tl.load(grad_logprob + row)
    e = load_or(grad_entropy, row, row >= 0, 0.0)
    row_gradient(
        logits + row * row_stride, out + row * out_stride, target, scale, columns,
        tl.load(logprob + row), tl.load(entropy + row), tl.load(maximum + row), tl.load(log_sum + row), g, e, BLOCK,
    )  # fmt: skip


@triton.jit
def loss_kernel(
    logits, row_stride, out, out_stride, targets, inverse_temperature, table,
    anchor, advantage, is_weight, ref, kl_weight, mask, token_weight, grad_entropy,
    low, high, dual_clip, kl_coef, columns,
    RATIO: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row from raw logits to their gradient: statistics, loss and slopes, then dz.

    table [10, C]: the four statistics, loss, ratio, clipped low, clipped high, dual-clipped, kl.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    target, scale = tl.load(targets + row), tl.load(inverse_temperature + row)
    source = logits + row * row_stride
    logprob, entropy, top, log_sum = row_statistics(source, target, scale, columns, DEPTH, LANES)
    loss, slope, kl_slope, ratio, below, above, dual, kl = token_loss(
        logprob, row, row >= 0, anchor, advantage, is_weight, ref, kl_weight, mask, None,
        low, high, dual_clip, kl_coef, RATIO,
    )  # fmt: skip
    weight = tl.load(token_weight + row)
    g = tl.where(weight != 0.0, weight * (slope + kl_slope), 0.0)
    e = load_or(grad_entropy, row, row >= 0, 0.0)
    row_gradient(source, out + row * out_stride, target, scale, columns, logprob, entropy, top, log_sum, g, e, BLOCK)
    tl.store(table + row, logprob)
    tl.store(table + count + row, entropy)
    tl.store(table + 2 * count + row, top)
    tl.store(table + 3 * count + row, log_sum)
    tl.store(table + 4 * count + row, loss)
    tl.store(table + 5 * count + row, ratio)
    tl.store(table + 6 * count + row, below.to(tl.float32))
    tl.store(table + 7 * count + row, above.to(tl.float32))
    tl.store(table + 8 * count + row, dual.to(tl.float32))
    tl.store(table + 9 * count + row, kl)


@triton.jit
def scale_kernel(source, factor, out, size, BLOCK: tl.constexpr):
    """out [size] = source·factor, rounded once, to out's dtype; factor is one float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)
