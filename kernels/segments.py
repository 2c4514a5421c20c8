"""Reductions over the sequences of a packed batch, in a fixed order and without atomics.

Shapes: T tokens, S sequences; sequence s owns tokens [offsets[s], offsets[s+1]).
"""

import torch
from torch import Tensor

from kernels.arguments import Segments


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of each sequence's values: [T] -> [S]; an empty sequence sums to 0."""
    if values.numel() == 0:
        return values.new_zeros(len(segments.bounds) - 1)
    return torch.segment_reduce(values, "sum", offsets=segments.offsets, axis=0, unsafe=True, initial=0)


def sequence_total(values: Tensor, segments: Segments) -> Tensor:
    """Each token gets the sum over its sequence: [T] -> [T]."""
    return spread(segment_sum(values, segments), segments)


def spread(per_sequence: Tensor, segments: Segments) -> Tensor:
    """Each token gets its sequence's value: [S] -> [T]."""
    tokens = torch.arange(segments.bounds[-1], device=per_sequence.device)
    return per_sequence[torch.bucketize(tokens, segments.offsets[1:], right=True)]
