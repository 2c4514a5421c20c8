"""Train again from what a run consumed: `--replay RUN` reads RUN/rollouts/*.parquet in place of asking workers.

The files hold, in the order of the updates, all of a completion that training reads: tokens, log-probs of the sampler,
source and reward. Prompts and weights follow from the configuration, and metrics.jsonl holds what an
algorithm.driver decided. So on the same machine, with as many ranks, a
replay reaches the parameters of the run bit for bit, whatever its `lookahead` and whoever came first.
"""

import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from core.config import Algorithm, Config
from core.configkeys import ConfigError
from core.metrics import is_evaluation, read_metrics
from core.pace import POSITION
from core.schema import (
    Completion,
    CompletionKey,
    Group,
    Prompt,
    ScoredCompletion,
    Source,
    pack_logprobs,
    pack_tokens,
)
from rollout.demand import Demand
from rollout.fingerprint import weights_fingerprint
from rollout.grouping import with_advantages
from rollout.store import read_rollouts, stored_steps
from trainer.signals import SIGNALS
from trainer.stream import GroupStream, Rollouts
from trainer.world import World


class ReplayStream(GroupStream):
    """Hands out the groups that a run trained on; every rank reads them itself, and nothing is generated."""

    def __init__(self, world: World, run: Path, demand: Demand) -> None:
        super().__init__(world, None)
        self.run, self.demand = run, demand
        demand.pace.follow(recorded_positions(run, demand.config))

    def parts(self, step: int, prompts: int | None = None) -> Iterator[tuple[Group, ...]]:
        """The groups of `step`, as they were. ValueError where they are of other prompts than this configuration's."""
        SIGNALS.check(self.world.highest)
        with self.stages("wait"):
            groups = read_groups(self.run, step, self.demand.prompts_at(step), self.demand.config.algorithm)
        for start in range(0, len(groups), prompts or len(groups)):
            yield groups[start : start + (prompts or len(groups))]


def open_stream(run: Path | None, world: World, rollouts: Rollouts | None, demand: Demand) -> GroupStream:
    """The stream of a run with workers, or that of a replay."""
    return GroupStream(world, rollouts) if run is None else ReplayStream(world, run, demand)


def recorded_part(config: Config, run: Path | None) -> Config:
    """The configuration, with no more steps than `run` recorded. ConfigError where steps are missing before those.

    Check it first: a run may have ended within its annealing, whose length is then more than the steps there are.
    """
    if run is None:
        return config
    steps = stored_steps(run)
    if steps != list(range(1, len(steps) + 1)) or not steps:
        raise ConfigError(f"--replay: {run / 'rollouts'} does not hold steps 1, 2, … without a gap, but {steps}")
    algorithm = msgspec.structs.replace(config.algorithm, steps=min(config.algorithm.steps, len(steps)))
    return msgspec.structs.replace(config, algorithm=algorithm)


def recorded_positions(run: Path, config: Config) -> dict[int, int]:
    """Where on the schedule each step of `run` stood, so that quotas are those of its groups, whatever is measured now.

    ConfigError where a driver moved them and metrics.jsonl lacks a step.
    """
    lines = [line for line in read_metrics(run) if not is_evaluation(line)]
    found = {line["step"]: int(line.get(POSITION, line["step"])) for line in lines}
    missing = sorted(set(range(1, config.algorithm.steps + 1)) - found.keys())
    if config.algorithm.driver != "clock" and missing:
        raise ConfigError(
            f'--replay: algorithm.driver = "{config.algorithm.driver}" decided the quotas of {run}, and its '
            f"metrics.jsonl, which holds them, lacks step {missing[0]}: restore the file"
        )
    return {step: position for step, position in found.items() if position != step}


def read_groups(run: Path, step: int, prompts: tuple[Prompt, ...], algorithm: Algorithm) -> tuple[Group, ...]:
    """The groups of one step of a run, in the order in which they trained, with the advantages that `algorithm` gives
    to their rewards: those of the run, to the bit, where it is the run's own.

    Explorer and learner rows of a prompt are two groups under mixing authors_code. ValueError for other prompts.
    """
    by_source = algorithm.mixing == "authors_code"
    rows = read_rollouts(run, step).to_pylist()
    groups = []
    for _, members in groupby(rows, key=lambda row: (row["slot"], row["source"] if by_source else "")):
        group = list(members)
        first = group[0]
        prompt = prompts[first["slot"]]
        if (prompt.uid, prompt.text) != (first["prompt_uid"], first["prompt"]):
            there, here = f"{first['prompt_uid']} {first['prompt']!r}", f"{prompt.uid} {prompt.text!r}"
            raise ValueError(
                f"--replay: slot {first['slot']} of step {step} is prompt {there[:200]} in {run}, and {here[:200]} "
                "here: keep run.seed, data.* and algorithm.prompts_per_step, and the data, as they were"
            )
        groups.append(with_advantages(prompt, first["slot"], [_scored(row) for row in group], algorithm))
    return tuple(groups)


def compare(run: Path, model_dir: Path) -> str:
    """Whether a replay reached the parameters of the run, in words."""
    if not (run / "model").is_dir():
        return f"replay: {run} did not end, so there is no final model to compare with"
    equal = weights_fingerprint(run / "model") == weights_fingerprint(model_dir)
    return f"replay: the parameters {'are those' if equal else 'DIFFER from those'} of {run / 'model'}"


def _scored(row: dict[str, Any]) -> ScoredCompletion:
    now = time.monotonic()
    completion = Completion(
        key=CompletionKey(source=Source(row["source"]), step=row["step"], slot=row["slot"], sample=row["sample"]),
        prompt_uid=row["prompt_uid"],
        token_bytes=pack_tokens(row["token_ids"]),
        logprob_bytes=pack_logprobs(row["logprobs"]),
        finish=row["finish"],
        version=row["version"],
        spans=tuple((span["first"], span["version"]) for span in row["spans"]),
        worker=row["worker"],
        started_s=now,
        finished_s=now,
    )
    return ScoredCompletion(completion=completion, reward=row["reward"], text=row["text"])
