"""Attention over rows that stand one after the other without padding, and never see each other.

Shape suffixes: N tokens of all rows, R rows, L tokens of the longest row, H query and G key-value heads of size D.
"""

import importlib.util
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "s2lpo_packed"
# Measured on a CPU: 64 rows of 20 to 39 tokens take 4 ms padded, 13 ms one by one and 61 ms under a block-diagonal
# mask; 7 rows of 90 to 430 tokens take 76, 30 and 126 ms.
LONG_ROW = 128


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by `packed_attention`; ValueError for attention that reaches over a sliding window.

    transformers builds masks only for names it knows, so none is built. Its caches mix the rows: pass use_cache=False.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers; packed training knows full attention only: "
            "use learner.micro_batch_tokens=0"
        )
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: query [1, H, N, D], key and value [1, G, N, D] to [1, N, H, D].

    Row r is tokens cu_seq_lens_q[r] … cu_seq_lens_q[r + 1] − 1, as transformers names it. Without it every batch row
    is one row, as for a model's own forward. bf16 and fp16 on a GPU run flash-attn where it is installed, else
    torch's varlen_attn; everything else SDPA, short rows padded within the attention only.
    """
    assert attention_mask is None, "rows are told apart by cu_seq_lens_q alone"
    assert dropout == 0, "models train without dropout"
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    assert max_length_q is not None
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    kernel = _kernel(query, max_length_q)
    return kernel(*rows, cu_seq_lens_q, max_length_q, scaling)[None], None


def _kernel(query: Tensor, longest: int) -> Callable[..., Tensor]:
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash if importlib.util.find_spec("flash_attn") else _varlen
    return _padded if longest < LONG_ROW else _row_by_row


def _flash(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )  # fmt: skip


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Torch 2.11 has no such argument and takes grouped heads as they are.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _padded(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """SDPA on [R, H, L, D]: R·L² scores, where a block-diagonal mask over all tokens takes (Σ L)²."""
    lengths_R = bounds.diff().long()
    row_N = torch.repeat_interleave(torch.arange(len(lengths_R), device=query.device), lengths_R)
    slot_N = torch.arange(len(row_N), device=query.device) - bounds.long()[row_N]

    def spread(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(len(lengths_R), longest, *tensor.shape[1:])
        return padded.index_put((row_N, slot_N), tensor).transpose(1, 2)

    out_RHLD = scaled_dot_product_attention(
        spread(query), spread(key), spread(value), is_causal=True, scale=scale, enable_gqa=True
    )
    return out_RHLD.transpose(1, 2)[row_N, slot_N]


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    out = []
    for start, stop in pairwise(bounds.tolist()):
        q, k, v = (tensor[None, start:stop].transpose(1, 2) for tensor in (query, key, value))
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
    return torch.cat(out, dim=2)[0].transpose(0, 1)
