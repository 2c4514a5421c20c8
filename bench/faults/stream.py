"""A pool with real worker processes around a scripted engine, for faults in which the model does not matter."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.faults.engine import VOCAB
from bench.faults.parts import ENGINE, ScriptedWorker, Sink, eventually, make_lease, make_model
from bench.faults.runs import scratch
from core.config import Config, Run, Stream
from core.schema import Source
from rollout.fingerprint import fingerprints
from rollout.messages import Lease
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms

LIVENESS_S, HANG_S = 2.0, 2.0


class PoolOfQuickWorkers:
    """A WorkerPool of a run of its own. `said`: its events. A context: closed at the end, whatever happens."""

    def __init__(
        self, name: str, *, sink: Sink | None = None, incarnation: int = 1, run_id: str = "", **settings: Any
    ) -> None:
        self.dir, self.sink, self.said = scratch() / name, sink or Sink(), list[str]()
        self.model = self.dir.with_name(f"{name}-model")
        if not self.model.exists():
            make_model(self.model)
        restarts = settings.pop("max_restarts", 3)
        stream = {"heartbeat_s": 0.1, "liveness_s": LIVENESS_S, "lease_timeout_s": HANG_S, "starvation_s": 120.0}
        config = Config(
            run=Run(dir=str(self.dir)), stream=Stream(**{**stream, "credit": 64, "max_frame_mb": 1, **settings})
        )
        terms = {Source.EXPLORER: RoleTerms(self.model, fingerprints(self.model, weights=True), VOCAB)}
        self.pool = WorkerPool(
            config, run_id=run_id or name, incarnation=incarnation, terms=terms, on_completion=self.sink,
            on_event=self.said.append, worker_arguments=ENGINE, max_restarts=restarts,
        )  # fmt: skip
        self.leases: list[Lease] = []
        self._scripted: list[ScriptedWorker] = []
        self._spawned = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"events: {'; '.join(self.said[-8:]) or 'none'}"[:900])
        for worker in self._scripted:
            worker.close()
        self.pool.close("the row is over")

    def spawn(self, count: int, **environment: str) -> None:
        """Start workers with an environment, and wait until they are ready."""
        names = [f"explorer-{self._spawned + number}." for number in range(count)]
        with environment_of(**environment):
            for number in range(count):
                self.pool.spawn(Source.EXPLORER, self._spawned + number)
            eventually(lambda: all(any(known.startswith(name) for known in self.ready()) for name in names), "ready")
        self._spawned += count

    def ready(self) -> dict[str, dict[str, Any]]:
        """Workers that take leases."""
        workers: dict[str, dict[str, Any]] = self.pool.counters()["workers"]
        return {name: worker for name, worker in workers.items() if worker["state"] == "ready"}

    def scripted(self, name: str = "scripted.1") -> ScriptedWorker:
        """A worker that says exactly what it is told to."""
        self._scripted.append(ScriptedWorker(self.pool.endpoint, name))
        return self._scripted[-1]

    def submit(self, count: int) -> None:
        """Queue leases of 16 completions each."""
        new = [make_lease(len(self.leases) + number) for number in range(count)]
        self.leases += new
        self.pool.submit(new)

    def wait(self, count: int) -> None:
        """Until so many completions have come."""
        self.sink.wait(count, self.pool.check)

    def settle(self) -> dict[str, int]:
        """Wait for everything that was asked for, check the books; completions lost and duplicated."""
        self.wait(16 * len(self.leases))
        eventually(lambda: self.account()["in_flight"] == 0, "nothing is in flight")
        wanted = {
            ("train", lease.lease_id, item.slot, sample)
            for lease in self.leases
            for item in lease.items
            for sample in item.samples
        }
        assert self.pool.counters()["balanced"], f"the books do not balance: {self.pool.counters()}"
        doubled = sum(self.sink.keys.values()) - len(self.sink.keys)
        return {"lost": len(wanted) - len(self.sink.keys), "duplicated": doubled}

    def account(self) -> dict[str, Any]:
        """Counts of explorers' completions."""
        account: dict[str, Any] = self.pool.counters()["sources"]["explorer"]
        return account

    def event(self, name: str) -> float:
        """Wait for an event to be counted; seconds waited."""
        start = time.monotonic()
        eventually(lambda: self.pool.counters()["events"].get(name), f"event {name}")
        return time.monotonic() - start

    def pids(self) -> list[int]:
        """Of all spawned workers, by name, once each is ready: a slow machine may have taken one for hung."""
        eventually(lambda: len(self.ready()) == self._spawned, "all are ready")
        return [worker["pid"] for _, worker in sorted(self.ready().items())]

    def log(self, name: str) -> str:
        """A worker's."""
        return (self.dir / "logs" / f"{name}.log").read_text("utf-8", errors="replace")


@contextlib.contextmanager
def environment_of(**extra: str) -> Iterator[None]:
    """Variables for children that are started meanwhile."""
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is resident."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
