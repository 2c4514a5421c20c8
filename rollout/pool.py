"""The trainer's end of the stream: one thread that owns the socket, the workers' processes and their leases.

consumes     leases and weights (from the trainer's thread), completions (from workers)
produces     each wanted completion once, to `on_completion`, on the pool's thread
waits for    workers; never for longer than a quarter of a second at a time
unblocked by a frame, a submission, a tick of the clock
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from core.config import Config
from core.schema import Completion, Source
from rollout.children import Children, Exit
from rollout.endpoints import ENDPOINT_FILE, PrivateIpc
from rollout.errands import Errands
from rollout.frame import session_of
from rollout.handover import HandOver
from rollout.keys import trainer_keys
from rollout.leases import LeaseBook
from rollout.messages import FromTrainer, Grant, Lease, Leave, Stop, Weights
from rollout.peers import ABLE_TO_WORK
from rollout.roster import RoleTerms, Roster
from rollout.status import Held, Waiting, counters, held_weights, hopeless, waiting
from rollout.stragglers import Stragglers
from rollout.terms import welcome
from rollout.wire import MAX_FRAMES_PER_POLL, Hub

_ANSWER_S = 5.0  # how long a question to the pool's thread may take where the caller can go on without an answer
_STUCK_S = 120.0  # where it cannot: a disk or a machine that stalls for a while must not end the run
_LEAVE_S, _GRACE_S = 1.0, 1.2  # for Leave; then for each of exit, SIGTERM and SIGKILL: together below five seconds

T = TypeVar("T")


class WorkersLost(RuntimeError):
    """Work is left that no worker can do any more; the message says why, with the end of a worker's log."""


class WorkerPool:
    """Workers of a run. `terms` has an entry for each role that takes part.

    `run_id`, `incarnation`: the run and the count of its starts; frames of any other are refused.
    `may_grant(lease)` (pool's thread): False holds a lease back, as while the buffer is full, and is asked again soon.
    `on_event(line)` (pool's thread): a worker came, went, hangs, was restarted. `worker_arguments`: of spawned workers.

    Call nothing that returns a value while you hold a lock that `on_completion` takes: both would wait for each other.

    Example:
        with WorkerPool(config, run_id="7f3a", incarnation=1, terms=terms, on_completion=receive) as pool:
            pool.spawn(Source.EXPLORER, 0)
            pool.submit(leases)
    """

    def __init__(
        self, config: Config, *, run_id: str, incarnation: int, terms: Mapping[Source, RoleTerms],
        on_completion: Callable[[str, Completion], None], may_grant: Callable[[Lease], bool] | None = None,
        on_event: Callable[[str], None] = lambda line: None, worker_arguments: tuple[str, ...] = (),
        max_restarts: int = 3,
    ) -> None:  # fmt: skip
        if len({role.fingerprints.tokenizer for role in terms.values()}) > 1:
            raise ValueError(
                f"explorer and learner have different tokenizers: {[str(role.model_dir) for role in terms.values()]}"
            )
        self.config, self._run_dir, self._may_grant = config, Path(config.run.dir), may_grant
        self._on_event = on_event
        stream = config.stream
        self._private = PrivateIpc() if stream.endpoint == "auto" else None
        address = stream.endpoint if self._private is None else self._private.endpoint
        self._hub = Hub(
            address, session=session_of(run_id, incarnation), max_frame_bytes=stream.max_frame_mb << 20,
            heartbeat_s=stream.heartbeat_s, liveness_s=stream.liveness_s,
            keys=trainer_keys(Path(stream.keys)) if stream.keys else None, on_event=on_event,
        )  # fmt: skip
        self.endpoint = self._hub.endpoint
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / ENDPOINT_FILE).write_text(self.endpoint + "\n", "utf-8")
        self._book = LeaseBook(credit=stream.credit)
        self._roster = Roster(
            self._book, session=self._hub.session, welcome=welcome(config, run_id, incarnation), terms=terms,
            liveness_s=stream.liveness_s, hang_s=stream.lease_timeout_s, on_completion=on_completion,
            on_event=on_event,
        )  # fmt: skip
        if stream.keys:
            worker_arguments = ("--keys", str(Path(stream.keys).resolve()), *worker_arguments)
        self._children = Children(
            self._run_dir, threads=config.run.threads, max_restarts=max_restarts, arguments=worker_arguments
        )
        self._exits: dict[str, Exit] = {}  # the last of each child
        self._errands = Errands(self._hub.wake)
        self._handover = HandOver(self._children)
        self._stragglers = Stragglers(self._book)
        self._stop_reason: str | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)
        self._thread.start()

    def spawn(self, role: Source, index: int, gpus: str | None = None, first: Source | None = None) -> None:
        """Start a worker process here, with `gpus` as its CUDA_VISIBLE_DEVICES; until handed over it is a `first`."""
        self._errands.send(lambda: self._children.start(role, index, self.endpoint, gpus, first))

    def submit(self, leases: Sequence[Lease]) -> None:
        """Queue leases. ValueError where one exceeds stream.max_frame_mb."""
        for lease in leases:
            self._hub.frame_bytes([Grant(lease=lease)])
        self._errands.send(lambda: self._submit(leases))

    def publish_weights(self, version: int, file: Path, digest: str, *, shared: bool = False) -> None:
        """Learner workers load these (messages.Weights) before leases that ask for `version`. Versions only rise."""
        weights = Weights(version=version, file=str(file.absolute()), digest=digest, shared=shared)  # unresolved
        self._errands.send(lambda: self._publish(weights))

    def hand_over(self, *names: str) -> None:
        """From now on, explorers of this pool that owe nothing join the learner's rollouts; named ones get no lease."""
        self._errands.send(lambda: self._handover.begin(names))

    def waiting_for(self) -> Waiting:
        """What is missing, from whom and since when, and when a worker last moved."""
        try:
            return self._errands.ask(lambda: waiting(self._roster, self._children), timeout_s=_ANSWER_S)
        except TimeoutError:
            return Waiting(f"the pool's own thread, which is busy for more than {_ANSWER_S:g} s")

    def counters(self) -> dict[str, Any]:
        """Counts since the start: by source (promise 1), by worker, and of faults."""
        return self._errands.ask(self._count, timeout_s=_STUCK_S)

    def held_weights(self) -> Held:
        """What the workers' engines have, as last heard. TimeoutError where the pool is too busy to say."""
        return self._errands.ask(lambda: held_weights(self._roster), timeout_s=_ANSWER_S)

    def quiet(self, look: Callable[[dict[str, Any]], T]) -> T:
        """`look(counters()["sources"])` on the pool's thread, so that no completion arrives meanwhile. Hold no lock."""
        return self._errands.ask(lambda: look(self._count()["sources"]), timeout_s=_STUCK_S)

    def check(self) -> None:
        """Raise WorkersLost where work is left that no worker can do, or the pool's own error."""
        if self._error is not None:
            raise RuntimeError(f"the worker pool stopped: {self._error}") from self._error
        try:
            problem = self._errands.ask(self._problem, timeout_s=_ANSWER_S)
        except TimeoutError:
            return  # busy is not lost; waiting_for says it
        if problem:
            raise WorkersLost(problem)

    def close(self, reason: str = "the run is over") -> None:
        """Tell every worker to stop; spawned ones are gone within five seconds. Closing again does nothing."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._hub.wake()
            self._thread.join()
            self._hub.close()
            (self._run_dir / ENDPOINT_FILE).unlink(missing_ok=True)
            if self._private is not None:
                self._private.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("the run is over" if error is None else f"the trainer failed: {error!r}"[:200])

    def _run(self) -> None:
        try:
            while self._stop_reason is None:
                self._turn()
        except Exception as error:  # the thread's boundary: `check` raises it on the trainer's thread
            self._error = error
        finally:
            self._stop_workers(self._stop_reason or f"the trainer failed: {self._error!r}"[:200])
            self._children.stop(grace_s=_GRACE_S)
            self._errands.close()

    def _stop_workers(self, reason: str) -> None:
        """Say Stop, and stay until each worker that listens has left: a closed socket would take the word back."""
        listening = {peer.identity for peer in self._roster.peers.values() if peer.state in ABLE_TO_WORK}
        for identity in self._roster.peers:
            self._send(identity, [Stop(reason=reason)])
        deadline = time.monotonic() + _LEAVE_S
        while listening and time.monotonic() < deadline:
            for peer, _, messages, _ in self._hub.poll(0.05):
                if any(isinstance(message, Leave) for message in messages):
                    listening.discard(peer)

    def _turn(self) -> None:
        received = self._hub.poll(min(0.25, self.config.stream.heartbeat_s / 2))
        now = time.monotonic()
        for peer, session, messages, problem in received:
            if problem is not None:
                replies = self._roster.bad_frame(peer, problem)
            else:
                replies = self._roster.hear(peer, session, messages, now)
            if replies:
                self._send(peer, replies)
        self._errands.run()
        for child in self._children.reap(now, self.endpoint):
            self._exits[child.name] = child
            self._on_event(f"{child.line()}; {'it is not' if child.fatal else 'it is'} started again")
            self._roster.process_ended(child.pid, socket.gethostname(), child.line())
        if len(received) < MAX_FRAMES_PER_POLL:  # all that was said is heard, so that silence is silence
            self._roster.tick(now)
        for known in self._roster.peers.values():
            self._children.note(known.join.pid, known.state)
        self._handover.mark(self._roster.peers)
        self._grant(now)
        for known, message in self._roster.hand_over(self._handover.pids()):
            self._send(known.identity, [message])

    def _grant(self, now: float) -> None:
        for peer, grant in list(self._roster.grants(now, self._may_grant)):
            if not self._send(peer.identity, [grant]):
                self._book.retract(peer.name, grant.lease.lease_id)
            else:
                self._stragglers.granted(grant.lease, now)
        for peer, lease in self._stragglers.second(self._roster.peers, now):
            self._send(peer.identity, [Grant(lease=lease)])

    def _count(self) -> dict[str, Any]:
        counts = counters(self._roster, self._children, self._hub.counts)
        counts["events"]["seconded"] = self._stragglers.seconded
        return counts

    def _problem(self) -> str:
        return hopeless(self._roster, self._children, self._exits)

    def _publish(self, weights: Weights) -> None:
        for peer, message in self._roster.publish(weights):
            self._send(peer.identity, [message])

    def _submit(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self._book.submit(lease)

    def _send(self, peer: bytes, messages: Sequence[FromTrainer]) -> bool:
        return self._hub.send(peer, messages)
