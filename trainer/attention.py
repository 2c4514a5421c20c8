"""Attention over segments that stand one after the other without padding (`trainer.line`), each with its own keys.

Shape suffixes: N tokens of the line, K keys of all segments, S segments, L keys of the longest one, H query and G
key-value heads of size D.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "s2lpo_packed"
# Measured on a CPU: 64 rows of 20 to 39 tokens take 4 ms padded, 13 ms one by one and 61 ms under a block-diagonal
# mask; 7 rows of 90 to 430 tokens take 76, 30 and 126 ms.
LONG_ROW = 128


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend by `packed_attention`.

    transformers builds masks only for names it knows, so none is built. Its caches mix the rows: pass use_cache=False.
    ValueError for attention that reaches over a sliding window, and for models whose attention cannot be replaced.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    windowed = layers is None and getattr(config, "sliding_window", None) is not None
    kinds = {"sliding_attention"} if windowed else set(layers or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers; packed training knows full attention only: "
            "use learner.micro_batch_tokens=0"
        )
    AttentionInterface.register(NAME, packed_attention)
    replace_attention(model, NAME)


def replace_attention(model: PreTrainedModel, name: str) -> None:
    """Attend by a registered function; ValueError where the model keeps its own, of which transformers only warns."""
    model.set_attn_implementation(name)
    config = model.config.get_text_config()
    if config._attn_implementation != name:
        raise ValueError(
            f"the attention of {config.model_type} cannot be replaced, and its own would let packed rows see each "
            "other: use learner.micro_batch_tokens=0"
        )


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment to its keys: query [1, H, N, D], key and value [1, G, N, D] to [1, N, H, D].

    Segment s is tokens cu_seq_lens_q[s] … cu_seq_lens_q[s + 1] − 1, as transformers names it. Its keys are the places
    key_index[cu_seq_lens_k[s]] … key_index[cu_seq_lens_k[s + 1] − 1] of the line, the line itself where key_index is
    None. Its last token sees all of them, the token before it all but the last, and so on. Without bounds every batch
    row is one row, as for a model's own forward. bf16 and fp16 on a GPU run flash-attn where it is installed, else
    torch's varlen_attn; everything else SDPA, short segments padded within the attention only.
    """
    assert attention_mask is None, "rows are told apart by bounds alone"
    assert dropout == 0, "models train without dropout"
    if unknown := [name for name in ("sliding_window", "softcap", "s_aux") if options.get(name) is not None]:
        raise ValueError(f"packed attention knows no {', '.join(unknown)}: use learner.micro_batch_tokens=0")
    if cu_seq_lens_q is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    assert max_length_q is not None, "bounds come with the longest segment"
    assert max_length_k is not None, "bounds come with the longest keys"
    assert cu_seq_lens_k is not None, "queries have bounds, keys have none"
    segments = Segments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, key_index)
    line = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    return _kernel(query, max_length_k)(*line, segments, scaling)[None], None


class Segments(NamedTuple):
    """Where they start among the queries [S + 1] and among the keys [S + 1], the longest, and where keys lie [K]."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    key_index: Tensor | None

    def gathered(self, line: Tensor) -> Tensor:
        """Keys or values [N, G, D] as [K, G, D]. An embedding's gradient adds repeated rows up in a fixed order."""
        if self.key_index is None:
            return line
        return embedding(self.key_index, line.flatten(1)).unflatten(-1, line.shape[1:])


def _kernel(query: Tensor, longest: int) -> Callable[..., Tensor]:
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash if _has_flash_attn() else _varlen
    return _padded if longest < LONG_ROW else _one_by_one


@cache
def _has_flash_attn() -> bool:
    """Looked up once: it searches directories, and every layer asks."""
    return importlib.util.find_spec("flash_attn") is not None


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    key, value = segments.gathered(key), segments.gathered(value)
    return flash_attn_varlen_func(query, key, value, *segments[:4], softmax_scale=scale, causal=True)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Torch 2.11 has no such argument and takes grouped heads as they are.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    key, value = segments.gathered(key), segments.gathered(value)
    out = varlen_attn(query, key, value, *segments[:4], scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


def _padded(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """SDPA on queries [S, H, Q, D] and keys [S, G, L, D]: S·Q·L scores, where a block mask over the line takes N·K."""
    num_keys = len(key) if segments.key_index is None else len(segments.key_index)
    place_N = _places(segments.queries, segments.most_queries, len(query))
    place_K = _places(segments.keys, segments.most_keys, num_keys)

    def spread(line: Tensor, place: Tensor, index: Tensor | None, most: int) -> Tensor:
        """A place that no token has shows the line's first one, to no query that counts."""
        source = place.new_zeros((len(segments.keys) - 1) * most)
        source[place] = torch.arange(len(place), device=place.device) if index is None else index
        return line.flatten(1).index_select(0, source).view(-1, most, *line.shape[1:]).transpose(1, 2)

    mask = None if segments.key_index is None else _mask(segments, query.dtype)
    keys, values = (spread(line, place_K, segments.key_index, segments.most_keys) for line in (key, value))
    out_SHQD = scaled_dot_product_attention(
        spread(query, place_N, None, segments.most_queries), keys, values,
        attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out_SHQD.transpose(1, 2).flatten(0, 1).index_select(0, place_N)


def _mask(segments: Segments, dtype: torch.dtype) -> Tensor:
    """[S, 1, Q, L]: what each query adds to its scores."""
    earlier_S = segments.keys.diff() - segments.queries.diff()  # keys that all of a segment's queries see
    query_Q, key_L = (
        torch.arange(most, device=earlier_S.device) for most in (segments.most_queries, segments.most_keys)
    )
    hidden_SQL = key_L > query_Q[:, None] + earlier_S[:, None, None]
    shape = hidden_SQL.shape
    return torch.zeros(shape, dtype=dtype, device=earlier_S.device).masked_fill_(hidden_SQL, -math.inf)[:, None]


def _places(bounds: Tensor, most: int, count: int) -> Tensor:
    """Where each of `count` tokens stands if every segment takes `most` places."""
    starts = torch.arange(len(bounds) - 1, device=bounds.device) * most - bounds[:-1]
    shift = torch.repeat_interleave(starts, bounds.diff().long(), output_size=count)
    return torch.arange(count, device=bounds.device) + shift


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    out = []
    key, value = segments.gathered(key), segments.gathered(value)
    for (start, stop), (first, last) in zip(pairwise(segments.queries.tolist()), pairwise(segments.keys.tolist())):
        earlier = (last - first) - (stop - start)  # keys that all its queries see: queries stand behind as many zeros
        q = pad(query[start:stop], (0, 0, 0, 0, earlier, 0))
        q, k, v = (line[None].transpose(1, 2) for line in (q, key[first:last], value[first:last]))
        found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out.append(found[0, :, earlier:].transpose(0, 1))
    return torch.cat(out)
