"""The pipeline with stages of known length: real workers, sockets, buffer and mixer around sleeping engines.

Two measures of a step: over the slowest stage, by the stages' means, and over `ideal_s`, what these very stages would
take without any cost of passing things on. They differ where stages vary from step to step: with lookahead 1 a step
lasts as long as the longer of its two stages, and E[max] is above the max of the means.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.faults.parts import make_model
from bench.sleeping_engine import MEDIAN, VOCAB
from core.config import Algorithm, Config, Reward, Rollout, Run, Stream
from core.prompts import PromptSchedule
from core.schema import Completion, Group, Prompt, Source
from rollout.buffer import ReplayBuffer
from rollout.demand import Demand
from rollout.fingerprint import file_digest, fingerprints
from rollout.ledger import Ledger
from rollout.mixer import Mixer
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms
from rollout.timetable import Timetable

Roles = Literal["dedicated", "end only", "handover"]
WARM_STEPS = 3
LEASES = 8  # a step, for one worker
LONGEST = 4.0  # of about 32 log-normal lengths, in medians: what makes a lease's duration


def measure(lookahead: int, ratio: float, *, steps: int, train_s: float, in_parts: bool = False) -> dict[str, Any]:
    """Step time over the slowest stage, of `steps` steady steps in which generation takes about `ratio` · `train_s`.

    `in_parts`: a step trains by its mini-batches, one for each of the worker's leases; `ideal_s` waits for all of it.
    """
    token_s = ratio * train_s / LEASES / (LONGEST * MEDIAN)
    os.environ["SLEEP_TOKEN_S"] = str(token_s)
    with tempfile.TemporaryDirectory(prefix="s2l-") as folder:
        config = Config(
            run=Run(dir=f"{folder}/run"),
            algorithm=Algorithm(
                steps=steps + WARM_STEPS, group_size=8, anneal_steps=0, prompts_per_step=4 * LEASES,
                mini_batch_prompts=4, lookahead=lookahead, stream_mini_batches=in_parts,
            ),
            rollout=Rollout(lease_prompts=4, max_response_tokens=16 * MEDIAN),
            stream=Stream(credit=256),
            reward=Reward(function="bench.sleeping_engine:reward"),
        )  # fmt: skip
        _, ends, generated, trained = _run(config, Path(folder), train_s)
    step_s = statistics.mean(b - a for a, b in pairwise(ends[WARM_STEPS - 1 :]))
    stages = {
        "generation_s": statistics.mean(generated[WARM_STEPS:]), "training_s": statistics.mean(trained[WARM_STEPS:])
    }  # fmt: skip
    ideal = ideal_ends(generated, trained, lookahead)
    ideal_s = statistics.mean(b - a for a, b in pairwise(ideal[WARM_STEPS - 1 :]))
    return {
        "case": "fakes, in parts" if in_parts else "fakes",
        "lookahead": lookahead, "ratio": ratio, "steps": steps, "step_s": step_s, **stages,
        "ideal_s": ideal_s, "step_over_slowest": step_s / max(stages.values()), "step_over_ideal": step_s / ideal_s,
        "ideal_over_slowest": ideal_s / max(stages.values()), "step_over_sum": step_s / sum(stages.values()),
        "loadavg": os.getloadavg()[0],
    }  # fmt: skip


def ideal_ends(generated: Sequence[float], trained: Sequence[float], lookahead: int) -> list[float]:
    """When each step ends if nothing but the stages takes time.

    Generation of step s begins when that of s − 1 has ended and step s − 1 − lookahead is trained; training of s begins
    when its generation and the training of s − 1 have ended.
    """
    made_s, ends = 0.0, [0.0]  # ends[s]: of step s, counted from 1
    for step, (generation_s, training_s) in enumerate(zip(generated, trained, strict=True), start=1):
        made_s = max(made_s, ends[max(step - 1 - lookahead, 0)]) + generation_s
        ends.append(max(made_s, ends[step - 1]) + training_s)
    return ends[1:]


def measure_roles(case: Roles, *, steps: int, train_s: float) -> dict[str, Any]:
    """Seconds of an annealed run, generation-bound, by one explorer process and two of the learner's.

    `end only`: explorers are handed over when they are done, but learner processes do not begin as explorers.
    """
    os.environ["SLEEP_TOKEN_S"] = str(3 * train_s / LEASES / (LONGEST * MEDIAN))
    with tempfile.TemporaryDirectory(prefix="s2l-") as folder:
        config = Config(
            run=Run(dir=f"{folder}/run"),
            algorithm=Algorithm(
                steps=steps, group_size=8, anneal_steps=steps // 2, prompts_per_step=4 * LEASES, mini_batch_prompts=4,
                lookahead=1, stream_mini_batches=False,
            ),
            rollout=Rollout(
                lease_prompts=4, max_response_tokens=16 * MEDIAN, processes=2,
                roles="dedicated" if case == "dedicated" else "handover",
            ),
            stream=Stream(credit=256),
            reward=Reward(function="bench.sleeping_engine:reward"),
        )  # fmt: skip
        ran = _run(config, Path(folder), train_s, starts_over=case == "handover")
    quarter = steps // 4
    return {
        "case": "roles", "roles": case, "steps": steps, "run_s": ran.ends[-1] - ran.begin_s,
        "first_quarter_s": ran.ends[quarter - 1] - ran.begin_s,
        "step_s_after_annealing": statistics.mean(b - a for a, b in pairwise(ran.ends[steps // 2 :])),
        "loadavg": os.getloadavg()[0],
    }  # fmt: skip


class Ran(NamedTuple):
    """When work began with all workers ready, when each step ended, and its seconds of generation and of training."""

    begin_s: float
    ends: list[float]
    generated: list[float]
    trained: list[float]


def _run(config: Config, folder: Path, train_s: float, *, starts_over: bool = False) -> Ran:
    """A whole run. `starts_over`: its timetable may let learner processes begin as explorers."""
    model = make_model(folder / "model")
    pool, mixer, demand = _stream(config, model)
    weights = model / "model.safetensors"
    digest = file_digest(weights)
    ends, generated, trained = [], [], []
    timetable = Timetable(config, demand.quota) if starts_over else None
    with pool:
        for index in range(config.rollout.processes):
            pool.spawn(Source.LEARNER, index, first=timetable.first_role(index) if timetable else None)
        if demand.last_explorer_step:
            pool.spawn(Source.EXPLORER, 0)
        pool.publish_weights(0, weights, digest)
        _wait_until_ready(pool, config.rollout.processes + bool(demand.last_explorer_step))
        begin_s = time.monotonic()
        for step in range(1, config.algorithm.steps + 1):
            for ahead in range(step, min(step + config.algorithm.lookahead, config.algorithm.steps) + 1):
                names = timetable.due(ahead) if timetable else ()
                if names:
                    pool.hand_over(*names)
                mixer.request(ahead)
            groups, trained_s = tuple[Group, ...](), 0.0
            for part in _parts(mixer, step, config.algorithm):
                groups += part
                if config.rollout.roles == "handover" and mixer.explorer_is_done(step):
                    pool.hand_over()
                start_s = time.monotonic()
                time.sleep(train_s * len(part) / config.algorithm.prompts_per_step)
                trained_s += time.monotonic() - start_s
            generated.append(_busy_s(groups))
            trained.append(trained_s)
            pool.publish_weights(step, weights, digest)
            ends.append(time.monotonic())
        mixer.close()
    return Ran(begin_s, ends, generated, trained)


def _stream(config: Config, model: Path) -> tuple[WorkerPool, Mixer, Demand]:
    """Real ones, of workers whose engines sleep."""
    prompts = [Prompt(uid=f"p{i}", token_ids=(5, i), text=str(i), answer="") for i in range(256)]
    demand = Demand(config, PromptSchedule(prompts, seed=0, per_step=config.algorithm.prompts_per_step), (1,))
    ledger = Ledger()
    buffer = ReplayBuffer(ledger, max_bytes=config.stream.buffer_mb << 20)
    mixers: list[Mixer] = []

    def receive(purpose: str, completion: Completion) -> None:
        mixers[0].receive(purpose, completion)

    pool = WorkerPool(
        config, run_id="bench", incarnation=1, on_completion=receive,
        terms={source: RoleTerms(model, fingerprints(model, weights=source is Source.EXPLORER), VOCAB)
               for source in Source},
        worker_arguments=("--engine", "bench.sleeping_engine:sleeping"),
    )  # fmt: skip
    mixers.append(Mixer(
        config, demand, pool, buffer, ledger, decode=str, on_wait=lambda what, seconds: None, on_event=print,
        reward_log=model / "reward.log",
    ))  # fmt: skip
    return pool, mixers[0], demand


def _parts(mixer: Mixer, step: int, algorithm: Algorithm) -> Iterator[tuple[Group, ...]]:
    """The groups of a step as trainer.stream hands them out."""
    size, first = algorithm.mini_batch_prompts if algorithm.in_parts else None, 0
    while groups := mixer.collect(step, first=first, prompts=size):
        yield groups
        if size is None:
            return
        first = groups[-1].slot + 1


def _wait_until_ready(pool: WorkerPool, count: int) -> None:
    """What a process takes to start is not part of a step."""
    deadline = time.monotonic() + 120
    while sum(worker["state"] == "ready" for worker in pool.counters()["workers"].values()) < count:
        pool.check()
        assert time.monotonic() < deadline, pool.waiting_for().line
        time.sleep(0.02)


def _busy_s(groups: tuple[Group, ...]) -> float:
    """Seconds that the one worker spent on a step's leases."""
    ends: dict[float, float] = defaultdict(float)
    for group in groups:
        for row in group.rows:
            started_s = row.completion.started_s
            ends[started_s] = max(ends[started_s], row.completion.finished_s)
    return sum(end - start for start, end in ends.items())
