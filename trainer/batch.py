"""From groups to the tensors of optimizer updates.

    step ─ phases (one; two in authors_code) ─ mini-batches (one update each) ─ micro-batches (one forward pass each)

Which rows an update holds and how much each token weighs depend on the groups alone, never on the number of ranks, so
that 1, 2 or 4 ranks give the same update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from core.config import Config, Loss
from core.schema import Group, ScoredCompletion, Source
from trainer.micro_batch import SOURCES, MicroBatch, Row, WeightedRow, make_micro_batch, placeholder
from trainer.packing import Extent, pack_rows
from trainer.sequence_parallel import part_of
from trainer.step_metrics import staleness


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


def pack_step(
    groups: Sequence[Group], config: Config, *, rank: int = 0, world_size: int = 1, first_index: int = 0
) -> StepBatch:
    """Lay out the groups of one step, or of a part of it, in prompt order, as this rank's part of the step's updates.

    A mini-batch is `algorithm.mini_batch_prompts` consecutive groups (the last may have fewer where prompts were
    dropped). Mixing `authors_code` makes two phases: explorer rows of every group, then learner rows of every group.
    `first_index` is the number of the first micro-batch.
    Completions longer than `rollout.max_response_tokens` are cut to it and keep the reward of the whole answer, as in
    the authors' code.
    """
    assert groups, "a step without groups has nothing to train"
    by_source = config.algorithm.mixing == "authors_code"
    phases = []
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


def has_gradient(row: Row, weight: float, loss: Loss) -> bool:
    """False where each term of the row's loss has a gradient of exactly 0: it counts in the update, and needs no pass.

    The clipped loss needs an advantage, which groups of equal rewards have not; the KL penalty reaches the rows that
    loss.kl_rows names, the entropy bonus all. A row that left the loss (weight 0) has none of them.
    """
    penalised = loss.kl_coef > 0 and (loss.kl_rows == "all" or SOURCES[row.source] is Source.LEARNER)
    return weight != 0 and (row.advantage != 0 or penalised or loss.entropy_coef > 0)


def _rows(group: Group, config: Config) -> list[Row]:
    share = sum(row.completion.key.source is Source.EXPLORER for row in group.rows) / len(group.rows)
    return [_row(group, row, advantage, share, config) for row, advantage in zip(group.rows, group.advantages)]


def _row(group: Group, scored: ScoredCompletion, advantage: float, share: float, config: Config) -> Row:
    completion, limit = scored.completion, config.rollout.max_response_tokens
    truncated = completion.finish == "length" or completion.num_tokens > limit
    source = SOURCES.index(completion.key.source)
    dropped_negative = config.correction.explorer_negatives == "drop" and source == 0 and advantage < 0
    leaves = dropped_negative or (config.loss.overlong == "mask" and truncated)
    return Row(
        prompt_ids=group.prompt.token_ids,
        tokens=completion.tokens[:limit],
        logprobs=completion.logprobs[:limit],
        advantage=advantage,
        source=source,
        explorer_share=share,
        in_loss=not leaves,
        current=completion.key.source is Source.LEARNER and staleness(scored, group.step) == 0,
    )


def _mini_batch(rows: list[Row], config: Config, rank: int, world_size: int, first_index: int) -> MiniBatch:
    """Share the rows out into micro-batches and these to the ranks in turn.

    Every rank gets the same number of micro-batches, since each is a collective under DeepSpeed. Under
    learner.sequence_parallel, consecutive ranks get parts of the same ones.
    """
    num_tokens = sum(len(row.tokens) for row in rows)
    weights = token_weights(rows, config.loss, config.rollout.max_response_tokens)
    max_tokens, share = config.learner.micro_batch_tokens, config.learner.share_prompts
    every = not config.learner.skip_zero_gradient
    weighted = [(row, weight) for row, weight in zip(rows, weights) if every or has_gradient(row, weight, config.loss)]
    line_size = config.learner.sequence_parallel  # ranks that compute the same rows, a part of the tokens each
    assert world_size % line_size == 0, f"lines of {line_size} ranks and {world_size} ranks"
    takers = world_size // line_size
    if not weighted:
        parts = [list[WeightedRow]() for _ in range(takers)]  # it stays an update: momentum moves the weights
    elif max_tokens:
        parts = _by_tokens(weighted, max_tokens * line_size, takers, share=share)
    else:
        parts = _by_rows(weighted, config.learner.micro_batch_rows, takers)
    micro_batches: list[MicroBatch] = []
    for start in range(0, len(parts), takers):
        peers = parts[start : start + takers]
        sources = frozenset(SOURCES[row.source] for row, _ in chain.from_iterable(peers))
        mine = peers[rank // line_size] or [(placeholder(rows[0]), 0.0)]
        index = first_index + len(micro_batches)
        micro_batch = make_micro_batch(mine, sources, index, packed=max_tokens > 0, share=share)
        micro_batches.append(part_of(micro_batch, rank % line_size, line_size) if line_size > 1 else micro_batch)
    return MiniBatch(tuple(micro_batches), num_rows=len(rows), num_tokens=num_tokens)


def _by_rows(rows: list[WeightedRow], max_rows: int, ranks: int) -> list[list[WeightedRow]]:
    """Sorted by source and length and split evenly.

    Sorting by length cuts padding; by source, so that at most one forward pass per rank mixes sources that need
    different scoring passes.
    """
    # Stable: equal rows keep the prompts' order.
    ordered = sorted(rows, key=lambda pair: (pair[0].source, -pair[0].length))
    num_parts = -(-len(rows) // (max_rows * ranks)) * ranks
    bounds = [len(rows) * i // num_parts for i in range(num_parts + 1)]
    return [ordered[start:stop] for start, stop in pairwise(bounds)]


def _by_tokens(rows: list[WeightedRow], max_tokens: int, ranks: int, *, share: bool) -> list[list[WeightedRow]]:
    """Each source by itself, packed to `max_tokens` tokens and balanced by cost."""
    parts = []
    for source in range(len(SOURCES)):
        members = [pair for pair in rows if pair[0].source == source]
        if members:
            extents = [Extent(row.length, len(row.prompt_ids), row.prompt_ids) for row, _ in members]
            bins = pack_rows(extents, max_tokens=max_tokens, ranks=ranks, share=share)
            parts += [[members[i] for i in positions] for positions in bins]
    return parts
