"""What must be generated, as leases: a pure function of configuration, prompts and step, known before the run.

Under an algorithm.driver the position of a step is a further argument, decided before anybody may ask (core.pace).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

from core.anneal import Quota, quota_at
from core.config import Config
from core.lease_size import evaluation_prompts
from core.pace import Pace
from core.prompts import PromptSchedule
from core.schema import CompletionKey, Prompt, Sampling, Source, pack_tokens
from core.seeds import completion_seed, recorded_seed
from rollout.messages import Lease, LeaseItem

# Numbers of one visit to a prompt: more than any group and its replacements, so that they do not depend on either.
_NUMBERS_PER_VISIT = 1 << 16


class Demand:
    """Leases of every step and source. Leases of a step never change, so a lost one can be granted again, equal.

    `pace`: which position of the schedule each step has.
    """

    def __init__(self, config: Config, prompts: PromptSchedule, stop_token_ids: tuple[int, ...]) -> None:
        self.config, self._visit, self.pace = config, prompts.visit, Pace(config)
        # Leases of a step are made before its completions come, on one thread: others only ever find it cached.
        steps_in_use = config.explorer.ahead_steps + config.algorithm.lookahead + 2
        self.prompts_at = lru_cache(maxsize=2 * steps_in_use)(prompts.at)
        rollout, explorer = config.rollout, config.explorer
        self.sampling = {
            Source.EXPLORER: Sampling(
                temperature=explorer.temperature,
                top_p=explorer.top_p,
                top_k=explorer.top_k,
                max_tokens=explorer.max_response_tokens or rollout.max_response_tokens,
                stop_token_ids=stop_token_ids,
            ),
            Source.LEARNER: Sampling(
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                max_tokens=rollout.max_response_tokens,
                stop_token_ids=stop_token_ids,
            ),
        }

    def quota(self, step: int) -> Quota:
        """G_w and G_s of `step`. ValueError for a step whose position is not decided yet."""
        return quota_at(self.pace.at(step), self.config.algorithm)

    def count(self, source: Source, step: int) -> int:
        """Completions `source` owes per prompt at `step`."""
        quota = self.quota(step)
        return quota.explorer if source is Source.EXPLORER else quota.learner

    @property
    def explorer_steps(self) -> list[int]:
        """The steps for which the explorer owes anything, or still may."""
        algorithm = self.config.algorithm
        steps = range(1, algorithm.steps + 1)
        return [step for step in steps if quota_at(self.pace.slowest(step), algorithm).explorer]

    @property
    def last_explorer_step(self) -> int:
        """The last of `explorer_steps`; 0 where there is none."""
        return max(self.explorer_steps, default=0)

    def leases(self, source: Source, step: int) -> Iterator[Lease]:
        """The leases that cover what `source` owes at `step`."""
        samples = tuple(range(self.count(source, step)))
        if not samples:
            return
        slots = list(enumerate(self.prompts_at(step)))
        size = self.config.rollout.lease_prompts
        for number, first in enumerate(range(0, len(slots), size)):
            items = tuple(
                self._item("train", source, step, slot, prompt, samples) for slot, prompt in slots[first : first + size]
            )
            yield self._lease("train", source, step, f"{source.value}-{step}-{number}", items)

    def replacement(self, key: CompletionKey) -> Lease:
        """A further sample of one prompt, in a lease of its own so that it depends on nothing else."""
        prompt = self.prompts_at(key.step)[key.slot]
        item = self._item("train", key.source, key.step, key.slot, prompt, (key.sample,))
        return self._lease(
            "train", key.source, key.step, f"{key.source.value}-{key.step}-slot{key.slot}-{key.sample}", (item,)
        )

    def evaluation(self, step: int, prompts: Sequence[Prompt]) -> Iterator[Lease]:
        """Leases that evaluate the learner after `step` on held-out prompts."""
        evaluation = self.config.evaluation
        sampling = Sampling(
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            top_k=evaluation.top_k,
            max_tokens=self.config.rollout.max_response_tokens,
            stop_token_ids=self.sampling[Source.LEARNER].stop_token_ids,
        )
        samples = tuple(range(evaluation.samples))
        size = evaluation_prompts(self.config)
        for first in range(0, len(prompts), size):
            chunk = list(enumerate(prompts))[first : first + size]
            items = tuple(self._item("eval", Source.LEARNER, step, slot, prompt, samples) for slot, prompt in chunk)
            yield self._lease("eval", Source.LEARNER, step, f"eval-{step}-{first}", items, sampling)

    def number(self, key: CompletionKey) -> int:
        """Which explorer completion of its prompt `key` is, counted over all steps: its name in a store."""
        assert key.sample < _NUMBERS_PER_VISIT, key
        return self._visit(key.step, key.slot) * _NUMBERS_PER_VISIT + key.sample

    def _seed(self, purpose: str, prompt: Prompt, key: CompletionKey) -> int:
        if self.config.explorer.store and key.source is Source.EXPLORER:
            return recorded_seed(prompt.uid, self.number(key))
        return completion_seed(self.config.run.seed, purpose, key)

    def _item(
        self, purpose: str, source: Source, step: int, slot: int, prompt: Prompt, samples: tuple[int, ...]
    ) -> LeaseItem:
        keys = [CompletionKey(source=source, step=step, slot=slot, sample=sample) for sample in samples]
        return LeaseItem(
            slot=slot,
            prompt_uid=prompt.uid,
            prompt_bytes=pack_tokens(prompt.token_ids),
            samples=samples,
            seeds=tuple(self._seed(purpose, prompt, key) for key in keys),
        )

    def _lease(
        self,
        purpose: Literal["train", "eval"],
        source: Source,
        step: int,
        lease_id: str,
        items: tuple[LeaseItem, ...],
        sampling: Sampling | None = None,
    ) -> Lease:
        if source is Source.EXPLORER:
            version = 0
        elif purpose == "eval":
            version = step
        else:
            version = max(step - 1 - self.config.algorithm.lookahead, 0)
        return Lease(
            lease_id=lease_id,
            purpose=purpose,
            source=source,
            step=step,
            version=version,
            sampling=sampling or self.sampling[source],
            items=items,
        )
