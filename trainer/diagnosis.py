"""What bounds a run, in one sentence with the number and what to change."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config
from core.schema import Source

_WORTH_OVERLAPPING = 0.1  # of the step
_FEWEST_STEPS = 3  # of fewer, one slow step would be taken for the run


def diagnosis(training: Sequence[Mapping[str, Any]], config: Config) -> list[str]:
    """The stage that took most of the steps' time, without the steps in which a start of the run warms up.

    Empty where nothing was measured, or too few steps are left to say anything.

    Example: diagnosis([{"step_time": 1.0, "time/train": 0.8}] * 5, Config()) == ["training-bound: scoring and …"]
    """
    steady = _steady(training)
    total = _sum(steady, "step_time")
    if len(steady) < _FEWEST_STEPS or not total:
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


def _steady(training: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps but the first of each start, and the first that needs a source: it waits for a worker that loads a
    model, which is no generation."""
    started: set[tuple[Any, str]] = set()
    steady = []
    for line in training:
        start = line.get("run/start")
        needs = {(start, "")} | {(start, source) for source in Source if line.get(f"mix/{source}_quota")}
        if needs <= started:
            steady.append(line)
        started |= needs
    return steady


def _generation(steady: Sequence[Mapping[str, Any]], share: float, config: Config) -> str:
    explorer, learner = _sum(steady, "time/wait_for_explorer"), _sum(steady, "time/wait_for_learner")
    if explorer > learner:
        who = f" for completions, {explorer / (explorer + learner):.0%} of that for the explorer's"
        remedy = _explorer_remedy(steady[-1], config)
    else:
        who = " for completions" + (
            f", {learner / (explorer + learner):.0%} of that for the learner's own" if learner else ""
        )
        raised = config.algorithm.lookahead + 1
        remedy = f"raise rollout.processes, or set algorithm.lookahead={raised}, which generates while training"
    return f"the learner waited {share:.0%} of the step{who}; {remedy}"


def _explorer_remedy(last: Mapping[str, Any], config: Config) -> str:
    more = "raise explorer.processes or explorer.ahead_steps"
    if not config.explorer.store:
        return f"{more}, or read recorded completions (explorer.store)"
    if last.get("store/reused") and not last.get("store/generated"):
        return "all of these were read from explorer.store: put it on a faster disk"
    return f"{more}; a run that finds them in explorer.store will not wait for them"


def _training(share: float, wait: float, config: Config) -> str:
    text = f"scoring and updates took {share:.0%} of the step, waiting for completions {wait:.0%}; "
    if wait > _WORTH_OVERLAPPING and config.algorithm.lookahead == 0:
        return text + "algorithm.lookahead=1 would generate while training; beyond that, add trainer ranks"
    size = "learner.micro_batch_tokens" if config.learner.micro_batch_tokens else "learner.micro_batch_rows"
    return text + f"more rollout processes would not help: add trainer ranks, or raise {size}"


def _sum(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name) or 0.0 for line in lines)
