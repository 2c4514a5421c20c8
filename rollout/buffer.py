"""The replay buffer: completions between arrival and training, with their rewards.

One Condition; `close` and `fail` wake every waiter. Produced for by the pool's thread (insert) and the scorer's thread
(score, fail_reward); consumed by the trainer's thread (wait, take).
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice

import msgspec

from core.schema import Completion, CompletionKey, ScoredCompletion, Source
from rollout.ledger import SPARE, Ledger

PROMPT_DROPPED = "prompt_dropped"


class BufferState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint keeps: arrived completions without their rewards (scoring is repeated), and failed keys."""

    completions: list[Completion]
    failed: list[CompletionKey]


class ReplayBuffer:
    """Completions by step. At most once: a key that was ever inserted for a step, or whose step is trained, is refused.

    `max_bytes` bounds what may be asked for ahead (see `has_room`); the step being collected is always accepted,
    otherwise the trainer would wait for ever for completions it does not let in. `trained_step`: the last of
    which all is taken.
    """

    def __init__(self, ledger: Ledger, *, max_bytes: int) -> None:
        self.ledger = ledger
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._changed = threading.Condition()
        self._arrived: dict[int, dict[CompletionKey, Completion]] = defaultdict(dict)
        self._scored: dict[int, dict[CompletionKey, ScoredCompletion]] = defaultdict(dict)
        self._failed: dict[int, set[CompletionKey]] = defaultdict(set)
        self._dropped_slots: dict[int, set[int]] = defaultdict(set)
        self._scored_of_slot: dict[int, Counter[int]] = defaultdict(Counter)
        self._trained: set[CompletionKey] = set()  # of the step that is being taken
        self.trained_step = 0
        self._error: Exception | None = None

    def insert(self, completion: Completion) -> bool:
        """True if it is to be scored; otherwise it is counted, as rejected or as dropped with its prompt."""
        key = completion.key
        with self._changed:
            if key.step <= self.trained_step or key in self._trained:
                reason = "late"
            elif key in self._arrived[key.step] or key in self._failed[key.step]:
                reason = "duplicate"
            else:
                self.ledger.insert(key.source)
                if key.slot in self._dropped_slots[key.step]:
                    self.ledger.drop(key.source, PROMPT_DROPPED)
                    return False
                self._arrived[key.step][key] = completion
                self.num_bytes += completion.num_bytes
                self._changed.notify_all()
                return True
        self.ledger.reject(key.source, reason)
        return False

    def score(self, key: CompletionKey, reward: float, text: str) -> None:
        """Give an arrived completion its reward."""
        with self._changed:
            completion = self._arrived.get(key.step, {}).get(key)
            if completion is not None:  # its prompt may have been dropped meanwhile
                self._scored_of_slot[key.step][key.slot] += key not in self._scored[key.step]
                self._scored[key.step][key] = ScoredCompletion(completion=completion, reward=reward, text=text)
                self._changed.notify_all()

    def fail_reward(self, key: CompletionKey, reason: str) -> None:
        """Drop a completion that cannot be scored: its reward raised, timed out, … Never a reward of 0."""
        with self._changed:
            if self._remove(key):
                self._failed[key.step].add(key)
                self.ledger.drop(key.source, reason)
                self._changed.notify_all()

    def drop(self, keys: list[CompletionKey], reason: str) -> None:
        """Drop arrived completions for a reason of the mixer's."""
        with self._changed:
            for key in keys:
                if self._remove(key):
                    self.ledger.drop(key.source, reason)
            self._changed.notify_all()

    def drop_prompt(self, step: int, slot: int) -> None:
        """Give up a prompt of a step: what it has and what still arrives is dropped, and nothing of it is missing."""
        with self._changed:
            self._dropped_slots[step].add(slot)
            for key in [key for key in self._arrived.get(step, {}) if key.slot == slot]:
                self._remove(key)
                self.ledger.drop(key.source, PROMPT_DROPPED)
            self._changed.notify_all()

    def take(self, step: int, keys: list[CompletionKey], *, last: bool = True) -> None:
        """`keys` train at `step`: they leave the buffer for good; with the `last` of the step, its others are spare."""
        with self._changed:
            for key in keys:
                removed = self._remove(key)
                assert removed, f"{key} trains but is not resident"
                self.ledger.train(key.source, 1)
            self._trained.update(keys)
            if last:
                self._end_step(step)

    def scored(self, step: int) -> dict[CompletionKey, ScoredCompletion]:
        """A snapshot of the step's scored completions."""
        with self._changed:
            return dict(self._scored.get(step, {}))

    def window(self, step: int, slots: range, prompts: int | None = None) -> list[int]:
        """The first `prompts` (None: all) of the step's `slots` that are not dropped."""
        with self._changed:
            return list(self._window(step, slots, prompts))

    def missing(self, step: int, slots: Sequence[int], per_prompt: int) -> int:
        """Scored completions that these slots of a step still lack."""
        with self._changed:
            scored = self._scored_of_slot[step]
            return sum(per_prompt - scored[slot] for slot in slots)

    def complete(self, step: int, slots: range, prompts: int | None, per_prompt: int) -> bool:
        """Whether the slots of such a window lack nothing. Asked at every arrival: it ends at the first that does."""
        with self._changed:
            scored = self._scored_of_slot[step]
            return all(scored[slot] >= per_prompt for slot in self._window(step, slots, prompts))

    def failed(self, step: int) -> set[CompletionKey]:
        """A snapshot of the step's keys whose reward failed."""
        with self._changed:
            return set(self._failed.get(step, ()))

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Sleep until `ready` (called with the buffer locked) or the time is over. Raises what `fail` was given."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or ready(), timeout_s)
            if self._error is not None:
                raise self._error
            return ready()

    def notify(self) -> None:
        """Wake waiters whose condition lies outside the buffer."""
        with self._changed:
            self._changed.notify_all()

    def knows(self, key: CompletionKey) -> bool:
        """Whether `key` is resident or its reward failed."""
        with self._changed:
            return key in self._arrived.get(key.step, {}) or key in self._failed.get(key.step, ())

    def fail(self, error: Exception) -> None:
        """Wake every waiter with an error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def has_room(self, num_bytes: int) -> bool:
        """Whether that much more fits. Leases already out are not reserved for: a worker's credit bounds those."""
        return self.num_bytes + num_bytes <= self.max_bytes

    def resident(self) -> dict[Source, int]:
        """Completions inside, by source."""
        with self._changed:
            counts = dict.fromkeys(Source, 0)
            for key in self._keys():
                counts[key.source] += 1
            return counts

    def still(self) -> AbstractContextManager[object]:
        """A context in which nothing enters, leaves or gets a reward; the methods of this class may be called in it."""
        return self._changed

    def state(self) -> BufferState:
        """For a checkpoint."""
        with self._changed:
            completions = [self._arrived[key.step][key] for key in sorted(self._keys())]
            return BufferState(completions, sorted(key for keys in self._failed.values() for key in keys))

    def restore(self, state: BufferState, trained_step: int) -> None:
        """Continue from a checkpoint; the ledger is restored on its own, so nothing is counted again."""
        with self._changed:
            self.trained_step = trained_step
            for completion in state.completions:
                self._arrived[completion.key.step][completion.key] = completion
                self.num_bytes += completion.num_bytes
            for key in state.failed:
                self._failed[key.step].add(key)

    def _window(self, step: int, slots: range, prompts: int | None) -> Iterator[int]:
        dropped = self._dropped_slots.get(step, ())
        return islice((slot for slot in slots if slot not in dropped), prompts)

    def _end_step(self, step: int) -> None:
        for key in list(self._arrived.get(step, {})):
            self._remove(key)
            self.ledger.drop(key.source, SPARE)
        self.trained_step = step
        self._trained.clear()
        for table in (self._arrived, self._scored, self._failed, self._dropped_slots, self._scored_of_slot):
            table.pop(step, None)

    def _keys(self) -> Iterator[CompletionKey]:
        return (key for step in self._arrived.values() for key in step)

    def _remove(self, key: CompletionKey) -> bool:
        completion = self._arrived.get(key.step, {}).pop(key, None)
        if completion is None:
            return False
        if self._scored.get(key.step, {}).pop(key, None) is not None:
            self._scored_of_slot[key.step][key.slot] -= 1
        self.num_bytes -= completion.num_bytes
        return True
