"""Ranks that share a line of tokens: each holds a part of the tokens and, inside attention, a part of the heads.

    a rank's tokens, all heads ── all-to-all ── all tokens, a rank's heads ── attention ── all-to-all ── its tokens

Everything but attention works on tokens one by one, so a line takes 1/P of its activations and logits on each rank.
Values and gradients are those of one rank with the whole line.

Shape suffixes: P ranks of a line, N tokens of the line and n = N/P of a part, H query and G key-value heads of size D.

Source: arXiv:2309.14509 (DeepSpeed-Ulysses). DeepSpeed's own module replaces the attention of the whole process and
asks every model in it for the same heads, so the exchange is made here.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from trainer.attention import packed_attention, replace_attention, use_packed_attention
from trainer.micro_batch import NO_SOURCE, MicroBatch
from trainer.world import World

NAME = "s2lpo_packed_shared"


def share_attention(model: PreTrainedModel, world: World, key: str) -> None:
    """Make `model`, which configuration key `key` names, attend over lines that the ranks of `world.line` share.

    ValueError where heads cannot be shared out, as `check_heads` says.
    """
    use_packed_attention(model)
    parts = world.line_size
    check_heads(model.config.get_text_config(), parts, world.size, key)
    assert world.line is not None, "a line of several ranks has a group"
    AttentionInterface.register(NAME, partial(shared_attention, line=world.line, parts=parts))
    replace_attention(model, NAME)


def check_heads(config: PretrainedConfig, parts: int, ranks: int, key: str) -> None:
    """ValueError where `parts` of all `ranks` cannot share the heads of key `key`'s text model: query heads must be a
    multiple of the parts, key-value heads a multiple or a divisor (each is then given to several ranks)."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % parts or (kv_heads % parts and parts % kv_heads):
        fitting = [
            n for n in range(2, ranks + 1) if not ranks % n and not heads % n and not (kv_heads % n and n % kv_heads)
        ]
        raise ValueError(
            f"learner.sequence_parallel = {parts} cannot share out {heads} query and {kv_heads} key-value heads of "
            f"{key}: use one of {fitting or 'none'} or 1"
        )


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    line: dist.ProcessGroup,
    parts: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` of this rank's tokens: query [1, H, n, D], key and value [1, G, n, D] to [1, n, H, D].

    `options` describe the whole line. Queries, keys and values travel together: one collective, so that no rank can
    run its backward passes in another order.
    """
    copies = max(1, parts // key.shape[1])
    kinds = [query, *(tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))]
    # [P, H/P + 2 G/P, n, D]: the heads of each rank together
    sent = torch.cat([tensor[0].unflatten(0, (parts, -1)) for tensor in kinds], dim=1)
    heads = [tensor.shape[1] // parts for tensor in kinds]
    received = _Exchange.apply(sent, line).movedim(0, 1).flatten(1, 2)[None]  # [1, heads, N, D]
    q, k, v = received.split(heads, dim=1)
    out, _ = packed_attention(module, q, k, v, attention_mask, **options)
    back = _Exchange.apply(out[0].unflatten(0, (parts, -1)), line)  # [P, n, H/P, D], by the rank of the heads
    return back.movedim(0, 1).flatten(1, 2)[None], None


class _Exchange(torch.autograd.Function):
    """all-to-all: entry p goes to rank p of the line and comes from it. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, line: dist.ProcessGroup) -> Tensor:
        ctx.line = line
        pieces = pieces.contiguous()
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=line)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient, ctx.line), None


def part_of(batch: MicroBatch, part: int, parts: int) -> MicroBatch:
    """What rank `part` of a line computes: its share of the tokens, and the predictions made from them.

    The line is padded to a multiple of `parts` by a segment of its own. A part of which nothing is predicted (tokens of
    prompts only) gets a prediction of weight 0 and no source, since every rank takes part in every backward pass.
    """
    width = -(-batch.inputs["input_ids"].shape[1] // parts)
    inputs = _padded(batch.inputs, width * parts)
    start = part * width
    for name in ("input_ids", "position_ids"):
        inputs[name] = inputs[name][:, start : start + width]
    here = (batch.state_T >= start) & (batch.state_T < start + width)
    per_token = {name: value[here] for name, value in vars(batch).items() if name.endswith("_T")}
    if not here.any():
        per_token = {name: value[:1] * 0 for name, value in vars(batch).items() if name.endswith("_T")}
        per_token["source_T"] += NO_SOURCE
    else:
        per_token["state_T"] -= start
    counts = torch.bincount(per_token["row_T"], minlength=len(batch.start_R1) - 1)
    return replace(batch, inputs=inputs, start_R1=pad(counts.cumsum(0), (1, 0)).int(), **per_token)


def _padded(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    before = inputs["input_ids"].shape[1]
    more = length - before
    if not more:
        return dict(inputs)
    padded = dict(inputs)
    for name in ("input_ids", "position_ids"):
        padded[name] = pad(inputs[name], (0, more))
    for kind in ("q", "k"):
        bounds = inputs[f"cu_seq_lens_{kind}"]
        padded[f"cu_seq_lens_{kind}"] = torch.cat([bounds, bounds[-1:] + more])
        padded[f"max_length_{kind}"] = max(more, inputs[f"max_length_{kind}"])
    if "key_index" in inputs:
        padded["key_index"] = torch.cat([inputs["key_index"], torch.arange(before, length)])
    return padded
