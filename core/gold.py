"""Whether math-verify can find anything right: a look at some gold answers before a run that is rewarded by them."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from core.math_answers import require_gold
from core.rewards import RewardItem
from core.scoring import RewardPool
from core.scoring_worker import Outcome

READER = "core.gold:readable"
SAMPLED = 200
GOLD_TIMEOUT_S = 5.0  # of one gold answer, which may be one that SymPy does not come back from
LOOK_TIMEOUT_S = 15.0


def readable(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """A reward function for scoring processes: 1, or ValueError where the gold answer cannot be matched."""
    for gold in answer:
        require_gold(gold)
    return [1.0 for _ in completions]


def look_at_golds(key: str, golds: Sequence[str]) -> str:
    """Of up to 200 gold answers, spread over the data of `key`, how many math-verify can match, in a line.

    Takes at most 15 s and the start of a process. Raises ValueError where it can match none.
    """
    sample = [golds[place * len(golds) // min(SAMPLED, len(golds))] for place in range(min(SAMPLED, len(golds)))]
    outcomes = _outcomes(sample)
    failed = sorted(place for place, outcome in outcomes.items() if outcome.failure)
    if not outcomes:
        return f"warning: {key}: no gold answer could be looked at within {LOOK_TIMEOUT_S:g} s"
    if not failed:
        return f"{key}: {len(outcomes):,} gold answers looked at: math-verify reads them all"
    why = outcomes[failed[0]].detail.removeprefix("ValueError: ")
    first = f"the first is {sample[failed[0]][:100]!r}: {why}"
    if len(failed) == len(outcomes) and all(outcome.failure == "raised" for outcome in outcomes.values()):
        raise ValueError(
            f'{key}: reward.function = "math" would find nothing right: of {len(outcomes):,} gold answers looked at '
            f"math-verify can match none; {first}. Name the column of the final answers with data.answer_column"
        )
    return (
        f"warning: {key}: {len(failed):,} of {len(outcomes):,} gold answers looked at can never be matched by "
        f"math-verify; {first}"
    )


def _outcomes(sample: Sequence[str]) -> dict[int, Outcome]:
    """By place, as many as there was time for."""
    found: dict[int, Outcome] = {}
    arrived = threading.Condition()

    def take(place: int, outcome: Outcome) -> None:
        with arrived:
            found[place] = outcome
            arrived.notify()

    with RewardPool(READER, workers=1, timeout_s=GOLD_TIMEOUT_S, on_score=take) as pool:
        for place, gold in enumerate(sample):
            pool.submit(place, RewardItem(prompt="", completion="", answer=gold))
        deadline = time.monotonic() + LOOK_TIMEOUT_S
        with arrived:
            while len(found) < len(sample) and (left := deadline - time.monotonic()) > 0:
                arrived.wait(left)
            return dict(found)
