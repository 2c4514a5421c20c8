"""Rows of one forward pass and their tensors.

Shape suffixes: R rows of a micro-batch, T completion tokens of all its rows, one after the other without padding. Token
ids are [B, L]: padded, B = R rows of the longest row's L tokens (prompt and completion); packed, B = 1 line of L tokens
of all rows (`trainer.line`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from core.schema import Source
from trainer.line import Line, lay_out

SOURCES = (Source.EXPLORER, Source.LEARNER)  # `source_T` holds positions in this tuple
NO_SOURCE = -1


class Row(NamedTuple):
    """One completion on its way into a tensor, cut to the limit."""

    prompt_ids: tuple[int, ...]
    tokens: np.ndarray  # int32
    logprobs: np.ndarray  # float32, log μ
    advantage: float
    source: int  # position in SOURCES, or NO_SOURCE for a row that only fills a rank's place
    explorer_share: float  # G_w / G of its group
    in_loss: bool
    current: bool  # π_old sampled all of it: its weights are those of the step's start

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.tokens)


WeightedRow = tuple[Row, float]  # with the factor of each of its tokens in the update's loss


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass of one rank; everything per completion token is packed.

    Under learner.sequence_parallel it is a part of such a line: rows may begin or end elsewhere, or have no token here.
    Token ids are right-padded (padding stands where causal attention never looks, so no attention mask is needed and
    the value of a pad never matters), or packed one row after the other.
    `sources` are those of this forward pass on any rank: all ranks skip the same scoring passes.
    """

    index: int  # position among the rank's micro-batches of the step
    sources: frozenset[Source]
    inputs: dict[str, Any]  # the decoder's keyword arguments; input_ids are int64 [B, L]
    state_T: Tensor  # int64: where in the flattened [B·L] stands the hidden state that predicts the token
    target_T: Tensor  # int64: the token
    row_T: Tensor  # int64
    start_R1: (
        Tensor  # int32 [R + 1]: where each row's tokens start in T; stays on the CPU, so that reading it never waits
    )
    source_T: Tensor  # int64
    advantage_T: Tensor  # float32
    sampler_T: Tensor  # float32: log μ
    explorer_share_T: Tensor  # float32
    token_weight_T: Tensor  # float32: the factor of the token in the update's loss (`token_weights`)
    current_T: Tensor  # float32: 1 where π_old sampled the token, 0 where older weights or an explorer did

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on `device`."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor) and name != "start_R1"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        inputs = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs, **moved)


def placeholder(row: Row) -> Row:
    """A row of weight 0 and no source, for a rank that has no row while the others have one."""
    return row._replace(tokens=row.tokens[:1], logprobs=row.logprobs[:1], source=NO_SOURCE, advantage=0.0)


def make_micro_batch(
    weighted_rows: Sequence[WeightedRow], sources: frozenset[Source], index: int, *, packed: bool, share: bool = False
) -> MicroBatch:
    """Tensors of one forward pass; a token is predicted by the hidden state of the token before it.

    `share`: packed neighbours of one prompt share its tokens.
    """
    rows = [row for row, _ in weighted_rows]
    line = lay_out([(row.prompt_ids, row.tokens) for row in rows], share=share) if packed else _padded(rows)
    lengths_R = np.array([len(row.tokens) for row in rows])

    def per_token(values: Sequence[float] | range, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), lengths_R)).to(dtype)

    return MicroBatch(
        index=index,
        sources=sources,
        inputs=line.inputs,
        state_T=torch.from_numpy(line.state_T),
        target_T=torch.from_numpy(np.concatenate([row.tokens for row in rows]).astype(np.int64)),
        row_T=per_token(range(len(rows)), torch.int64),
        start_R1=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32)),
        source_T=per_token([row.source for row in rows], torch.int64),
        advantage_T=per_token([row.advantage for row in rows], torch.float32),
        sampler_T=torch.from_numpy(np.concatenate([row.logprobs for row in rows]).astype(np.float32)),
        explorer_share_T=per_token([row.explorer_share for row in rows], torch.float32),
        token_weight_T=per_token([weight for _, weight in weighted_rows], torch.float32),
        current_T=per_token([row.current for row in rows], torch.float32),
    )


def _padded(rows: Sequence[Row]) -> Line:
    longest = max(row.length for row in rows)
    ids, states = np.zeros((len(rows), longest), dtype=np.int64), []
    for index, row in enumerate(rows):
        ids[index, : row.length] = np.concatenate([row.prompt_ids, row.tokens])
        first = index * longest + len(row.prompt_ids) - 1
        states.append(np.arange(first, first + len(row.tokens)))
    return Line({"input_ids": torch.from_numpy(ids)}, np.concatenate(states))
