# mypy: disable-error-code="no-untyped-def"
# A Triton kernel is traced, not typed: only constexpr annotations mean something in its signature.
"""Triton pieces shared by the kernels, each once: accurate scalars, a token's loss, a row's statistics and gradient.

Everything after the matrix product is float32, whatever the dtype of the logits in memory.
"""

import triton
import triton.language as tl

from kernels.arguments import KL_BOUND, LOG_RATIO_BOUND

LOG_RATIO_LIMIT = tl.constexpr(LOG_RATIO_BOUND)
KL_LIMIT = tl.constexpr(KL_BOUND)
TOKEN, SEQUENCE, CISPO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1], to float32 rounding: 2·atanh(x / (2 + x)) as a series.

    1 + x would round first, and past a 14-nat margin lose all of a confident token's log-prob.
    """
    s = x / (2.0 + x)
    q = s * s
    tail = 1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0))
    return 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (0.2 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * tail)))))


@triton.jit
def softplus(x):
    """log(1 + e^x); −inf gives 0, inf gives inf, NaN stays."""
    top = tl.where(x > 0, x, 0.0)
    return tl.where(x == x, top + log1p_unit(tl.exp(-tl.abs(x))), x)


@triton.jit
def exp_tail(x):
    """(e^x − 1 − x) / x for |x| ≤ 0.5, by its series: x/2·(1 + x/3·(1 + x/4·(...)))."""
    return x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8 * (1 + x / 9)))))))


@triton.jit
def expm1(x):
    """e^x − 1 without cancellation near 0."""
    near = tl.where(tl.abs(x) <= 0.5, x, 0.0)
    return tl.where(tl.abs(x) <= 0.5, near + near * exp_tail(near), tl.exp(x) - 1)


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays, which tl.clamp leaves open."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def k3(log_pi, ref):
    """Value and derivative in log_pi of min(e^d − d − 1, 10), d = clamp(ref − log_pi, ±20)."""
    raw = ref - log_pi
    d = clamp(raw, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    near = tl.where(tl.abs(d) <= 0.5, d, 0.0)
    value = tl.where(tl.abs(d) <= 0.5, near * exp_tail(near), tl.exp(d) - d - 1)
    held = (tl.abs(raw) > LOG_RATIO_LIMIT) | (value > KL_LIMIT)
    return clamp(value, 0.0, KL_LIMIT), tl.where(held, 0.0, -expm1(d))


@triton.jit
def surrogate(log_ratio, log_pi, advantage, low, high, dual_clip, RATIO: tl.constexpr):
    """(value, slope in the log-ratio or for cispo in log_pi, ratio, clipped low, clipped high, dual-clipped)."""
    ratio = tl.exp(log_ratio)
    clipped = clamp(ratio, low, high)
    below, above = ratio < clipped, ratio > clipped
    if RATIO == CISPO:
        slope = -clipped * advantage
        value, dual = slope * log_pi, advantage != advantage
    else:
        dual = (advantage < 0) & (ratio > dual_clip)
        below, above = below & (advantage < 0), above & (advantage > 0)
        bounded = tl.where(dual, dual_clip, tl.where(below | above, clipped, ratio))
        value, slope = -advantage * bounded, tl.where(dual | below | above, 0.0, -advantage * ratio)
    return value, slope, ratio, below, above, dual


@triton.jit
def load_or(pointer, rows, inside, neutral):
    """A per-token argument in float32, or its neutral value where the caller gave none."""
    if pointer is None:
        value = (rows * 0).to(tl.float32) + neutral
    else:
        value = tl.load(pointer + rows, mask=inside, other=neutral).to(tl.float32)
    return value


@triton.jit
def token_loss(
    log_pi, rows, inside, anchor, advantage, is_weight, ref, kl_weight, mask, mean_log_ratio,
    low, high, dual_clip, kl_coef, RATIO: tl.constexpr,
):  # fmt: skip
    """(loss, slope of the surrogate, slope of the KL, ratio, clipped low, clipped high, dual-clipped, kl) of tokens.

    `kernels.row_loss.row_loss` in Triton, for a block of tokens or one; works on pointers so that None costs nothing.
    """
    live = load_or(mask, rows, inside, 1.0) != 0.0
    log_pi = tl.where(live, log_pi, 0.0)
    a = tl.where(live, tl.load(advantage + rows, mask=inside, other=0.0).to(tl.float32), 0.0)
    raw = log_pi - tl.where(live, tl.load(anchor + rows, mask=inside, other=0.0).to(tl.float32), 0.0)
    log_ratio = clamp(raw, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if RATIO == SEQUENCE:
        log_ratio = tl.load(mean_log_ratio + rows, mask=inside, other=0.0)
    value, slope, ratio, below, above, dual = surrogate(log_ratio, log_pi, a, low, high, dual_clip, RATIO)
    w = load_or(is_weight, rows, inside, 1.0)
    value = tl.where(live & (w != 0.0), w * value, 0.0)
    slope = tl.where(live & (w != 0.0), w * slope, 0.0)
    if RATIO == TOKEN:
        slope = tl.where(tl.abs(raw) > LOG_RATIO_LIMIT, 0.0, slope)
    if ref is not None:
        share = load_or(kl_weight, rows, inside, 1.0)
        on = live & (share != 0.0)
        known = tl.where(on, tl.load(ref + rows, mask=inside, other=0.0).to(tl.float32), log_pi)
        kl, kl_slope = k3(log_pi, known)
        scale = kl_coef * share
        value += tl.where(on, scale * kl, 0.0)
        kl, kl_slope = tl.where(on, kl, 0.0), tl.where(on, scale * kl_slope, 0.0)
    else:
        kl, kl_slope = tl.where(live, 0.0, 0.0), tl.where(live, 0.0, 0.0)
    return value, slope, kl_slope, tl.where(live, ratio, 0.0), below & live, above & live, dual & live, kl


@triton.jit
def row_statistics(logits, target, scale, columns, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """(log-prob of the target, entropy, max, log Σ e^{z − max}) of one row z = logits·scale, in one read.

    Every lane keeps its own running maximum and sums over the columns it sees, so that threads meet once, at the end.
    The sum leaves the target out: the log-prob is −softplus(log Σ_{j≠y} e^{z_j} − z_y), exact where z_y − logsumexp
    would round to 0.
    """
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full([LANES], NEGATIVE_INFINITY, tl.float32)
    others = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    for start in range(0, columns, DEPTH * LANES):
        cols = start + offsets
        z = tl.load(logits + cols, mask=cols < columns, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        best = tl.maximum(top, tl.max(z, axis=0))
        # −inf − −inf is NaN: while nothing finite was seen, shift by 0.
        shift = tl.where(best == NEGATIVE_INFINITY, 0.0, best)
        drop = tl.where(top == NEGATIVE_INFINITY, 0.0, top - shift)
        shrink = tl.exp(drop)
        below = z - shift[None, :]
        e = tl.where(cols == target, 0.0, tl.exp(below))
        moment = shrink * (moment + drop * others) + tl.sum(tl.where(e == 0.0, 0.0, e * below), axis=0)
        others = shrink * others + tl.sum(e, axis=0)
        top = best
    known = (target >= 0) & (target < columns)
    own = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32) * scale
    return _joined(own, top, others, moment)


@triton.jit
def _joined(own, top, others, moment):
    """`row_statistics` from the target's logit and the lanes' maxima, Σ e^{z − top} and Σ e^{z − top}·(z − top)."""
    peak = tl.maximum(tl.max(top, axis=0), own)
    drop = tl.where(top == NEGATIVE_INFINITY, 0.0, top - peak)
    shrink = tl.exp(drop)
    rest = tl.sum(shrink * others, axis=0)
    below_peak = own - peak
    own_exp = tl.exp(below_peak)
    total = rest + own_exp
    log_sum = tl.log(total)
    own_moment = tl.where(own_exp == 0.0, 0.0, own_exp * below_peak)
    mean = (tl.sum(shrink * (moment + drop * others), axis=0) + own_moment) / total
    return -softplus(tl.log(rest) - below_peak), log_sum - mean, peak, log_sum


@triton.jit
def row_gradient(logits, out, target, scale, columns, logprob, entropy, top, log_sum, g, e, BLOCK: tl.constexpr):
    """Writes (g·(1[j = y] − p_j) − e·p_j·(log p_j + entropy))·scale over one row; `out` may share the row's memory.

    A float32 row may become a bfloat16 row at the same address: each block's writes end before the next block's reads,
    and the barrier lets every warp read its block before any writes it. A row with g = e = 0 becomes 0.
    """
    offsets = tl.arange(0, BLOCK)
    dead = (g == 0.0) & (e == 0.0)
    p_own = tl.exp(logprob)
    own_entropy = tl.where(p_own == 0.0, 0.0, p_own * (logprob + entropy))
    own = (-g * expm1(logprob) - e * own_entropy) * scale
    for start in range(0, columns, BLOCK):
        cols = start + offsets
        inside = cols < columns
        z = tl.load(logits + cols, mask=inside, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        log_p = z - top - log_sum
        p = tl.exp(log_p)
        dz = tl.where(p == 0.0, 0.0, p * (-g - e * (log_p + entropy))) * scale
        dz = tl.where(cols == target, own, dz)
        tl.debug_barrier()
        tl.store(out + cols, tl.where(dead, 0.0, dz).to(out.dtype.element_ty), mask=inside)
