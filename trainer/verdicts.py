"""Strict and lenient scores of benchmark completions."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from core.lenient import lenient_score
from core.rewards import RewardItem
from core.schema import Prompt
from core.scoring import RewardPool
from core.scoring_worker import Outcome
from trainer.generations import Generation

# Completions whose texts wait in memory at once.
SCORED_AT_ONCE = 2048
_LOOK_S = 1.0


class Verdict(NamedTuple):
    """`strict` and `lenient` are 1 or 0. A strict check that failed counts as wrong; `failure` names how it failed.

    Example: Verdict(strict=0.0, lenient=1.0, failure="timeout", detail="no score within 20 s")
    """

    strict: float
    lenient: float
    failure: str = ""
    detail: str = ""


def judge(
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[Generation]],
    *,
    reward: str,
    workers: int,
    timeout_s: float,
    on_progress: Callable[[int, int], None] = lambda done, wanted: None,
) -> list[list[Verdict]]:
    """The verdict on every completion, strict by the reward function `reward` in processes that can be killed."""
    pairs = [(prompt, row) for prompt, of_prompt in zip(prompts, rows, strict=True) for row in of_prompt]
    outcomes: dict[int, Outcome] = {}
    arrived = threading.Event()

    def take(ticket: int, outcome: Outcome) -> None:
        outcomes[ticket] = outcome
        arrived.set()

    with RewardPool(reward, workers=workers, timeout_s=timeout_s, on_score=take) as pool:
        for first in range(0, len(pairs), SCORED_AT_ONCE):
            tickets = range(len(pairs))[first : first + SCORED_AT_ONCE]
            for ticket in tickets:
                pool.submit(ticket, _item(*pairs[ticket]))
            while len(outcomes) < tickets.stop:
                arrived.wait(_LOOK_S)
                arrived.clear()
                pool.check()
            on_progress(len(outcomes), len(pairs))
    verdicts = iter([_verdict(outcomes[ticket], *pair) for ticket, pair in enumerate(pairs)])
    return [[next(verdicts) for _ in of_prompt] for of_prompt in rows]


def _item(prompt: Prompt, row: Generation) -> RewardItem:
    return RewardItem(
        prompt=prompt.text,
        completion=row.text,
        completion_ids=tuple(row.token_ids),
        answer=prompt.answer,
        columns=prompt.columns,
    )


def _verdict(outcome: Outcome, prompt: Prompt, row: Generation) -> Verdict:
    strict = 0.0 if outcome.reward is None else outcome.reward
    return Verdict(strict, lenient_score(row.text, prompt.answer), outcome.failure or "", outcome.detail)
