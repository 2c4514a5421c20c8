"""What one evaluation is waiting for."""

import threading
from collections.abc import Sequence

from core.schema import Completion, CompletionKey, Prompt, ScoredCompletion


class Evaluation:
    """Collects `samples` scored completions of each held-out prompt; safe from the pool's and the scorer's threads."""

    def __init__(self, prompts: Sequence[Prompt], samples: int) -> None:
        self.prompts = prompts
        self._lock = threading.Lock()
        self._expected = len(prompts) * samples
        self._arrived: dict[CompletionKey, Completion] = {}
        self._rows: dict[CompletionKey, ScoredCompletion] = {}
        self._unscored = 0

    def arrive(self, completion: Completion) -> bool:
        """True if it is new."""
        with self._lock:
            if completion.key in self._arrived:
                return False
            self._arrived[completion.key] = completion
            return True

    def score(self, key: CompletionKey, reward: float | None, text: str) -> None:
        """Give a completion its reward; None: the reward failed, and it is not among the rows."""
        with self._lock:
            if reward is None:
                self._unscored += 1
            else:
                self._rows[key] = ScoredCompletion(completion=self._arrived[key], reward=reward, text=text)

    def missing(self) -> int:
        """Completions not scored yet."""
        with self._lock:
            return self._expected - len(self._rows) - self._unscored

    def by_prompt(self) -> list[list[ScoredCompletion]]:
        """Scored completions of each prompt, by sample."""
        rows: list[list[ScoredCompletion]] = [[] for _ in self.prompts]
        for key in sorted(self._rows):
            rows[key.slot].append(self._rows[key])
        return rows
