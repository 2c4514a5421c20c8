"""π_old, π_ref and π_ω: what an update needs besides π_θ, fixed for all of a step at the weights of its start."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from core.config import Config
from core.schema import Source
from trainer.backend import Backend
from trainer.correction import correction_of
from trainer.micro_batch import MicroBatch
from trainer.objective import Forward, Scores, fix_scores, score


class Scorer:
    """The scoring passes. `reference` and `explorer` are None where no loss needs them.

    `at_start`: the context in which π_θ is π_old.

    Example:
        scorer.begin_step(in_parts=False)
        with scorer.at_start(): scores = scorer.scores(micro_batch)
    """

    def __init__(
        self, config: Config, backend: Backend, *, reference: Forward | None, explorer: Forward | None
    ) -> None:
        self.config, self.backend, self.reference, self.explorer = config, backend, reference, explorer
        self.at_start: Callable[[], AbstractContextManager[None]] = nullcontext

    def begin_step(self, *, in_parts: bool) -> None:
        """π_old is π_θ as it is now; `in_parts`: rows will still be scored after updates, so its weights are kept."""
        self.at_start = nullcontext
        if in_parts and self.config.correction.needs_old:
            self.backend.start.keep()
            self.at_start = self.backend.start

    def scores(self, batch: MicroBatch) -> Scores:
        """The passes that some row of this micro-batch, on any rank, asks for; to be called in `at_start`."""
        config, impl = self.config, self.config.learner.kernels
        old_T = explorer_T = ref_T = None
        temperature = config.rollout.temperature
        if any(correction_of(config.correction, source).needs_old for source in batch.sources):
            old_T = score(self.backend.forward, batch, temperature=temperature, impl=impl)
        if self.reference is not None and (config.loss.kl_rows == "all" or Source.LEARNER in batch.sources):
            ref_T = score(self.reference, batch, temperature=temperature, impl=impl)
        if self.explorer is not None and Source.LEARNER in batch.sources:
            explorer_T = score(self.explorer, batch, temperature=config.explorer.temperature, impl=impl)
        return fix_scores(batch, config, old_T=old_T, explorer_T=explorer_T, ref_T=ref_T)
