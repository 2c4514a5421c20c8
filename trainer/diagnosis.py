"""What bounds a run, in one sentence with the number and what to change."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config

_WORTH_OVERLAPPING = 0.1  # of the step


def diagnosis(training: Sequence[Mapping[str, Any]], config: Config) -> list[str]:
    """The stage that took most of the steps' time, the first step (which warms up) left out.

    Empty where nothing was measured.
    """
    steady = training[1:]
    total = _sum(steady, "step_time")
    if not total:
        return []
    wait = _sum(steady, "time/wait_for_batch") / total
    rewards = _sum(steady, "time/wait_for_rewards") / total
    stages = {
        "generation": wait - rewards,
        "reward": rewards,
        "training": (_sum(steady, "time/score") + _sum(steady, "time/train")) / total,
        "publishing": _sum(steady, "time/publish") / total,
    }
    bound = max(stages, key=lambda name: stages[name])
    sentences = {
        "generation": lambda: _generation(steady, stages["generation"], config),
        "reward": lambda: f"the learner waited {rewards:.0%} of the step for rewards; raise reward.workers",
        "training": lambda: _training(stages["training"], wait, config),
        "publishing": lambda: (
            f"handing over weights took {stages['publishing']:.0%} of the step; put run.dir on a faster disk"
        ),
    }
    return [f"{bound}-bound: {sentences[bound]()}"]


def _generation(steady: Sequence[Mapping[str, Any]], share: float, config: Config) -> str:
    explorer, learner = _sum(steady, "time/wait_for_explorer"), _sum(steady, "time/wait_for_learner")
    if explorer > learner:
        who = f" for completions, {explorer / (explorer + learner):.0%} of that for the explorer's"
        remedy = "raise explorer.processes or explorer.ahead_steps, or read recorded completions (explorer.store)"
    else:
        who = " for completions" + (
            f", {learner / (explorer + learner):.0%} of that for the learner's own" if learner else ""
        )
        raised = config.algorithm.lookahead + 1
        remedy = f"raise rollout.processes, or set algorithm.lookahead={raised}, which generates while training"
    return f"the learner waited {share:.0%} of the step{who}; {remedy}"


def _training(share: float, wait: float, config: Config) -> str:
    text = f"scoring and updates took {share:.0%} of the step, waiting for completions {wait:.0%}; "
    if wait > _WORTH_OVERLAPPING and config.algorithm.lookahead == 0:
        return text + "algorithm.lookahead=1 would generate while training; beyond that, add trainer ranks"
    size = "learner.micro_batch_tokens" if config.learner.micro_batch_tokens else "learner.micro_batch_rows"
    return text + f"more rollout processes would not help: add trainer ranks, or raise {size}"


def _sum(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name) or 0.0 for line in lines)
