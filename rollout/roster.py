"""The trainer's side of the conversation (rollout.messages): who takes part, what they are told, what is believed.

Pure: messages and times come in, replies go out. `rollout.pool` moves them.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from core.schema import Completion, Source
from rollout.frame import FrameError
from rollout.handover import idle_explorers, rejoin
from rollout.judge import judge
from rollout.leases import LeaseBook
from rollout.messages import (
    Acknowledge,
    Deliver,
    Fingerprints,
    FromTrainer,
    FromWorker,
    Grant,
    Heartbeat,
    Hello,
    Join,
    Lease,
    Leave,
    Refused,
    Rejoin,
    Weights,
    Welcome,
)
from rollout.peers import Peer, Peers, SeqWindow, State
from rollout.terms import mismatch

MAX_PEERS = 1024
# Beats a worker may take to name weights it was sent, before they are sent again.
_WEIGHTS_BEATS = 3
# Loading a model starves the network thread; a worker that loads holds no lease, so patience is free.
_LOADING_PATIENCE = 6
# Frames in a row that cannot be read, after which their sender is refused.
_MAX_BAD_FRAMES = 100
_BACK = (State.READY, State.LOADING)


class RoleTerms(NamedTuple):
    """What workers of one role must run: the model directory and what identifies it."""

    model_dir: Path
    fingerprints: Fingerprints
    vocab_size: int  # of the engine; token ids must lie below it


class Roster:
    """Workers, their leases and their completions. `welcome` holds the run's terms; its `model` is filled in by role.

    `on_completion(purpose, completion)` is called once for each completion that is believed and wanted.
    """

    def __init__(
        self, book: LeaseBook, *, session: int, welcome: Welcome, terms: Mapping[Source, RoleTerms],
        liveness_s: float, hang_s: float, on_completion: Callable[[str, Completion], None],
        on_event: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.book, self.session, self.terms = book, session, terms
        self.liveness_s, self.hang_s = liveness_s, hang_s
        self.peers = Peers(MAX_PEERS)
        self.events: Counter[str] = Counter()
        self.bad_frames: Counter[str] = Counter()
        self.problems: dict[str, str] = {}  # the last one of each kind, in words
        self.weights: Weights | None = None
        self._welcome, self._on_completion, self._on_event = welcome, on_completion, on_event
        self._bad_in_a_row: Counter[bytes] = Counter()
        self._ticked_s: float | None = None

    def hear(self, identity: bytes, session: int, messages: Sequence[FromWorker], now: float) -> list[FromTrainer]:
        """Take in one frame; returns what to answer."""
        self._bad_in_a_row.pop(identity, None)
        replies: list[FromTrainer] = []
        seqs: list[int] = []
        for message in messages:
            peer = self.peers.get(identity)
            if isinstance(message, Join):
                replies.append(self._join(identity, message, now))
            elif peer is None or session != self.session:
                self.bad_frames["unknown_worker" if peer is None else "other_session"] += 1
                return [Rejoin(reason="the trainer does not know this worker: it restarted, or gave the worker up")]
            elif peer.state == State.REFUSED:
                return [Refused(reason=peer.why)]
            elif isinstance(message, Leave):
                self._end(peer, State.GONE, message.reason)
                return []
            elif peer.next_role is not None:
                return [rejoin(peer.next_role)]
            else:
                peer.seen_s = now
                replies += self._revive(peer, now)
                replies += self._answer(peer, message, seqs, now)
        peer = self.peers.get(identity)
        if peer is not None and session == self.session and peer.state != State.REFUSED:
            replies.append(Acknowledge(seqs=tuple(seqs), beat=peer.beat))
        return replies

    def bad_frame(self, identity: bytes, problem: FrameError) -> list[FromTrainer]:
        """Count a frame that could not be read. Damage happens: only a peer that sends nothing else is refused."""
        self.bad_frames[problem.reason] += 1
        self.problems[problem.reason] = str(problem)
        self._bad_in_a_row[identity] += 1
        if len(self._bad_in_a_row) > MAX_PEERS:
            self._bad_in_a_row.clear()
        if problem.reason != "schema_version" and self._bad_in_a_row[identity] < _MAX_BAD_FRAMES:
            return []
        return [Refused(reason=f"the trainer cannot read this worker's messages: {problem}")]

    def tick(self, now: float) -> None:
        """Find workers that fell silent or hang. A pause of the trainer itself is nobody's silence."""
        pause = now - (self._ticked_s if self._ticked_s is not None else now)
        self._ticked_s = now
        for peer in self.peers.values():
            if pause > self.liveness_s / 2:
                peer.seen_s, peer.progress_s = peer.seen_s + pause, peer.progress_s + pause
            patience = self.liveness_s * (1 if peer.greeted else _LOADING_PATIENCE)
            if peer.state in (State.LOADING, State.READY, State.HUNG) and now - peer.seen_s > patience:
                self._end(peer, State.DEAD, "")
            elif peer.state == State.READY and self.book.owed(peer.name) > 0 and now - peer.progress_s > self.hang_s:
                self._end(peer, State.HUNG, "")

    def grants(self, now: float, may_grant: Callable[[Lease], bool] | None) -> Iterator[tuple[Peer, Grant]]:
        """Deal out leases one by one, first to whoever owes least."""
        ready = [peer for peer in self.peers.values() if peer.state == State.READY and not peer.leaving]
        while ready:
            ready.sort(key=lambda peer: (self.book.owed(peer.name), peer.name))
            for peer in list(ready):
                idle = self.book.owed(peer.name) == 0
                leases = self.book.grant(peer.name, may_grant=may_grant)
                if leases and idle:
                    peer.progress_s = now
                if not leases:
                    ready.remove(peer)
                yield from ((peer, Grant(lease=lease)) for lease in leases)

    def publish(self, weights: Weights) -> list[tuple[Peer, FromTrainer]]:
        """New learner weights; returns whom to tell."""
        assert self.weights is None or weights.version > self.weights.version, (weights, self.weights)
        self.weights = weights
        ready = [peer for peer in self.peers.values() if peer.role == Source.LEARNER and peer.state == State.READY]
        return [(peer, message) for peer in ready for message in self._weights_for(peer)]

    def hand_over(self, pids: Collection[int]) -> list[tuple[Peer, FromTrainer]]:
        """Explorers of these processes that owe nothing join the learner's rollouts; returns whom to tell."""
        idle = [peer for peer in idle_explorers(self.peers, pids) if not self.book.owed(peer.name)]
        for peer in idle:
            peer.next_role = Source.LEARNER
            self._end(peer, State.GONE, "its process joins the learner's rollouts")
        return [(peer, rejoin(Source.LEARNER)) for peer in idle]

    def process_ended(self, pid: int, host: str, why: str) -> None:
        """A worker's process is known to have ended."""
        for peer in self.peers.values():
            if (peer.join.pid, peer.join.host) == (pid, host) and peer.state != State.REFUSED:
                self._end(peer, State.GONE, why)

    def _answer(self, peer: Peer, message: FromWorker, seqs: list[int], now: float) -> list[FromTrainer]:
        if isinstance(message, Hello):
            return self._hello(peer, message)
        if isinstance(message, Deliver):
            seqs.append(message.seq)
            return self._deliver(peer, message, now)
        assert isinstance(message, Heartbeat), message
        if wrong := peer.hear(message, now):
            return [self._refuse(peer, wrong)]
        if peer.state == State.READY:
            self.book.reconcile(peer.name, message.leases)
        late = self.weights is not None and message.version < self.weights.version
        if peer.greeted and late and message.beat >= peer.weights_beat + _WEIGHTS_BEATS:
            return self._weights_for(peer)
        return []

    def _join(self, identity: bytes, message: Join, now: float) -> FromTrainer:
        terms = self.terms.get(message.role)
        if message.worker.encode() != identity:
            return Refused(reason=f"the worker calls itself {message.worker}, its connection {identity!r}")
        if terms is None:
            return Refused(reason=f"this run has no work for {message.role} workers")
        if identity not in self.peers:
            self.peers.enter(Peer(message, identity, SeqWindow(self._welcome.window), now, now, now))
            self.events["joined"] += 1
        return msgspec.structs.replace(self._welcome, model=str(terms.model_dir))

    def _hello(self, peer: Peer, hello: Hello) -> list[FromTrainer]:
        terms = self.terms[peer.role]
        if wrong := mismatch(hello, terms.fingerprints, terms.vocab_size):
            return [self._refuse(peer, f"{wrong} ({terms.model_dir})")]
        if not peer.greeted:
            peer.greeted, peer.state = True, State.READY
            self.book.admit(peer.name, peer.role)
            self._on_event(f"{peer.name} is ready (pid {peer.join.pid} on {peer.join.host})")
            return self._weights_for(peer)
        return []

    def _deliver(self, peer: Peer, message: Deliver, now: float) -> list[FromTrainer]:
        if not peer.greeted or not peer.window.admits(message.seq):
            return [self._refuse(peer, f"delivery {message.seq} came before its turn")]
        if not peer.window.add(message.seq):
            peer.resent += 1
            return []
        peer.produced = max(peer.produced, message.seq)
        newest = self.weights.version if self.weights is not None and peer.role == Source.LEARNER else 0
        reason, problem = judge(message, self.book, peer.name, self.terms[peer.role].vocab_size, newest)
        if reason:
            peer.rejected[reason] += 1
            self.problems[reason] = f"{peer.name}: {problem}"
            return []
        self._on_completion(message.purpose, message.completion)
        self.book.receive(message.lease_id, message.completion)
        peer.accepted[message.purpose] += 1
        return []

    def _revive(self, peer: Peer, now: float) -> list[FromTrainer]:
        """A worker given up for dead speaks again. One that hangs must also make progress, which `hear` notes."""
        hung = peer.state == State.HUNG and now - peer.progress_s > self.hang_s
        if peer.state in _BACK or hung or (peer.state == State.GONE):
            return []
        peer.state = State.READY if peer.greeted else State.LOADING
        self.events["revived"] += 1
        self._on_event(f"{peer.name} is back")
        if not peer.greeted:
            return []
        self.book.admit(peer.name, peer.role)
        return self._weights_for(peer)

    def _weights_for(self, peer: Peer) -> list[FromTrainer]:
        if self.weights is None or peer.role != Source.LEARNER:
            return []
        peer.weights_beat = peer.beat
        self.book.learn(peer.name, self.weights.version)
        return [self.weights]

    def _refuse(self, peer: Peer, reason: str) -> Refused:
        self._end(peer, State.REFUSED, reason)
        return Refused(reason=reason)

    def _end(self, peer: Peer, state: State, why: str) -> None:
        lost = self.book.lose(peer.name)
        if peer.state != state:  # the first reason says more than what follows from it
            self.events[state.value] += 1
            peer.state, peer.why = state, why
            self._on_event(f"{peer.name} is {state}{why and ': '}{why}; {lost} of its leases go to others")
