"""Rows of one forward pass and their tensors.

Shape suffixes: R rows of a micro-batch, T completion tokens of all its rows, one after the other without padding. Token
ids are [B, L]: padded, B = R rows of the longest row's L tokens (prompt and completion); packed, B = 1 line of L tokens
of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from core.schema import Source

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

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.tokens)


WeightedRow = tuple[Row, float]  # with the factor of each of its tokens in the update's loss


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass of one rank; everything per completion token is packed.

    Token ids are right-padded (padding stands where causal attention never looks, so no attention mask is needed and
    the value of a pad never matters), or packed one row after the other, with `position_BL` and `bounds_R1` set.
    `sources` are those of this forward pass on any rank: all ranks skip the same scoring passes.
    """

    index: int  # position among the rank's micro-batches of the step
    sources: frozenset[Source]
    ids_BL: Tensor  # int64
    position_BL: Tensor | None  # int64: position of the token in its row; None where padded
    bounds_R1: Tensor | None  # int32 [R + 1]: where each row starts in the line; None where padded
    longest: int  # tokens of the longest row
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

    @property
    def inputs(self) -> dict[str, Any]:
        """The decoder's keyword arguments."""
        if self.bounds_R1 is None:
            return {"input_ids": self.ids_BL}
        bounds = {"cu_seq_lens_q": self.bounds_R1, "cu_seq_lens_k": self.bounds_R1}
        longest = {"max_length_q": self.longest, "max_length_k": self.longest}
        return {"input_ids": self.ids_BL, "position_ids": self.position_BL, **bounds, **longest}

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on `device`."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor) and name != "start_R1"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def placeholder(row: Row) -> Row:
    """A row of weight 0 and no source, for a rank that has no row while the others have one."""
    return row._replace(tokens=row.tokens[:1], logprobs=row.logprobs[:1], source=NO_SOURCE, advantage=0.0)


def make_micro_batch(
    weighted_rows: Sequence[WeightedRow], sources: frozenset[Source], index: int, *, packed: bool
) -> MicroBatch:
    """Tensors of one forward pass; a token is predicted by the hidden state of the token before it."""
    rows = [row for row, _ in weighted_rows]
    longest = max(row.length for row in rows)
    bounds = np.concatenate([[0], np.cumsum([row.length for row in rows])])
    starts = bounds[:-1] if packed else np.arange(len(rows)) * longest
    ids = np.zeros(bounds[-1] if packed else len(rows) * longest, dtype=np.int64)
    states = []
    for start, row in zip(starts, rows):
        ids[start : start + row.length] = np.concatenate([row.prompt_ids, row.tokens])
        first = start + len(row.prompt_ids) - 1
        states.append(np.arange(first, first + len(row.tokens)))
    positions = np.concatenate([np.arange(row.length) for row in rows])
    lengths_R = np.array([len(row.tokens) for row in rows])

    def per_token(values: Sequence[float] | range, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), lengths_R)).to(dtype)

    return MicroBatch(
        index=index,
        sources=sources,
        ids_BL=torch.from_numpy(ids).view(1 if packed else len(rows), -1),
        position_BL=torch.from_numpy(positions)[None] if packed else None,
        bounds_R1=torch.from_numpy(bounds.astype(np.int32)) if packed else None,
        longest=longest,
        state_T=torch.from_numpy(np.concatenate(states)),
        target_T=torch.from_numpy(np.concatenate([row.tokens for row in rows]).astype(np.int64)),
        row_T=per_token(range(len(rows)), torch.int64),
        start_R1=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32)),
        source_T=per_token([row.source for row in rows], torch.int64),
        advantage_T=per_token([row.advantage for row in rows], torch.float32),
        sampler_T=torch.from_numpy(np.concatenate([row.logprobs for row in rows]).astype(np.float32)),
        explorer_share_T=per_token([row.explorer_share for row in rows], torch.float32),
        token_weight_T=per_token([weight for _, weight in weighted_rows], torch.float32),
    )
