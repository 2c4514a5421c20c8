"""What happened when, in one step: the trainer's stages, the workers' leases, and what the trainer waited for."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from core.schema import Group, ScoredCompletion, Source
from trainer.tracer import Moment, Tracer

PROCESS = "trainer"
STORED = "store"  # the worker of completions that were read, not generated


class Span(NamedTuple):
    """Seconds of the monotonic clock.

    Example: Span(start_s=12.5, end_s=12.9)
    """

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Stages:
    """Spans of the trainer's stages since the last `take`; a stage happens once in a step.

    Example: with stages("wait"): ...
    """

    def __init__(self) -> None:
        self._spans: dict[str, Span] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._spans[name] = Span(start_s, time.monotonic())

    def seconds(self, name: str) -> float:
        """How long a stage took; 0 where it did not happen."""
        return self._spans[name].seconds if name in self._spans else 0.0

    def take(self, score_s: float) -> dict[str, Span]:
        """The step's spans; between `pack` and `publish` the learner scored for `score_s`, then trained."""
        spans, self._spans = self._spans, {}
        if "pack" in spans and "publish" in spans:
            scored_s = min(spans["pack"].end_s + score_s, spans["publish"].start_s)
            spans["score"] = Span(spans["pack"].end_s, scored_s)
            spans["train"] = Span(scored_s, spans["publish"].start_s)
        return dict(sorted(spans.items(), key=lambda item: item[1].start_s))


def wait_shares(groups: Sequence[Group], wait: Span) -> dict[str, float]:
    """What the trainer waited for, in seconds that add up to the wait: the source that came last, then its reward.

    Workers of other hosts have other clocks: what does not lie within the wait counts as generation.
    """
    rows = [row.completion for group in groups for row in group.rows]
    last = max(rows, key=lambda completion: completion.finished_s)
    generated_s = min(max(last.finished_s, wait.start_s), wait.end_s)
    generation_s = generated_s - wait.start_s
    shares = {f"time/wait_for_{source}": generation_s * (last.key.source is source) for source in Source}
    return shares | {"time/wait_for_rewards": wait.end_s - generated_s}


def trace_step(tracer: Tracer, step: int, groups: Sequence[Group], spans: Mapping[str, Span]) -> None:
    """The stages of a step, its leases on the tracks of their workers, and an arrow from each lease to its updates."""
    for name, span in spans.items():
        tracer.add(PROCESS, name, name, span.start_s, span.end_s, {"step": step})
    leases = trace_leases(tracer, f"step {step}", (row for group in groups for row in group.rows), {"step": step})
    if "train" in spans:
        into = Moment(PROCESS, "train", spans["train"].start_s)
        for lease in leases:
            tracer.arrow("trains", lease, into)
    tracer.flush()


def trace_leases(
    tracer: Tracer, name: str, rows: Iterable[ScoredCompletion], args: Mapping[str, object]
) -> list[Moment]:
    """One span per lease that the rows came from; returns where each ends."""
    leases: dict[tuple[str, float], list[ScoredCompletion]] = {}
    for row in rows:
        leases.setdefault((row.completion.worker, row.completion.started_s), []).append(row)
    ends = []
    for (worker, started_s), members in leases.items():
        finished_s = max(row.completion.finished_s for row in members)
        track = "read" if worker == STORED else "generate"
        versions = sorted({row.completion.version for row in members})
        counts = {"completions": len(members), "weights": versions}
        tracer.add(worker, track, name, started_s, finished_s, {**args, **counts})
        ends.append(Moment(worker, track, finished_s))
    return ends
