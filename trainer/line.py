"""Rows one after the other in one line, without padding; rows of one prompt share its tokens.

A row needs no forward pass of its own over its prompt: keys and values of the prompt are the same for all rows of it.
The line then holds, for a prompt p₀ … p_{P−1} and its rows,

    p₀ … p_{P−2} │ p_{P−1} a₁ … a_{A−1} │ p_{P−1} b₁ … b_{B−1} │ …

in segments, each of which attends to keys of its own: to itself and, after the first, to p₀ … p_{P−2} before that.
p_{P−1} stays with each row, so that every hidden state predicts at most one token, and no row's last token is there,
which would predict nothing. Values and gradients are those of rows by themselves.

Shape suffixes: N tokens of the line, S segments, K keys of all segments, T completion tokens of all rows.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch


class Line(NamedTuple):
    """`inputs`: keyword arguments of a decoder under `attention.packed_attention`.

    input_ids and position_ids are int64 [1, N], cu_seq_lens_q and cu_seq_lens_k int32 [S + 1]. key_index, int64 [K], is
    the place in the line of each key; it is left out where keys are the line itself.
    """

    inputs: dict[str, Any]
    state_T: np.ndarray  # int64: where in the line stands the hidden state that predicts the token


def lay_out(rows: Sequence[tuple[Sequence[int], np.ndarray]], *, share: bool) -> Line:
    """A line of (prompt, completion) pairs. With `share`, neighbours of equal prompts share all but its last token."""
    segments: list[_Segment] = []
    states, end = [], 0
    for prompt, run in groupby(rows, key=lambda row: row[0]):
        members = [tokens for _, tokens in run]
        shared = len(prompt) - 1 if share and len(members) > 1 else 0
        before = np.arange(end, end + shared)
        if shared:
            segments.append(_Segment(np.asarray(prompt[:shared]), 0, before))
            end += shared
        for tokens in members:
            ids = np.concatenate([prompt[shared:], tokens[:-1]])
            segments.append(_Segment(ids, shared, np.concatenate([before, np.arange(end, end + len(ids))])))
            first = end + len(prompt) - 1 - shared
            states.append(np.arange(first, first + len(tokens)))
            end += len(ids)
    return Line(_inputs(segments), np.concatenate(states))


class _Segment(NamedTuple):
    ids: np.ndarray
    first: int  # position of its first token in its row
    keys: np.ndarray  # places in the line


def _inputs(segments: Sequence[_Segment]) -> dict[str, Any]:
    queries = [len(segment.ids) for segment in segments]
    keys = [len(segment.keys) for segment in segments]
    positions = [np.arange(segment.first, segment.first + len(segment.ids)) for segment in segments]
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate([segment.ids for segment in segments]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "cu_seq_lens_q": _bounds(queries), "cu_seq_lens_k": _bounds(keys),
        "max_length_q": max(queries), "max_length_k": max(keys),
    }  # fmt: skip
    if queries != keys:
        inputs["key_index"] = torch.from_numpy(np.concatenate([segment.keys for segment in segments]))
    return inputs


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
