"""What happened when, in one step: the trainer's stages, the workers' leases, and what the trainer waited for."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import msgspec

from core.schema import Group, ScoredCompletion, Source
from rollout.messages import Load
from trainer.tracer import Moment, Tracer
from trainer.world import World

PROCESS = "trainer"  # rank 0
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


Spans = dict[str, list[Span]]  # of a rank's stages, by name


class Part(NamedTuple):
    """Groups that came together, and the trainer's wait for them.

    Example: Part(groups=groups, wait=Span(start_s=12.5, end_s=12.9))
    """

    groups: tuple[Group, ...]
    wait: Span


class Stages:
    """Spans of the trainer's stages since the last `take`, by name, in the order of their ends.

    Example: with stages("wait"): ...
    """

    def __init__(self) -> None:
        self._spans: Spans = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._spans.setdefault(name, []).append(Span(start_s, time.monotonic()))

    def seconds(self, name: str) -> float:
        """How long a stage took in all; 0 where it did not happen."""
        return sum(span.seconds for span in self._spans.get(name, ()))

    def last(self, name: str) -> Span:
        """When a stage happened last."""
        return self._spans[name][-1]

    def take(self) -> Spans:
        """All spans, to begin anew."""
        spans, self._spans = self._spans, {}
        return spans


def wait_shares(parts: Sequence[Part]) -> dict[str, float]:
    """What the trainer waited for, in seconds that add up to its waits: the source that came last, then its reward.

    Workers of other hosts have other clocks: what does not lie within a wait counts as generation.
    """
    shares = {f"time/wait_for_{name}": 0.0 for name in (*Source, "rewards")}
    for part in parts:
        last, wait = max((row.completion for row in _rows(part)), key=lambda row: row.finished_s), part.wait
        generated_s = min(max(last.finished_s, wait.start_s), wait.end_s)
        shares[f"time/wait_for_{last.key.source}"] += generated_s - wait.start_s
        shares["time/wait_for_rewards"] += wait.end_s - generated_s
    return shares


def of_all_ranks(spans: Spans, world: World) -> list[Spans]:
    """What every rank did, in the ranks' order; every rank calls it."""
    return [msgspec.msgpack.decode(each, type=Spans) for each in world.gather_bytes(msgspec.msgpack.encode(spans))]


def trace_step(tracer: Tracer, step: int, parts: Sequence[Part], ranks: Sequence[Spans]) -> None:
    """The stages of each rank in a step, its leases on the tracks of their workers, and an arrow from each lease to its
    updates on rank 0."""
    for rank, stages in enumerate(ranks):
        process = f"{PROCESS} rank {rank}" if rank else PROCESS
        for name, span in ((name, span) for name, members in stages.items() for span in members):
            tracer.add(process, name, name, span.start_s, span.end_s, {"step": step})
    trace_leases(tracer, f"step {step}", chain.from_iterable(map(_rows, parts)), {"step": step})
    for part in parts:
        trains = next((span for span in ranks[0].get("train", ()) if span.start_s >= part.wait.end_s), None)
        if trains is not None:
            for lease in _by_lease(_rows(part)).values():
                tracer.arrow("trains", _end(lease), Moment(PROCESS, "train", trains.start_s))
    tracer.flush()


def trace_leases(tracer: Tracer, name: str, rows: Iterable[ScoredCompletion], args: Mapping[str, object]) -> None:
    """One span per lease that the rows came from."""
    for (worker, started_s), members in _by_lease(rows).items():
        _, track, finished_s = _end(members)
        versions = sorted({row.completion.version for row in members})
        counts = {"completions": len(members), "weights": versions}
        tracer.add(worker, track, name, started_s, finished_s, {**args, **counts})


def trace_loads(tracer: Tracer, loads: Iterable[tuple[str, Load]]) -> None:
    """One span per load of new weights, on a track of its worker."""
    for worker, load in loads:
        tracer.add(worker, "load", f"weights {load.version}", load.started_s, load.finished_s)


def _rows(part: Part) -> Iterator[ScoredCompletion]:
    return (row for group in part.groups for row in group.rows)


def _by_lease(rows: Iterable[ScoredCompletion]) -> dict[tuple[str, float], list[ScoredCompletion]]:
    leases: dict[tuple[str, float], list[ScoredCompletion]] = {}
    for row in rows:
        leases.setdefault((row.completion.worker, row.completion.started_s), []).append(row)
    return leases


def _end(members: Sequence[ScoredCompletion]) -> Moment:
    """Where the last of a lease's rows was finished."""
    worker = members[0].completion.worker
    track = "read" if worker == STORED else "generate"
    return Moment(worker, track, max(row.completion.finished_s for row in members))
