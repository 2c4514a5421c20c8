"""The mixer: exactly G_w explorer and G_s learner completions for every prompt of a step, each scored once.

consumes     completions (from the pool's thread, by `receive`) and rewards (from the scorer's thread)
produces     groups, by `collect`
waits for    the last scored completion of the step
unblocked by a score, a failed reward (which asks for a replacement), an error, or a deadline
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from core.config import Config
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source
from core.scoring_worker import Outcome
from rollout.buffer import ReplayBuffer
from rollout.demand import Demand
from rollout.evaluation import Evaluation
from rollout.grouping import form_groups
from rollout.ledger import RESCUED, Ledger
from rollout.messages import Lease
from rollout.patience import Patience
from rollout.pool import WorkerPool
from rollout.reuse import Reuse
from rollout.rewarding import FailureLog, Rewarder, Ticket


class NothingToTrain(RuntimeError):
    """Every prompt of a step was dropped."""


class Mixer:
    """Asks for completions ahead, and hands out whole groups. Why rewards fail goes to `on_event` and `reward_log`.

    `why_unfit` gives the reason why a completion cannot train, or None: it is dropped under that reason and replaced
    as one whose reward fails is. (Nobody can be asked again: the same lease gives the same completion.)

    Raises ValueError for a reward function that cannot be used.

    Example:
        mixer.request(1)
        groups = mixer.collect(1)
    """

    def __init__(
        self,
        config: Config,
        demand: Demand,
        pool: WorkerPool,
        buffer: ReplayBuffer,
        ledger: Ledger,
        *,
        decode: Callable[[Sequence[int]], str],
        on_wait: Callable[[str, float], None],
        on_event: Callable[[str], None],
        reward_log: Path,
        reuse: Reuse | None = None,
        why_unfit: Callable[[Completion], str | None] = lambda completion: None,
    ) -> None:
        self.config, self.demand, self.pool, self.buffer, self.ledger = config, demand, pool, buffer, ledger
        self._reuse, self._why_unfit = reuse, why_unfit
        self._requested = dict.fromkeys(Source, 0)  # last step asked for
        self._replacing = threading.Lock()  # rewards fail on the scorer's thread and, after a resume, on the trainer's
        self._replaced: set[CompletionKey] = set()
        self._evaluation: Evaluation | None = None
        failures = FailureLog(config.reward.function, reward_log, say=on_event)
        self._rewards = Rewarder(config.reward, failures, decode=decode, on_score=self._on_score)
        self._patience = Patience(
            buffer,
            (pool, self._rewards),
            limit_s=config.stream.starvation_s,
            meanwhile=self._read_recorded,  # a replacement may be on record
            on_wait=on_wait,
        )

    def request(self, step: int) -> None:
        """Ask the learner for `step` and the explorer for as far ahead as is allowed. Asking again does nothing."""
        horizon = min(step + self.config.explorer.ahead_steps - 1, self.config.algorithm.steps)
        for source, last in ((Source.EXPLORER, horizon), (Source.LEARNER, step)):
            for ahead in range(self._requested[source] + 1, last + 1):
                self._ask([lease for lease in self.demand.leases(source, ahead) if not self._complete(lease)])
            self._requested[source] = max(self._requested[source], last)
        self._read_recorded()

    @property
    def wanted_step(self) -> int:
        """The last step that the trainer itself, and not only the explorers' head start, asked for."""
        return self._requested[Source.LEARNER]

    def receive(self, purpose: str, completion: Completion) -> None:
        """A validated completion arrived (called on the pool's thread)."""
        key = completion.key
        if purpose == "eval":
            if self._evaluation is not None and self._evaluation.arrive(completion):
                self._rewards.submit(("eval", key), completion, self._evaluation.prompts[key.slot])
        else:
            if self._reuse is not None:
                self._reuse.record(completion)
            self._enter(completion)

    def collect(self, step: int, *, first: int = 0, prompts: int | None = None) -> tuple[Group, ...]:
        """Take groups of `step` out of the buffer, in prompt order, once their prompts are complete or dropped.

        All that are left from slot `first` on, or the next `prompts` of them, whatever of the others is here: which
        groups these are does not depend on what arrived first. With the last of them the step is over for the buffer.
        """
        slots, per_prompt = range(first, len(self.demand.prompts_at(step))), sum(self.demand.quota(step))
        complete = partial(self.buffer.complete, step, slots, prompts, per_prompt)

        def missing() -> int:
            return self.buffer.missing(step, self.buffer.window(step, slots, prompts), per_prompt)

        groups = None
        while groups is None:
            self._patience.wait(f"step {step}", missing, complete)
            with self.buffer.still():  # a reward that failed since may have dropped a prompt
                if complete():
                    groups = self._take(step, self.buffer.window(step, slots, prompts), prompts)
        if not groups and not first:
            why = self._rewards.failures.summary()
            raise NothingToTrain(
                f"step {step}: every prompt was dropped because its rewards failed{f': {why}' if why else ''}"
            )
        with self._replacing:
            self._replaced = {key for key in self._replaced if key.step >= step}
        return groups

    def _take(self, step: int, slots: Sequence[int], prompts: int | None) -> tuple[Group, ...]:
        """The groups of complete slots, out of the buffer."""
        scored = [row for key, row in self.buffer.scored(step).items() if key.slot in slots]
        groups, rescued = form_groups(scored, self.demand.prompts_at(step), self.config.algorithm)
        self._assert_fresh(step, groups)
        self.buffer.drop(rescued, RESCUED)
        rest = range(slots[-1] + 1 if slots else 0, len(self.demand.prompts_at(step)))
        last = prompts is None or len(slots) < prompts or not self.buffer.window(step, rest, 1)
        self.buffer.take(step, [row.completion.key for group in groups for row in group.rows], last=last)
        return groups

    def _assert_fresh(self, step: int, groups: Sequence[Group]) -> None:
        """Staleness is bounded by `lookahead`: rollout.judge rejected what is older, and its lease was given again."""
        oldest = max(step - 1 - self.config.algorithm.lookahead, 0)
        for completion in (row.completion for group in groups for row in group.rows):
            assert completion.key.source is Source.EXPLORER or completion.version >= oldest, (completion.key, oldest)

    def explorer_is_done(self, step: int) -> bool:
        """Whether all of `step` is collected and no explorer completion can be wanted any more: all are scored."""
        last = self.demand.last_explorer_step
        if self.buffer.trained_step < step or self._requested[Source.EXPLORER] < last:
            return False
        for ahead in range(step + 1, last + 1):
            scored = sum(key.source is Source.EXPLORER for key in self.buffer.scored(ahead))
            if scored < len(self.demand.prompts_at(ahead)) * self.demand.count(Source.EXPLORER, ahead):
                return False
        return True

    def evaluate(self, step: int, prompts: Sequence[Prompt]) -> list[list[ScoredCompletion]]:
        """Completions of the learner after `step`, by prompt, without those whose reward failed."""
        self._evaluation = evaluation = Evaluation(prompts, self.config.evaluation.samples)
        self.pool.submit(list(self.demand.evaluation(step, prompts)))
        self._patience.wait(f"evaluation after step {step}", evaluation.missing, lambda: evaluation.missing() == 0)
        self._evaluation = None
        return evaluation.by_prompt()

    def resume(self, step: int) -> None:
        """Continue after `step` with what a checkpoint brought back into the buffer: score it, replace what failed."""
        self._requested = dict.fromkeys(Source, step)
        if self._reuse is not None:
            self._reuse.resume(*self.ledger.past(Source.EXPLORER))
        state = self.buffer.state()
        for completion in state.completions:
            self._score(completion)
        for key in state.failed:
            self._replace(key)

    def close(self) -> None:
        """Stop scoring."""
        self._rewards.close()

    def _enter(self, completion: Completion) -> None:
        if self.buffer.insert(completion):
            if reason := self._why_unfit(completion):
                self._fail(completion.key, reason)
            else:
                self._score(completion)

    def _score(self, completion: Completion) -> None:
        key = completion.key
        self._rewards.submit(("train", key), completion, self.demand.prompts_at(key.step)[key.slot])

    def _ask(self, leases: list[Lease]) -> None:
        """Have leases generated, but for what is on record."""
        self.pool.submit(leases if self._reuse is None else self._reuse.missing(leases))

    def _read_recorded(self) -> None:
        """Take what is on record for the step that is wanted, and for later ones while the buffer has room."""
        if self._reuse is None:
            return
        for completion in self._reuse.due(self.wanted_step, self.buffer.has_room, self.buffer.knows):
            self.ledger.reuse(completion.key.source)
            self._enter(completion)

    def _complete(self, lease: Lease) -> bool:
        """Whether a checkpoint already brought back all of a lease."""
        return all(
            self.buffer.knows(CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample))
            for item in lease.items
            for sample in item.samples
        )

    def _on_score(self, ticket: Ticket, outcome: Outcome, text: str) -> None:
        purpose, key = ticket
        if purpose == "eval":
            if self._evaluation is not None:
                self._evaluation.score(key, outcome.reward, text)
                self.buffer.notify()
        elif outcome.reward is not None:
            self.buffer.score(key, outcome.reward, text)
        else:
            self._fail(key, f"reward_{outcome.failure}")

    def _fail(self, key: CompletionKey, reason: str) -> None:
        """Drop a completion that cannot train, and have it replaced."""
        self.buffer.fail_reward(key, reason)
        self._replace(key)

    def _replace(self, failed: CompletionKey) -> None:
        """Ask for further samples of the same source and prompt, one for each that failed, while tries last."""
        with self._replacing:
            same = [
                key for key in self.buffer.failed(failed.step) if (key.source, key.slot) == (failed.source, failed.slot)
            ]
            if len(same) > self.config.reward.max_tries:
                self.buffer.drop_prompt(failed.step, failed.slot)
                return
            first = self.demand.count(failed.source, failed.step)
            for sample in range(first, first + len(same)):
                key = CompletionKey(source=failed.source, step=failed.step, slot=failed.slot, sample=sample)
                if key not in self._replaced and not self.buffer.knows(key):
                    self._replaced.add(key)
                    self.ledger.replace(key.source)
                    self._ask([self.demand.replacement(key)])
