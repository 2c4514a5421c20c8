"""Is what the workers generate with what the learner has? The cheapest detector of stale or half-loaded weights.

A worker refuses a weights file whose digest is not the published one (rollout.generation), but only the log-probs show
what the engine then computes with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config, full_support
from core.metrics import is_evaluation

GAP = "sampling/sampling_logp_difference"  # /mean, /max, and /current_max of rows that π_old's own weights sampled
COUNT = "fault/logprob_gap"
# Half-updated weights were 5 and more off where we have seen them; engines of one precision agree to 1e-4 and 6e-2 on
# small models, and the largest difference of a million tokens is far above the mean.
CURRENT_BOUNDS = {"float32": 0.02, "bfloat16": 2.0}
# Older weights differ by themselves, by 0.02 in the mean where training is healthy. Tokens that became e times as
# likely or unlikely on average within `lookahead` steps are no longer a policy's own.
OLDER_BOUND = 1.0


def gap_bounds(config: Config) -> dict[str, float]:
    """The largest value of each metric that is no alarm; none where the two differ by themselves, or it is off."""
    bound = config.rollout.max_logprob_gap
    if bound != "auto":
        return {f"{GAP}/max": float(bound)} if bound else {}
    if not full_support(config.rollout):
        return {}
    return {f"{GAP}/current_max": CURRENT_BOUNDS[config.learner.dtype], f"{GAP}/mean": OLDER_BOUND}


class GapAlarm:
    """Counts the steps beyond a bound. `text` is what to say of the last step checked: at the 1st, 10th, 100th … one.

    `history` holds the metrics lines of a run that is resumed.

    Example: alarm = GapAlarm(config); line |= alarm.check(step, line)
    """

    def __init__(self, config: Config, history: Sequence[Mapping[str, Any]] = ()) -> None:
        training = [line for line in history if not is_evaluation(line)]
        self.bounds = gap_bounds(config)
        self.count = int(training[-1].get(COUNT) or 0) if training else 0
        self.text = ""

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The count after a step; a gap that is not finite is beyond every bound."""
        self.text = ""
        # Not `>`: NaN is beyond every bound.
        beyond = [name for name, bound in self.bounds.items() if name in metrics and not metrics[name] <= bound]
        if beyond:
            self.count += 1
            if self.count == 10 ** (len(str(self.count)) - 1):
                self.text = (
                    f"step {step}: {' and '.join(self._said(name, metrics[name]) for name in beyond)}, in {self.count} "
                    f"step{'s' if self.count > 1 else ''} so far (rollout.max_logprob_gap). Either a worker's weights "
                    "are stale or broken, or the engine computes otherwise than the trainer: what trains is "
                    "off-policy. Compare rollout.engine=torch; look at weights/held_min"
                )
        return {COUNT: float(self.count)}

    def _said(self, name: str, value: float) -> str:
        return (
            f"{name}, how far an engine's log-probs are from the trainer's, is {value:.3g}, above {self.bounds[name]:g}"
        )


def weight_metrics(held: Mapping[str, int]) -> dict[str, float]:
    """Oldest and newest weights version in the workers' engines."""
    return {"weights/held_min": min(held.values()), "weights/held_max": max(held.values())} if held else {}
