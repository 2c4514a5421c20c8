# mypy: disable-error-code="no-untyped-def"
# A Triton kernel is traced, not typed: only constexpr annotations mean something in its signature.
"""Triton kernel of the policy loss on given log-probs: one block of tokens per program."""

import triton
import triton.language as tl

from kernels.tl_math import SEQUENCE, token_loss


@triton.jit
def policy_loss_kernel(
    logprob, anchor, advantage, is_weight, ref, kl_weight, mask, mean_log_ratio, table, tokens,
    low, high, dual_clip, kl_coef, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table [8, T]: loss, own slope, shared slope (sequence ratio), ratio, clipped low, high, dual-clipped, kl."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < tokens
    log_pi = tl.load(logprob + rows, mask=inside, other=0.0).to(tl.float32)
    loss, slope, kl_slope, ratio, below, above, dual, kl = token_loss(
        log_pi, rows, inside, anchor, advantage, is_weight, ref, kl_weight, mask, mean_log_ratio,
        low, high, dual_clip, kl_coef, RATIO,
    )  # fmt: skip
    tl.store(table + rows, loss, mask=inside)
    if RATIO == SEQUENCE:
        tl.store(table + tokens + rows, kl_slope, mask=inside)
        tl.store(table + 2 * tokens + rows, slope, mask=inside)
    else:
        tl.store(table + tokens + rows, slope + kl_slope, mask=inside)
    tl.store(table + 3 * tokens + rows, ratio, mask=inside)
    tl.store(table + 4 * tokens + rows, below.to(tl.float32), mask=inside)
    tl.store(table + 5 * tokens + rows, above.to(tl.float32), mask=inside)
    tl.store(table + 6 * tokens + rows, dual.to(tl.float32), mask=inside)
    tl.store(table + 7 * tokens + rows, kl, mask=inside)
