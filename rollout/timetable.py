"""Which role each process has when (rollout.roles = "handover"): known before the run, since the demand is.

Early on the learner owes few rollouts, so that its processes would idle while explorers bound the run: they begin as
explorers, and go back in time. In the end explorers go the other way (rollout/handover.py). A run that is resumed is
planned from the step it continues from: a role that would be given up at once costs the loading of a model.
"""

from collections.abc import Callable
from math import ceil

from core.anneal import Quota
from core.config import Config
from core.schema import Source


def learners_wanted(quota: Quota, explorers: int, learners: int) -> int:
    """Learner processes that a step keeps busy: its learner rows' share of all processes, rounded up."""
    if not quota.learner:
        return 0
    return min(learners, ceil((explorers + learners) * quota.learner / (quota.learner + quota.explorer)))


def return_steps(config: Config, quota: Callable[[int], Quota], after: int = 0) -> tuple[int, ...]:
    """For each learner process, the step whose rollouts it must be back for; 1 where it never works as an explorer.

    Process 0 stays where the run evaluates, since evaluations are the learner's from the start; so does one that would
    go back at once: the first `lookahead` + 1 steps after `after` are asked for together, and one is needed a step
    ahead. A process that no step needs is back for the one after the last.
    """
    learners, steps = config.rollout.processes, config.algorithm.steps
    if config.rollout.roles != "handover" or not config.explorer.processes:
        return (1,) * learners
    left = range(after + 1, steps + 1)
    wanted = {step: learners_wanted(quota(step), config.explorer.processes, learners) for step in left}
    needed = [next((step for step, count in wanted.items() if count > i), steps + 1) for i in range(learners)]
    at_once = after + config.algorithm.lookahead + 2
    return tuple(1 if step <= at_once or (i == 0 and config.data.eval) else step for i, step in enumerate(needed))


class Timetable:
    """The plan of a run from the step after `after` on, and how far it is carried out.

    Example: timetable = Timetable(config, demand.quota); pool.spawn(Source.LEARNER, 1, first=timetable.first_role(1));
    pool.hand_over(*names) where names = timetable.due(step)
    """

    def __init__(self, config: Config, quota: Callable[[int], Quota], after: int = 0) -> None:
        self.return_steps = return_steps(config, quota, after)
        self._away = {f"{Source.LEARNER}-{i}": step for i, step in enumerate(self.return_steps) if step > 1}

    def first_role(self, index: int) -> Source | None:
        """What learner process `index` begins as; None: as what it is."""
        return Source.EXPLORER if f"{Source.LEARNER}-{index}" in self._away else None

    def due(self, step: int) -> tuple[str, ...]:
        """Processes that go back now that the rollouts of `step` are asked for, each once: a step before they are
        needed, so that they finish what they hold and load the learner meanwhile."""
        names = tuple(name for name, back in self._away.items() if step + 1 >= back)
        for name in names:
            del self._away[name]
        return names

    def learners(self, step: int) -> int:
        """How many of the learner's own processes the plan has in its role at `step`."""
        return sum(back <= step for back in self.return_steps)

    def line(self) -> str:
        """The plan in a sentence; "" where every process keeps its role until the explorers are done."""
        away = [f"{name} until step {back - 1}" for name, back in self._away.items()]
        return f"learner processes that work as explorers first: {', '.join(away)}" if away else ""
