# mypy: disable-error-code="no-untyped-def"
# A Triton kernel is traced, not typed: only constexpr annotations mean something in its signature.
"""Triton kernels over packed sequences, one program per sequence: a fixed order of sums and no atomics.

Sequence s owns tokens [offsets[s], offsets[s+1]); an empty one has no work and no result to write.
"""

import triton
import triton.language as tl

from kernels.tl_math import LOG_RATIO_LIMIT, clamp, load_or


@triton.jit
def mean_log_ratio_kernel(logprob, anchor, mask, offsets, mean, share, BLOCK: tl.constexpr):
    """mean [T]: each token gets log s, the mean of its sequence's clamped live log-ratios.

    share [T]: ∂ log s / ∂ logprob, 1/count where the token is live and its log-ratio unclamped, else 0.
    """
    s = tl.program_id(0)
    start, stop = tl.load(offsets + s), tl.load(offsets + s + 1)
    total = 0.0
    count = 0.0
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        live = inside & (load_or(mask, rows, inside, 1.0) != 0.0)
        raw = tl.load(logprob + rows, mask=live, other=0.0) - tl.load(anchor + rows, mask=live, other=0.0)
        total += tl.sum(tl.where(live, clamp(raw, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), 0.0), axis=0)
        count += tl.sum(live.to(tl.float32), axis=0)
    count = tl.maximum(count, 1.0)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        live = inside & (load_or(mask, rows, inside, 1.0) != 0.0)
        raw = tl.load(logprob + rows, mask=live, other=0.0) - tl.load(anchor + rows, mask=live, other=0.0)
        held = (tl.abs(raw) > LOG_RATIO_LIMIT) | (live == 0)
        tl.store(mean + rows, tl.zeros([BLOCK], tl.float32) + total / count, mask=inside)
        tl.store(share + rows, tl.where(held, 0.0, 1.0 / count), mask=inside)


@triton.jit
def segment_sum_kernel(values, offsets, out, spread, BLOCK: tl.constexpr):
    """out [S]: the sum of each sequence; or, with spread [T] instead, each token gets its sequence's sum."""
    s = tl.program_id(0)
    start, stop = tl.load(offsets + s), tl.load(offsets + s + 1)
    total = 0.0
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(values + rows, mask=rows < stop, other=0.0).to(tl.float32), axis=0)
    if spread is None:
        tl.store(out + s, total)
    else:
        for first in range(start, stop, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            tl.store(spread + rows, tl.zeros([BLOCK], tl.float32) + total, mask=rows < stop)


@triton.jit
def group_advantage_kernel(rewards, offsets, advantage, kept, eps, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    """advantage [N] of each group's rewards, and kept [P]: the rows of a group whose rewards differ, else 0.

    The mean comes first and the squared deviations from it second: their difference of sums would cancel.
    """
    p = tl.program_id(0)
    start, stop = tl.load(offsets + p), tl.load(offsets + p + 1)
    size = (stop - start).to(tl.float32)
    total = 0.0
    least = float("inf")
    most = float("-inf")
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        r = tl.load(rewards + rows, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(r, axis=0)
        least = tl.minimum(least, tl.min(tl.where(inside, r, float("inf")), axis=0))
        most = tl.maximum(most, tl.max(tl.where(inside, r, float("-inf")), axis=0))
    mean = tl.where(size > 1.0, total / tl.maximum(size, 1.0), 0.0)
    squares = 0.0
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        d = tl.where(inside, tl.load(rewards + rows, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        squares += tl.sum(d * d, axis=0)
    deviation = tl.where(size > 1.0, tl.sqrt(squares / tl.maximum(size - 1.0, 1.0)), 1.0)
    # A lone row has mean 0 and deviation 1, so it trains unless its reward is 0; a constant group never does.
    differ = tl.where(size > 1.0, most > least, most != 0.0)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        a = tl.load(rewards + rows, mask=inside, other=0.0).to(tl.float32) - mean
        if DIVIDE:
            a = a / (deviation + eps)
        tl.store(advantage + rows, tl.where(differ, a, 0.0), mask=inside)
    tl.store(kept + p, tl.where(differ & (stop > start), stop - start, 0).to(tl.int64))


@triton.jit
def keep_list_kernel(kept, offsets, index, BLOCK: tl.constexpr):
    """index [≥ Σ kept]: row numbers of the kept groups in order; each program adds up the groups before its own."""
    p = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int64)
    for first in range(0, p, BLOCK):
        groups = first + tl.arange(0, BLOCK)
        before += tl.load(kept + groups, mask=groups < p, other=0)
    place = tl.sum(before, axis=0)
    start, count = tl.load(offsets + p), tl.load(kept + p)
    for first in range(0, count, BLOCK):
        k = first + tl.arange(0, BLOCK)
        tl.store(index + place + k, start + k, mask=k < count)


@triton.jit
def pack_kernel(tokens, offsets, prompt_lengths, answer_offsets, positions, rows, targets, owner, BLOCK: tl.constexpr):
    """Positions of every token, and for each answer token the row that predicts it, its id and its sequence."""
    s = tl.program_id(0)
    start, stop = tl.load(offsets + s), tl.load(offsets + s + 1)
    first_answer = start + tl.load(prompt_lengths + s)
    place = tl.load(answer_offsets + s)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        tl.store(positions + at, at - start, mask=inside)
        answer = inside & (at >= first_answer)
        to = place + at - first_answer
        tl.store(rows + to, at - 1, mask=answer)
        tl.store(targets + to, tl.load(tokens + at, mask=answer, other=0), mask=answer)
        tl.store(owner + to, tl.zeros([BLOCK], tl.int64) + s, mask=answer)


@triton.jit
def unpack_kernel(values, offsets, out, width, fill, BLOCK: tl.constexpr):
    """out [S, width]: a sequence's values left-aligned in its row, the rest `fill`."""
    s = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + s), tl.load(offsets + s + 1)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        own = start + cols < stop
        value = tl.where(own, tl.load(values + start + cols, mask=own, other=0.0).to(tl.float32), fill)
        tl.store(out + s * width + cols, value, mask=cols < width)
