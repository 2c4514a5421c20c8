"""A worker's network thread: it keeps the conversation going (rollout.messages) while the main thread generates.

consumes     completions (from the main thread), leases and weights (from the trainer)
produces     leases with the weights they want, in the order granted; deliveries until they are acknowledged; heartbeats
waits for    the socket, a new completion, or the next beat
unblocked by any of them; the main thread by a lease, by room in the outbox, or by `Ended`
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from core.schema import Completion
from rollout.access import why_silent
from rollout.ended import Ended
from rollout.frame import FrameError, session_of
from rollout.inbox import Inbox, Task
from rollout.messages import (
    Acknowledge,
    Fingerprints,
    FromTrainer,
    FromWorker,
    Grant,
    Heartbeat,
    Hello,
    Join,
    Leave,
    Load,
    Refused,
    Rejoin,
    Stop,
    Weights,
    Welcome,
)
from rollout.outbox import Outbox
from rollout.wire import Link

_JOIN_S = 0.5
_FRAME_BYTES = 512 << 10
_FRAME_MESSAGES = 1024
_SILENCES = 3  # times liveness_s


class Courier:
    """One session with the trainer. Its methods are for the main thread; `Ended` is raised by all that wait or report.

    `patience_s`: how long the trainer may take to answer the first Join. `spawned`: the trainer started this process,
    so that it stays through a long silence; one started by hand looks for another trainer sooner.
    `on_end` is called on the network thread when the session ends, so that a hanging engine cannot stay.
    """

    def __init__(
        self, link: Link, join: Join, *, patience_s: float, spawned: bool, on_end: Callable[[Ended], None]
    ) -> None:
        self.name, self.role = join.worker, join.role
        self._link, self._join, self._spawned, self._on_end = link, join, spawned, on_end
        self._changed = threading.Condition()
        self._welcome: Welcome | None = None
        self._hello: Hello | None = None
        self._hello_beat = 0  # first beat that carried it
        self._ended: Ended | None = None
        self._leaving: str | None = None
        self._outbox, self._inbox = Outbox(1), Inbox()
        self._newest: Weights | None = None
        self._doing, self._progress, self._beat = "loading", 0, 0
        self._heard_s, self._silence_s = time.monotonic(), patience_s
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def welcome(self) -> Welcome:
        """Wait for the run's terms."""
        with self._changed:
            self._wait(lambda: self._welcome is not None)
            assert self._welcome is not None
            return self._welcome

    def ready(self, fingerprints: Fingerprints, vocab_size: int) -> None:
        """The engine is loaded."""
        with self._changed:
            self._hello = Hello(fingerprints=fingerprints, vocab_size=vocab_size)
            self._doing = "idle"
        self._link.wake()

    def next_task(self) -> Task:
        """Wait for a lease, and for the weights it needs. The previous one is done."""
        with self._changed:
            self._inbox.current, self._doing = None, "idle"
            self._wait(lambda: self._inbox.ready)
            task = self._inbox.take()
            self._doing = f"generating {task.lease.lease_id}"
            self._progress += 1
            return task

    def newer_weights(self) -> Weights | None:
        """Weights newer than the engine's, if any were published. Called at every decode step, so it takes no lock."""
        newest = self._newest
        return newest if newest is not None and newest.version > self._inbox.loaded else None

    def newer_than(self, version: int) -> Weights | None:
        """Weights newer than these, which cannot be loaded; None where none come within three times liveness_s."""
        with self._changed:
            assert self._welcome is not None
            doing, self._doing = self._doing, f"waiting for weights newer than {version}"
            patience_s = _SILENCES * self._welcome.liveness_s
            came = self._wait(lambda: self._newest is not None and self._newest.version > version, patience_s)
            self._doing = doing
            return self._newest if came else None

    def loaded(self, version: int, started_s: float) -> None:
        """These weights are in the engine, which began to load them at `started_s` (time.monotonic())."""
        with self._changed:
            self._inbox.took(Load(version=version, started_s=started_s, finished_s=time.monotonic()))
            self._progress += 1

    def deliver(self, completion: Completion) -> None:
        """Hand over a completion of the current lease; waits while the outbox is full."""
        with self._changed:
            lease = self._inbox.current
            assert lease is not None
            if self._outbox.full:
                doing, self._doing = self._doing, f"waiting for {len(self._outbox)} acknowledgements"
                self._wait(lambda: not self._outbox.full)
                self._doing = doing
            sends = self._outbox.has_unsent
            self._outbox.put(lease.lease_id, lease.purpose, completion)
            self._progress += 1
        if not sends:  # else the network thread takes it along: a wake for each one would cut frames of one completion
            self._link.wake()

    def on_progress(self, tokens: int) -> None:
        """The engine drew tokens. Raises Ended where there is no sense in drawing more."""
        self._progress += 1  # a lock per decode step would be dear; a lost count is not
        if self._ended is not None:
            raise self._ended

    def close(self, reason: str) -> None:
        """End the session: say why, and stop the thread."""
        self._leaving = reason
        if self._thread.is_alive():
            self._link.wake()
            self._thread.join()
        self._link.close(linger_s=0.2)

    def _wait(self, true: Callable[[], bool], patience_s: float | None = None) -> bool:
        came = self._changed.wait_for(lambda: true() or self._ended is not None, patience_s)
        if self._ended is not None:
            raise self._ended
        return came

    def _run(self) -> None:
        try:
            self._greet()
            while self._ended is None and self._leaving is None:
                self._turn()
        except Exception as error:  # the thread's boundary: the main thread raises it
            kind: Literal["refused", "failed"] = "refused" if isinstance(error, FrameError) else "failed"
            self._end(Ended(kind, str(error) or repr(error)))
        self._link.send([Leave(reason=self._leaving or f"told to: {self._ended}")])

    def _greet(self) -> None:
        while self._welcome is None and self._ended is None and self._leaving is None:
            self._link.send([self._join])
            self._hear(self._link.poll(_JOIN_S))
            if self._link.refusal:
                self._end(Ended("refused", self._link.refusal))

    def _turn(self) -> None:
        assert self._welcome is not None
        next_beat_s = time.monotonic() + self._welcome.heartbeat_s
        self._link.send(self._heartbeat())
        while time.monotonic() < next_beat_s and self._ended is None and self._leaving is None:
            if self._hello is not None and not self._hello_beat:
                return  # the next beat carries it
            self._send_deliveries()
            self._hear(self._link.poll(next_beat_s - time.monotonic()))

    def _heartbeat(self) -> Sequence[FromWorker]:
        with self._changed:
            self._beat += 1
            lacks = self._inbox.lacks
            doing = self._doing if lacks is None or self._inbox.current else f"waiting for weights {lacks}"
            beat = Heartbeat(
                beat=self._beat, progress=self._progress, doing=doing, produced=self._outbox.produced,
                unacknowledged=len(self._outbox), leases=tuple({*self._inbox.leases, *self._outbox.leases}),
                version=self._inbox.version, loaded=self._inbox.loaded, loads=tuple(self._inbox.loads),
            )  # fmt: skip
            if self._hello is None:
                return [beat]
            # In one frame with the beat: once a beat since then is acknowledged, the hello has arrived.
            self._hello_beat = self._hello_beat or self._beat
            return [self._hello, beat]

    def _send_deliveries(self) -> None:
        while True:
            with self._changed:
                batch = self._outbox.unsent(_FRAME_BYTES, _FRAME_MESSAGES)
            if not batch or not self._link.send(batch):
                return
            with self._changed:
                self._outbox.sent(batch, self._beat)

    def _hear(self, messages: list[FromTrainer]) -> None:
        now = time.monotonic()
        if messages:
            self._heard_s = now
        elif (silent_s := now - self._heard_s) > self._silence_s:
            link, answered = self._link, self._welcome is not None
            why = "" if answered else why_silent(link.endpoint, link.counts, has_keys=link.has_keys)
            self._end(Ended("silent", f"no answer from the trainer for {silent_s:.0f} s{why}"))
        with self._changed:
            for message in messages:
                self._take(message)
            self._changed.notify_all()

    def _take(self, message: FromTrainer) -> None:
        if isinstance(message, Acknowledge):
            self._outbox.acknowledge(message.seqs, message.beat)
            if self._hello is not None and 0 < self._hello_beat <= message.beat:
                self._hello = None
        elif isinstance(message, Grant):
            self._inbox.grant(message.lease)
        elif isinstance(message, Weights):
            self._inbox.learn(message)
            self._newest = message
        elif isinstance(message, Welcome):
            self._begin(message)
        elif isinstance(message, Refused):
            self._end(Ended("refused", message.reason))
        elif isinstance(message, Rejoin):
            self._end(Ended("rejoin", message.reason, message.role))
        else:
            assert isinstance(message, Stop), message
            self._end(Ended("stop", message.reason))

    def _begin(self, welcome: Welcome) -> None:
        if self._welcome is None:
            self._link.session = session_of(welcome.run_id, welcome.incarnation)
            self._link.limit(welcome.max_frame_bytes)
            self._outbox = Outbox(welcome.window)
            self._welcome = welcome
            self._silence_s = welcome.silence_s if self._spawned else _SILENCES * welcome.liveness_s

    def _end(self, ended: Ended) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = ended
                self._changed.notify_all()
                self._on_end(ended)
