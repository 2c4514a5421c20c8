"""Packed batches without padding: positions, shifted labels, and the way back to one row per sequence.

For token ids that are on the device already. The trainer's come by message to the host, and are laid out there
(trainer/line.py), where rows can share a prompt and ranks a line.

Shapes: S sequences, N tokens of prompts and answers together, T answer tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import segments
from kernels.arguments import Implementation, Segments, check_rows, implementation


class Packed(NamedTuple):
    """Where each answer token of a packed batch is predicted.

    positions [N]: place within the sequence, from 0. rows [T]: the packed position whose hidden state predicts the
    token; targets [T]: its id; owner [T]: its sequence. cu_answers [S+1] (CPU): bounds of the sequences within the T
    rows.

    Example: tokens [p q a | r b c], prompt_lengths [2, 1]: positions [0 1 2 0 1 2], rows [1 3 4], targets [a b c],
    owner [0 1 1], cu_answers [0 1 3].
    """

    positions: Tensor
    rows: Tensor
    targets: Tensor
    owner: Tensor
    cu_answers: Tensor


def pack(tokens: Tensor, cu_seqlens: Tensor, prompt_lengths: Tensor, *, impl: Implementation = "auto") -> Packed:
    """Labels of a packed batch: each answer token's predictor is the token before it in its own sequence.

    Masks come from lengths, never from token values, and no row crosses a sequence's bounds; an empty answer has no
    rows.

    Shapes: tokens [N] integers, each sequence its prompt and then its answer; cu_seqlens [S+1] and prompt_lengths [S]
    on the CPU, each prompt at least one token (nothing predicts the first) and at most its sequence.
    """
    bounds = Segments.of(cu_seqlens, tokens.shape[0], tokens.device)
    lengths = torch.diff(cu_seqlens.cpu().long())
    check_rows("prompt_lengths", prompt_lengths, lengths.shape[0])
    prompts = prompt_lengths.cpu().long()
    if bool(((prompts < 1) | (prompts > lengths)).any()):
        raise ValueError(
            f"prompt_lengths must lie between 1 and the sequence's length, "
            f"got {prompts.tolist()[:8]} for {lengths.tolist()[:8]}"
        )
    cu_answers = torch.nn.functional.pad(torch.cumsum(lengths - prompts, 0), (1, 0))
    answers = Segments.of(cu_answers, int(cu_answers[-1]), tokens.device)
    device_prompts = prompts.to(tokens.device, non_blocking=True)
    if implementation(impl, tokens.device) == "triton":
        from kernels import ragged_triton

        return Packed(*ragged_triton.pack(tokens, bounds, device_prompts, answers), cu_answers)
    positions = torch.arange(tokens.shape[0], device=tokens.device) - segments.spread(bounds.offsets[:-1], bounds)
    owner = segments.spread(torch.arange(lengths.shape[0], device=tokens.device), answers)
    within = torch.arange(owner.shape[0], device=tokens.device) - answers.offsets[owner]
    rows = bounds.offsets[owner] + device_prompts[owner] + within - 1
    return Packed(positions, rows, tokens.long()[rows + 1], owner, cu_answers)


def unpack(
    values: Tensor, cu_seqlens: Tensor, *, width: int | None = None, fill: float = 0.0, impl: Implementation = "auto"
) -> Tensor:
    """Packed values [T] as one left-aligned row per sequence, [S, width] float32, the rest `fill`; width None:
    longest."""
    bounds = Segments.of(cu_seqlens, values.shape[0], values.device)
    longest = max((b - a for a, b in pairwise(bounds.bounds)), default=0)
    width = longest if width is None else width
    if width < longest:
        raise ValueError(f"width must be at least the longest sequence, {longest} tokens, got {width}")
    if implementation(impl, values.device) == "triton":
        from kernels import ragged_triton

        return ragged_triton.unpack(values, bounds, width, fill)
    out = torch.full((len(bounds.bounds) - 1, width), fill, dtype=torch.float32, device=values.device)
    starts = segments.spread(bounds.offsets[:-1], bounds)
    owner = segments.spread(torch.arange(out.shape[0], device=values.device), bounds)
    out[owner, torch.arange(values.shape[0], device=values.device) - starts] = values.float()
    return out


def sequence_sum(values: Tensor, cu_seqlens: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """Sum of each sequence's values: [T] -> [S] float32, in a fixed order; an empty sequence sums to 0."""
    bounds = Segments.of(cu_seqlens, values.shape[0], values.device)
    if implementation(impl, values.device) == "triton":
        from kernels import ragged_triton

        return ragged_triton.segment_sum(values, bounds)
    return segments.segment_sum(values.float(), bounds)
