"""From groups to the tensors of optimizer updates.

Shape suffixes: R rows of a micro-batch, L tokens of its longest row (prompt and completion), T completion tokens of all
its rows, one after the other without padding.

    step ─ phases (one; two in authors_code) ─ mini-batches (one update each) ─ micro-batches (one forward pass each)

Which rows an update holds and how much each token weighs depend on the groups alone, never on the number of ranks, so
that 1, 2 or 4 ranks give the same update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from core.config import Config, Loss
from core.schema import Group, ScoredCompletion, Source

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


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass of one rank, right-padded; everything per token is packed.

    Padding stands to the right, where causal attention never looks, so no attention mask is needed and the value of a
    pad never matters. `sources` are those of this forward pass on any rank: all ranks skip the same scoring passes.
    """

    index: int  # position among the rank's micro-batches of the step
    sources: frozenset[Source]
    ids_RL: Tensor  # int64
    state_T: Tensor  # int64: where in the flattened [R·L] stands the hidden state that predicts the token
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

    def to(self, device: torch.device) -> Self:
        """The same micro-batch with its tensors on `device`."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor) and name != "start_R1"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimizer update, this rank's part of them."""

    micro_batches: tuple[MicroBatch, ...]
    num_rows: int  # on all ranks
    num_tokens: int  # completion tokens on all ranks


@dataclass(frozen=True)
class StepBatch:
    """One step's updates."""

    step: int
    phases: tuple[tuple[MiniBatch, ...], ...]

    @property
    def mini_batches(self) -> tuple[MiniBatch, ...]:
        """Every mini-batch once."""
        return tuple(chain.from_iterable(self.phases))

    @property
    def num_tokens(self) -> int:
        """Completion tokens that the step trains on, on all ranks."""
        return sum(mini_batch.num_tokens for mini_batch in self.mini_batches)

    def updates(self, epochs: int) -> Iterator[MiniBatch]:
        """The step's mini-batches in the order of their updates: `epochs` passes over each phase."""
        for phase in self.phases:
            for _ in range(epochs):
                yield from phase


def pack_step(groups: Sequence[Group], config: Config, *, rank: int = 0, world_size: int = 1) -> StepBatch:
    """Lay out the groups of one step, in prompt order, as this rank's part of the step's updates.

    A mini-batch is `algorithm.mini_batch_prompts` consecutive groups (the last may have fewer where prompts were
    dropped). Mixing `authors_code` makes two phases: explorer rows of every group, then learner rows of every group.
    Completions longer than `rollout.max_response_tokens` are cut to it and keep the reward of the whole answer, as in
    the authors' code.
    """
    assert groups, "a step without groups has nothing to train"
    by_source = config.algorithm.mixing == "authors_code"
    phases = []
    first_index = 0
    for keep in ({0}, {1}) if by_source else ({0, 1},):
        parts = [part for group in groups if (part := [row for row in _rows(group, config) if row.source in keep])]
        phase = []
        for start in range(0, len(parts), config.algorithm.mini_batch_prompts):
            rows = list(chain.from_iterable(parts[start : start + config.algorithm.mini_batch_prompts]))
            phase.append(_mini_batch(rows, config, rank, world_size, first_index))
            first_index += len(phase[-1].micro_batches)
        if phase:
            phases.append(tuple(phase))
    return StepBatch(step=groups[0].step, phases=tuple(phases))


def token_weights(rows: Sequence[Row], loss: Loss, max_response_tokens: int) -> list[float]:
    """The factor of each row's tokens in the update's loss Σ weight · loss_token.

        token_mean     1 / Σ_rows L_row          sequence_mean  1 / (rows · L_row)
        dr_grpo        1 / (rows · max_response_tokens)     (arXiv:2503.20783)

    All counts are those of the whole update, before anything leaves the loss: a row that leaves it (weight 0) never
    makes the others weigh more. Correction masks are factors on the loss and do not change these weights either.
    """
    num_rows, num_tokens = len(rows), sum(len(row.tokens) for row in rows)
    match loss.aggregation:
        case "token_mean":
            weights = [1 / num_tokens for _ in rows]
        case "sequence_mean":
            weights = [1 / (num_rows * len(row.tokens)) for row in rows]
        case "dr_grpo":
            weights = [1 / (num_rows * max_response_tokens) for _ in rows]
    return [weight if row.in_loss else 0.0 for weight, row in zip(weights, rows)]


def _rows(group: Group, config: Config) -> list[Row]:
    share = sum(row.completion.key.source is Source.EXPLORER for row in group.rows) / len(group.rows)
    return [_row(group, row, advantage, share, config) for row, advantage in zip(group.rows, group.advantages)]


def _row(group: Group, scored: ScoredCompletion, advantage: float, share: float, config: Config) -> Row:
    completion, limit = scored.completion, config.rollout.max_response_tokens
    tokens = completion.tokens
    truncated = completion.finish == "length" or len(tokens) > limit
    source = SOURCES.index(completion.key.source)
    dropped_negative = config.correction.explorer_negatives == "drop" and source == 0 and advantage < 0
    leaves = dropped_negative or (config.loss.overlong == "mask" and truncated)
    return Row(
        prompt_ids=group.prompt.token_ids,
        tokens=tokens[:limit],
        logprobs=completion.logprobs[:limit],
        advantage=advantage,
        source=source,
        explorer_share=share,
        in_loss=not leaves,
    )


def _mini_batch(rows: list[Row], config: Config, rank: int, world_size: int, first_index: int) -> MiniBatch:
    """Sort by source and length, split evenly into micro-batches, deal them to the ranks in turn.

    Sorting by length cuts padding; by source, so that at most one forward pass per rank mixes sources that need
    different scoring passes. Every rank gets the same number of micro-batches, since each is a collective under
    DeepSpeed.
    """
    num_tokens = sum(len(row.tokens) for row in rows)
    weights = token_weights(rows, config.loss, config.rollout.max_response_tokens)
    # Stable: equal rows keep the prompts' order.
    ordered = sorted(zip(rows, weights), key=lambda pair: (pair[0].source, -pair[0].length))
    rounds = -(-len(rows) // (config.learner.micro_batch_rows * world_size))
    bounds = [len(rows) * i // (rounds * world_size) for i in range(rounds * world_size + 1)]
    parts = [ordered[start:stop] for start, stop in pairwise(bounds)]
    micro_batches = []
    for i in range(rounds):
        peers = parts[i * world_size : (i + 1) * world_size]
        sources = frozenset(SOURCES[row.source] for row, _ in chain.from_iterable(peers))
        mine = peers[rank] or [(_placeholder(rows[0]), 0.0)]
        micro_batches.append(_micro_batch(mine, sources, first_index + i))
    return MiniBatch(tuple(micro_batches), num_rows=len(rows), num_tokens=num_tokens)


def _placeholder(row: Row) -> Row:
    """A row of weight 0 and no source, for a rank that has no row while the others have one."""
    return row._replace(tokens=row.tokens[:1], logprobs=row.logprobs[:1], source=NO_SOURCE, advantage=0.0)


def _micro_batch(weighted_rows: Sequence[tuple[Row, float]], sources: frozenset[Source], index: int) -> MicroBatch:
    """Tensors of one forward pass; a token is predicted by the hidden state of the token before it."""
    rows = [row for row, _ in weighted_rows]
    width = max(row.length for row in rows)
    ids_RL = np.zeros((len(rows), width), dtype=np.int64)
    states = []
    for i, row in enumerate(rows):
        ids_RL[i, : row.length] = np.concatenate([row.prompt_ids, row.tokens])
        first = i * width + len(row.prompt_ids) - 1
        states.append(np.arange(first, first + len(row.tokens)))
    lengths_R = np.array([len(row.tokens) for row in rows])

    def per_token(values: Sequence[float] | range, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values), lengths_R)).to(dtype)

    return MicroBatch(
        index=index,
        sources=sources,
        ids_RL=torch.from_numpy(ids_RL),
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
