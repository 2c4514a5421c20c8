"""Launches of the Triton kernels over packed sequences; `kernels.packing` and `kernels.group_advantage` document them.

Shapes: T tokens, S sequences, N rewards, P prompts (groups).
"""

import torch
import triton
from torch import Tensor

from kernels import ragged
from kernels.arguments import LossRows, Segments

TOKEN_BLOCK = 512


def check_device(tensor: Tensor) -> None:
    """Raises ValueError where Triton cannot run on the tensor."""
    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(
            f"impl='triton' needs a CUDA tensor, got one on {tensor.device}; use impl='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )


def mean_log_ratio(logprob: Tensor, rows: LossRows, segments: Segments) -> tuple[Tensor, Tensor]:
    """log s of each token's sequence and its derivative in the token's own log-prob, both [T]."""
    mean, share = torch.empty_like(logprob), torch.empty_like(logprob)
    offsets = _offsets(segments)
    anchor = rows.anchor.contiguous()
    ragged.mean_log_ratio_kernel[_grid(offsets)](logprob, anchor, rows.mask, offsets, mean, share, BLOCK=TOKEN_BLOCK)
    return mean, share


def sequence_total(values: Tensor, segments: Segments) -> Tensor:
    """As `kernels.segments.sequence_total`."""
    out, offsets = torch.empty_like(values), _offsets(segments)
    ragged.segment_sum_kernel[_grid(offsets)](values.contiguous(), offsets, None, out, BLOCK=TOKEN_BLOCK)
    return out


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """As `kernels.segments.segment_sum`, in float32."""
    check_device(values)
    out = torch.empty(len(segments.bounds) - 1, device=values.device)
    if out.numel():
        ragged.segment_sum_kernel[(out.numel(),)](values.contiguous(), segments.offsets, out, None, BLOCK=TOKEN_BLOCK)
    return out


def group_advantage(rewards: Tensor, segments: Segments, *, divide: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Advantage [N] and rows kept per group [P]."""
    check_device(rewards)
    advantage = torch.empty(rewards.shape[0], device=rewards.device)
    kept = torch.zeros(len(segments.bounds) - 1, dtype=torch.int64, device=rewards.device)
    if kept.numel():
        ragged.group_advantage_kernel[(kept.numel(),)](
            rewards.contiguous(), segments.offsets, advantage, kept, eps, DIVIDE=divide, BLOCK=TOKEN_BLOCK
        )
    return advantage, kept


def keep_list(kept: Tensor, segments: Segments) -> Tensor:
    """Row numbers of kept groups [N], the first Σ kept entries in order, the rest −1."""
    index = torch.full((segments.bounds[-1],), -1, dtype=torch.int64, device=kept.device)
    if kept.numel():
        ragged.keep_list_kernel[(kept.numel(),)](kept, segments.offsets, index, BLOCK=TOKEN_BLOCK)
    return index


def pack(
    tokens: Tensor, segments: Segments, prompts: Tensor, answers: Segments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions [N], and rows, targets and owner [T]."""
    check_device(tokens)
    positions = torch.empty(segments.bounds[-1], dtype=torch.int64, device=tokens.device)
    rows, targets, owner = torch.empty(3, answers.bounds[-1], dtype=torch.int64, device=tokens.device)
    if len(segments.bounds) > 1:
        ragged.pack_kernel[(len(segments.bounds) - 1,)](
            tokens.contiguous(), segments.offsets, prompts, answers.offsets, positions, rows, targets, owner,
            BLOCK=TOKEN_BLOCK,
        )  # fmt: skip
    return positions, rows, targets, owner


def unpack(values: Tensor, segments: Segments, width: int, fill: float) -> Tensor:
    """[S, width] in float32."""
    check_device(values)
    out = torch.empty(len(segments.bounds) - 1, width, device=values.device)
    if out.numel():
        ragged.unpack_kernel[(out.shape[0],)](
            values.contiguous(), segments.offsets, out, width, float(fill), BLOCK=TOKEN_BLOCK
        )
    return out


def _offsets(segments: Segments) -> Tensor:
    """At least two offsets, so that a batch of no sequences is one empty sequence."""
    return segments.offsets if len(segments.bounds) > 1 else segments.offsets.repeat(2)


def _grid(offsets: Tensor) -> tuple[int]:
    return (offsets.numel() - 1,)
