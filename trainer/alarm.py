"""Is what the workers generate with what the learner has? The cheapest detector of stale or half-loaded weights.

A worker refuses a weights file whose digest is not the published one (rollout.generation), but only the log-probs show
what the engine then computes with.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config
from core.metrics import is_evaluation

METRIC = "sampling/sampling_logp_difference/max"
COUNT = "fault/logprob_gap"
# Half-updated weights were 5 and more off where we have seen them; engines of one precision agree to 1e-4 and 6e-2 on
# small models, and the largest difference of a million tokens is far above the mean.
AUTO_BOUNDS = {"float32": 0.02, "bfloat16": 2.0}


def gap_bound(config: Config) -> float:
    """Largest |log π_old - log μ| that is no alarm; infinite where there is none."""
    bound = config.rollout.max_logprob_gap
    if bound != "auto":
        return float(bound) or math.inf
    truncated = config.rollout.top_p < 1 or config.rollout.top_k > 0
    return math.inf if truncated or config.algorithm.lookahead else AUTO_BOUNDS[config.learner.dtype]


class GapAlarm:
    """Counts the steps beyond the bound. `text` is what to say of the last step checked: at the 1st, 10th, 100th … one.

    `history` holds the metrics lines of a run that is resumed.

    Example: alarm = GapAlarm(config); line |= alarm.check(step, line)
    """

    def __init__(self, config: Config, history: Sequence[Mapping[str, Any]] = ()) -> None:
        training = [line for line in history if not is_evaluation(line)]
        self.bound, self.dtype = gap_bound(config), config.learner.dtype
        self.count = int(training[-1].get(COUNT) or 0) if training else 0
        self.text = ""

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The count after a step; a gap that is not finite is beyond every bound."""
        self.text = ""
        gap = metrics.get(METRIC)
        if gap is not None and math.isfinite(self.bound) and not gap <= self.bound:
            self.count += 1
            if self.count == 10 ** (len(str(self.count)) - 1):
                self.text = (
                    f"step {step}: an engine's log-prob is {gap:.3g} from the trainer's, more than {self.bound:g} "
                    f"(rollout.max_logprob_gap), in {self.count} step{'s' if self.count > 1 else ''} so far. Either "
                    "a worker's weights are stale or broken, or the engine computes otherwise than the trainer: what "
                    f"trains is off-policy. Compare rollout.engine=torch; look at weights/held_min and {METRIC}"
                )
        return {COUNT: float(self.count)}


def weight_metrics(held: Mapping[str, int]) -> dict[str, float]:
    """Oldest and newest weights version in the workers' engines."""
    return {"weights/held_min": min(held.values()), "weights/held_max": max(held.values())} if held else {}
