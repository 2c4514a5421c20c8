"""Rewards of completions as the mixer asks for them, and why those failed that did: said once, and kept in a log."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from core.config import Reward
from core.rewards import RewardItem
from core.schema import Completion, CompletionKey, Prompt
from core.scoring import RewardPool
from core.scoring_worker import Failure, Outcome
from rollout.status import Waiting

MAX_REASONS = 200  # distinct ones that are kept: a message that quotes the completion differs every time
SHOWN_CHARACTERS = 200  # of a completion, in the log

Ticket = tuple[str, CompletionKey]  # "train" or "eval"


class Rewarder:
    """Scores completions in the processes of a RewardPool. `on_score(ticket, outcome, text)` is called in its thread.

    Raises ValueError where the reward function cannot be used. That the data have the columns which it requires is
    looked at before (trainer.checks).

    Example: Rewarder(config.reward, failures, decode=tokenizer.decode, on_score=mixer.scored)
    """

    def __init__(
        self,
        settings: Reward,
        failures: "FailureLog",
        *,
        decode: Callable[[Sequence[int]], str],
        on_score: Callable[[Ticket, Outcome, str], None],
    ) -> None:
        self.failures, self._decode, self._on_score = failures, decode, on_score
        self._pool = RewardPool(
            settings.function, workers=settings.workers, timeout_s=settings.timeout_s, on_score=self._scored
        )
        self.check, self.close = self._pool.check, self._pool.close

    def submit(self, ticket: Ticket, completion: Completion, prompt: Prompt) -> None:
        """Score a completion of `prompt`. Raises RuntimeError after the pool has failed."""
        tokens = completion.tokens.tolist()
        item = RewardItem(
            prompt=prompt.text,
            completion=self._decode(tokens),
            completion_ids=tuple(tokens),
            answer=prompt.answer,
            columns=prompt.columns,
        )
        purpose, key = ticket  # what the trainer waits for does not queue behind what explorers made ahead
        self._pool.submit((ticket, prompt.uid, item.completion), item, urgency=(purpose != "eval", key.step))

    def waiting_for(self) -> Waiting:
        """How many completions wait for their reward, and when the last one got it."""
        unscored = self._pool.submitted - self._pool.finished
        line = f"{unscored} completions wait for their reward" if unscored else ""
        return Waiting(line, self._pool.finished_s)

    def _scored(self, asked: tuple[Ticket, str, str], outcome: Outcome) -> None:
        ticket, uid, text = asked
        if outcome.failure is not None:
            self.failures.note(ticket, uid, text, outcome)
        self._on_score(ticket, outcome, text)


class FailureLog:
    """Why rewards failed. The first failure of each kind is said at once; distinct reasons go to `file`, 200 at most.

    Example: FailureLog("my_rewards:score", run_dir / "logs" / "reward.log", say=console.say)
    """

    def __init__(self, function: str, file: Path, *, say: Callable[[str], None]) -> None:
        self.file = file
        self._function, self._say = function, say
        self._lock = threading.Lock()  # the scorer's thread notes, the trainer's asks
        self._kinds: set[Failure] = set()
        self._counts: Counter[str] = Counter()
        self._total = 0

    def note(self, ticket: Ticket, uid: str, text: str, outcome: Outcome) -> None:
        """A completion with `text` of prompt `uid` got no reward."""
        assert outcome.failure is not None
        (purpose, key), reason = ticket, self._reason(outcome)
        where = f"step {key.step}" if purpose == "train" else f"the evaluation after step {key.step}"
        with self._lock:
            self._total += 1
            new = reason not in self._counts
            if not new or len(self._counts) < MAX_REASONS:
                self._counts[reason] += 1
                if new:
                    self._write(f"{where}, prompt {uid}, {key.source} sample {key.sample}: {reason}\n", text)
            first = outcome.failure not in self._kinds
            self._kinds.add(outcome.failure)
        if first:
            self._say(
                f"warning: {reason}, first in {where}, prompt {uid}. Completions without a reward are left "
                f"out of training and count as wrong in an evaluation; each distinct reason is in {self.file}"
            )

    def summary(self) -> str:
        """The most frequent reason, and how frequent it is; "" where nothing failed."""
        with self._lock:
            if not self._counts:
                return ""
            [(reason, count)] = self._counts.most_common(1)
            return f"{reason} ({count} of {self._total} failures so far; each distinct reason is in {self.file})"

    def _reason(self, outcome: Outcome) -> str:
        verb = " raised" if outcome.failure == "raised" else ":"
        bound = " (reward.timeout_s)" if outcome.failure == "timeout" else ""
        return f'reward.function = "{self._function}"{verb} {outcome.detail}{bound}'

    def _write(self, line: str, text: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        more = " …" if len(text) > SHOWN_CHARACTERS else ""
        with self.file.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"{line}    its completion: {text[:SHOWN_CHARACTERS]!r}{more}\n")
            if len(self._counts) == MAX_REASONS:
                log.write(f"{MAX_REASONS} distinct reasons: later ones are not written down\n")
