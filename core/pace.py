"""Where on the annealing schedule each step stands: by the clock, or as far as a measurement has moved it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from core.config import Config, full_support

SIGNALS = {"ess": "explorer/ess", "zero_variance": "frac_reward_zero_std"}  # driver → metric of a training line
POSITION = "mix/anneal_position"
FILE = "anneal.json"


class Pace:
    """p(i), the position of step i: its quota is `quota_at(p(i))`. By the clock p(i) = i. Under a driver, with the
    horizon h = lookahead + ahead_steps and x(i) the driver's metric of step i,

        p(i) = i  for i ≤ h;   p(i) = max(p(i−1) + move(x(i−h)), T_mix − (T − i))  for i > h
        move(x) = 2 if x < driver_low, 0 if x > driver_high, else 1 (also where x was not measured)

    `ess`: explorer rows that are far off-policy end the annealing sooner. `zero_variance`: dead groups, to which an
    explorer could still bring a gradient, hold it up. The second term is the latest position from which the clock still
    reaches α = 0 by step T. (Not of the paper: our rule, with a bounded horizon.)

    x(i−h) is known just when explorers may first be asked for step i, since they are asked for h − 1 steps beyond the
    one that trains: they run ahead as they do by the clock, and a larger explorer.ahead_steps reacts later. Positions
    follow from metrics alone, never from who came first.

    Example: pace = Pace(config); pace.observe(1, {"explorer/ess": 0.2}); pace.at(1 + pace.horizon)
    """

    def __init__(self, config: Config) -> None:
        algorithm = self._algorithm = config.algorithm
        self.driven = algorithm.driver != "clock"
        self.horizon = algorithm.lookahead + config.explorer.ahead_steps
        self._decided = list(range(1, self.horizon + 1))
        self._recorded: Mapping[int, int] | None = None

    def at(self, step: int) -> int:
        """The position of `step` ≥ 1. ValueError where the driver has not decided it yet."""
        if self._recorded is not None:
            return self._recorded.get(step, step)
        if not self.driven or step < 1:
            return step
        if step > len(self._decided):
            raise ValueError(
                f'algorithm.driver = "{self._algorithm.driver}" has decided steps up to {len(self._decided)}, '
                f"not {step}: what it owes there is known when step {step - self.horizon} has trained"
            )
        return self._decided[step - 1]

    def slowest(self, step: int) -> int:
        """The position of `step`, or the earliest that it can still have: a lower bound, of the most explorer rows."""
        if not self.driven or self._recorded is not None or step <= len(self._decided):
            return self.at(step)
        return max(self._decided[-1], self._latest(step))

    def observe(self, step: int, line: Mapping[str, float | None]) -> None:
        """Decide the position of `step` + horizon by the metrics of `step`, which has trained. Steps come in order."""
        if not self.driven or self._recorded is not None:
            return
        assert step == len(self._decided) - self.horizon + 1, (step, len(self._decided), self.horizon)
        value = line.get(SIGNALS[self._algorithm.driver])
        moved = self._decided[-1] + self._move(value)
        self._decided.append(max(moved, self._latest(step + self.horizon)))

    def metrics(self, step: int) -> dict[str, float]:
        """`mix/anneal_position`, where it is not the step by definition."""
        return {POSITION: self.at(step)} if self.driven or self._recorded else {}

    def follow(self, recorded: Mapping[int, int]) -> None:
        """Take the positions of another run's steps, whatever is measured (a replay)."""
        self._recorded = recorded

    def save(self, directory: Path) -> None:
        """Write what is decided into a checkpoint; by the clock, nothing."""
        if self.driven:
            state = {"horizon": self.horizon, "positions": self._decided}
            (directory / FILE).write_text(json.dumps(state) + "\n")

    def load(self, directory: Path, step: int) -> None:
        """Take over what `save` wrote after `step`. ValueError where it was decided with another horizon."""
        if not self.driven:
            return
        state = json.loads((directory / FILE).read_text())
        if state["horizon"] != self.horizon:
            raise ValueError(
                f"--resume: α was decided {state['horizon']} steps ahead (algorithm.lookahead + explorer.ahead_steps), "
                f"and {self.horizon} are asked for: keep explorer.ahead_steps as it was"
            )
        assert len(state["positions"]) == step + self.horizon, (directory, step)
        self._decided = state["positions"]

    def _move(self, value: float | None) -> int:
        low, high = self._algorithm.driver_low, self._algorithm.driver_high
        if value is None:  # no explorer row in that step, or a number that was not finite
            return 1
        return 2 if value < low else 0 if value > high else 1

    def _latest(self, step: int) -> int:
        return self._algorithm.anneal_steps - (self._algorithm.steps - step)


def driver_problems(config: Config) -> Iterator[str]:
    """Why the settings of algorithm.driver cannot run, one line per problem; nothing by the clock."""
    algorithm, explorer = config.algorithm, config.explorer
    if algorithm.driver == "clock":
        return
    named = f'algorithm.driver = "{algorithm.driver}"'
    if algorithm.mixing == "rescue":
        yield f'{named} with algorithm.mixing = "rescue", whose quota is the same at every step: use driver=clock'
    if algorithm.schedule != "linear":
        yield f'{named} moves along the linear schedule, not algorithm.schedule = "{algorithm.schedule}"'
    ahead = algorithm.lookahead + explorer.ahead_steps
    if algorithm.anneal_steps < 2:
        yield f"{named} has nothing to drive: use algorithm.anneal_steps=2 or more, not {algorithm.anneal_steps}"
    elif ahead >= algorithm.anneal_steps:
        yield (
            f"{named}: the first {ahead} steps (algorithm.lookahead + explorer.ahead_steps) follow the clock, and α is "
            f"0 from step {algorithm.anneal_steps} on, so nothing would be left to decide: use "
            "explorer.ahead_steps=1, or a larger algorithm.anneal_steps"
        )
    if algorithm.driver_low > algorithm.driver_high:
        yield (
            f"algorithm.driver_low = {algorithm.driver_low:g} is above algorithm.driver_high = "
            f"{algorithm.driver_high:g}: below the one α falls faster, above the other it is held"
        )
    if explorer.store:
        yield f"{named} with explorer.store: what the explorer owes is not known before the run, so use driver=clock"
    if config.rollout.roles == "handover":
        yield f'{named} with rollout.roles = "handover", whose timetable is made before the run: use roles=dedicated'
    if algorithm.driver == "ess" and not full_support(explorer):
        yield (
            f"{named} reads ratios to the explorer's log-probs, which explorer.top_p = {explorer.top_p}, "
            f"explorer.top_k = {explorer.top_k} normalise over other tokens: use explorer.top_p=1 explorer.top_k=0"
        )
