"""The three matrix products of a linear head, each accumulating in float32 or better.

Shapes: C rows of a chunk, V vocabulary, H hidden size.
"""

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [C, V] = hidden [C, H] @ weight.T, rounded once, to out's dtype."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype).t(), out=out)


def hidden_gradient(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [C, H] = dz [C, V] @ weight [V, H]."""
    torch.mm(dz, weight, out=out)


def weight_gradient(dz: Tensor, hidden: Tensor, out: Tensor, *, first: bool) -> None:
    """out [V, H] (+)= dz.T @ hidden, added in out's dtype; `first` overwrites what out held.

    A bfloat16 accumulator over 128 chunks is wrong by 1.3 %, hence a float32 `out` beside bfloat16 operands.
    """
    if out.dtype == dz.dtype:
        torch.addmm(out, dz.t(), hidden, beta=0 if first else 1, out=out)
    elif not dz.is_cuda:
        torch.addmm(out, dz.to(out.dtype).t(), hidden.to(out.dtype), beta=0 if first else 1, out=out)
    elif first:
        torch.mm(dz.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, dz.t(), hidden, out_dtype=out.dtype, out=out)
