"""The optimizer updates of a step, each as soon as its prompts are complete.

Mini-batches are fixed by the prompts' order, so what an update holds does not depend on what arrived first, nor on
whether the step was waited for as a whole: both give the same parameters, bit for bit.
"""

from collections.abc import Iterator, Sequence

from core.config import Config
from core.schema import Group
from trainer.batch import MiniBatch, pack_step
from trainer.learner import Learner
from trainer.signals import SIGNALS
from trainer.stream import GroupStream
from trainer.timeline import Part
from trainer.world import World


class Updates:
    """Hands out mini-batches. `parts`: what came of the step that trains or trained last, and when.

    Example: for mini_batch in updates.of(step): learner.update(mini_batch)
    """

    def __init__(self, config: Config, stream: GroupStream, learner: Learner, world: World) -> None:
        self.config, self.stream, self.learner, self.world = config, stream, learner, world
        self.parts: list[Part] = []

    @property
    def groups(self) -> Sequence[Group]:
        """All groups so far."""
        return [group for part in self.parts for group in part.groups]

    def of(self, step: int) -> Iterator[MiniBatch]:
        """This rank's part of the step's updates, in their order, scored: `algorithm.epochs` passes over each phase."""
        algorithm, stages = self.config.algorithm, self.stream.stages
        in_parts = algorithm.in_parts
        self.parts, seen = [], list[MiniBatch]()
        for groups in self.stream.parts(step, algorithm.mini_batch_prompts if in_parts else None):
            self.parts.append(Part(groups, stages.last("wait")))
            with stages("pack"):
                first_index = sum(len(mini_batch.micro_batches) for mini_batch in seen)
                rank, size = self.world.rank, self.world.size
                batch = pack_step(groups, self.config, rank=rank, world_size=size, first_index=first_index)
            with stages("score"):
                if seen:
                    self.learner.score(batch)
                else:
                    self.learner.begin_step(batch, in_parts=in_parts)
            seen += batch.mini_batches
            yield from self._timed(batch.updates(1 if in_parts else algorithm.epochs))
        for _ in range(algorithm.epochs - 1 if in_parts else 0):
            yield from self._timed(seen)

    def _timed(self, mini_batches: Iterator[MiniBatch] | Sequence[MiniBatch]) -> Iterator[MiniBatch]:
        """Raises Stopped, on every rank, where a signal came checkpoint.grace_s ago: no update is left half done."""
        for mini_batch in mini_batches:
            SIGNALS.give_up(self.config.checkpoint.grace_s, self.world.highest)
            with self.stream.stages("train"):
                yield mini_batch
