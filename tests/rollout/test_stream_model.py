"""Promises 1 to 4 in every interleaving of what a network, its workers and the trainer may do to each other.

The trainer's and the worker's own code (roster, lease book, buffer, ledger, outbox, inbox, codecs) talks over a network
that is a bag of frames: any of them may be delivered at any time, twice, or never. Workers crash without a word; the
trainer is killed and starts again from a checkpoint.
"""

import random
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.faults.parts import make_completion, make_lease
from core.config import Config, Stream
from core.schema import Completion, CompletionKey, Source
from rollout.buffer import BufferState, ReplayBuffer
from rollout.frame import session_of, trainer_codec, worker_codec
from rollout.inbox import Inbox
from rollout.leases import LeaseBook
from rollout.ledger import Ledger
from rollout.messages import (
    Acknowledge,
    Fingerprints,
    FromTrainer,
    FromWorker,
    Grant,
    Heartbeat,
    Hello,
    Join,
    Lease,
    Rejoin,
    Welcome,
)
from rollout.outbox import Outbox
from rollout.roster import RoleTerms, Roster
from rollout.terms import welcome

STEPS, SLOTS, SAMPLES, LEASES, WINDOW = 3, 2, 2, 2, 6
MARKS = Fingerprints(tokenizer="t", weights="w")
LIVENESS_S, HANG_S = 5.0, 20.0
MAX_FRAME = 1 << 20
PICK = st.integers(min_value=0, max_value=10**6)


def leases_of(step: int) -> list[Lease]:
    return [make_lease(number, step=step, slots=SLOTS, samples=SAMPLES) for number in range(LEASES)]


def keys_of(step: int) -> set[CompletionKey]:
    return {
        CompletionKey(source=Source.EXPLORER, step=step, slot=item.slot, sample=sample)
        for lease in leases_of(step)
        for item in lease.items
        for sample in item.samples
    }


class Worker:
    """rollout.courier without threads and sockets, and an engine that answers at once."""

    def __init__(self, name: str) -> None:
        self.name, self.beat, self.hello_beat = name, 0, 0
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.session = 0
        self.inbox, self.outbox = Inbox(), Outbox(1)
        self.todo: list[tuple[int, int]] = []
        self.over = False
        self._codec = worker_codec(MAX_FRAME)

    def frame(self, messages: list[FromWorker]) -> bytes:
        return bytes(self._codec.encode(messages, self.session))

    def speak(self) -> bytes:
        """A Join until it is answered, then a beat."""
        if self.welcome is None:
            return self.frame([Join(worker=self.name, role=Source.EXPLORER, pid=1, host=self.name)])
        self.beat += 1
        beat = Heartbeat(
            beat=self.beat, progress=self.beat, doing="", produced=self.outbox.produced,
            unacknowledged=len(self.outbox), leases=tuple({*self.inbox.leases, *self.outbox.leases}), version=0,
        )  # fmt: skip
        if self.hello is None:
            return self.frame([beat])
        self.hello_beat = self.hello_beat or self.beat
        return self.frame([self.hello, beat])

    def send(self) -> bytes | None:
        batch = self.outbox.unsent(MAX_FRAME, 3)
        if not batch:
            return None
        self.outbox.sent(batch, self.beat)
        return self.frame(list(batch))

    def work(self) -> None:
        """One more completion, where there is work and room."""
        if not self.todo and self.inbox.ready:
            lease = self.inbox.take().lease
            self.todo = [(item.slot, sample) for item in lease.items for sample in item.samples]
        if self.todo and not self.outbox.full:
            slot, sample = self.todo.pop(0)
            lease = self.inbox.current
            self.outbox.put(lease.lease_id, lease.purpose, make_completion(lease, slot, sample, worker=self.name))
            if not self.todo:
                self.inbox.current = None

    def hear(self, frame: bytes) -> None:
        for message in self._codec.decode(frame).messages:
            self._take(message)

    def _take(self, message: FromTrainer) -> None:
        if isinstance(message, Welcome):
            if self.welcome is None:
                self.welcome, self.hello = message, Hello(fingerprints=MARKS, vocab_size=100)
                self.session = session_of(message.run_id, message.incarnation)
                self.outbox = Outbox(message.window)
        elif isinstance(message, Acknowledge):
            self.outbox.acknowledge(message.seqs, message.beat)
            if 0 < self.hello_beat <= message.beat:
                self.hello = None
        elif isinstance(message, Grant):
            self.inbox.grant(message.lease)
        else:
            assert isinstance(message, Rejoin), message  # nobody here deserves to be refused
            self.over = True


class Trainer:
    """rollout.pool and rollout.mixer without threads, sockets and rewards."""

    def __init__(self, incarnation: int, trained: list[CompletionKey], step: int, saved: dict[str, Any] | None) -> None:
        self.trained, self.step, self.incarnation = list(trained), step, incarnation
        self.ledger = Ledger()
        self.buffer = ReplayBuffer(self.ledger, max_bytes=1 << 30)
        if saved is not None:
            self.ledger.restore(saved["report"])
            self.buffer.restore(msgspec.msgpack.decode(saved["buffer"], type=BufferState), step)
            for completion in self.buffer.state().completions:
                self.buffer.score(completion.key, 1.0, "")
        config = Config(stream=Stream(credit=WINDOW))
        self.book = LeaseBook(credit=WINDOW, max_losses=10**6)
        self.roster = Roster(
            self.book, session=session_of("r", incarnation), welcome=welcome(config, "r", incarnation),
            terms={Source.EXPLORER: RoleTerms(Path("m"), MARKS, 100)}, liveness_s=LIVENESS_S, hang_s=HANG_S,
            on_completion=self.receive,
        )  # fmt: skip
        self.codec = trainer_codec(MAX_FRAME)
        for ahead in range(step + 1, STEPS + 1):
            for lease in leases_of(ahead):
                wanted = {
                    CompletionKey(source=Source.EXPLORER, step=ahead, slot=item.slot, sample=sample)
                    for item in lease.items
                    for sample in item.samples
                }
                if not all(self.buffer.knows(key) for key in wanted):
                    self.book.submit(lease)

    def receive(self, purpose: str, completion: Completion) -> None:
        if self.buffer.insert(completion):
            self.buffer.score(completion.key, 1.0, "")

    def hear(self, identity: bytes, frame: bytes, now: float) -> bytes | None:
        session, messages = self.codec.decode(frame)
        replies = self.roster.hear(identity, session, messages, now)
        return bytes(self.codec.encode(replies, self.roster.session)) if replies else None

    def draw(self) -> bool:
        """Train the next step if it is complete."""
        if self.step == STEPS or self.buffer.missing(self.step + 1, range(SLOTS * LEASES), SAMPLES):
            return False
        self.step += 1
        keys = list(self.buffer.scored(self.step))
        assert set(keys) == keys_of(self.step)  # promise 3
        self.buffer.take(self.step, keys)
        self.trained += keys
        return True

    def report(self) -> dict[str, Any]:
        accounts = self.roster.peers.accounts()
        pool = {
            source.value: {
                "produced": account["produced"],
                "accepted": account.group("accepted"),
                "rejected": account.group("rejected"),
                "in_flight": account["in_flight"],
                "lost": account["lost"],
            }
            for source, account in accounts.items()
        }
        assert all(account.balanced for account in accounts.values()), accounts
        return self.ledger.report(pool, self.buffer.resident())


class StreamMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now, self.names, self.starts, self.turns = 0.0, 0, 1, 0
        self.up: list[tuple[bytes, bytes]] = []
        self.down: list[tuple[bytes, bytes]] = []
        self.workers: dict[bytes, Worker] = {}
        self.trainer = Trainer(1, [], 0, None)
        self.saved: tuple[list[CompletionKey], int, dict[str, Any]] | None = None

    @initialize(count=st.integers(min_value=1, max_value=3))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.restart()

    # What workers do.

    @precondition(lambda self: len(self.workers) < 4)
    @rule()
    def restart(self) -> None:
        self.names += 1
        worker = Worker(f"w.{self.names}")
        self.workers[worker.name.encode()] = worker

    @precondition(lambda self: self.workers)
    @rule(pick=PICK)
    def crash(self, pick: int) -> None:
        del self.workers[sorted(self.workers)[pick % len(self.workers)]]

    @precondition(lambda self: self.workers)
    @rule(pick=PICK, much=st.integers(min_value=1, max_value=8))
    def work(self, pick: int, much: int) -> None:
        for _ in range(much):
            self._one(pick).work()

    @precondition(lambda self: self.workers)
    @rule(pick=PICK)
    def send(self, pick: int) -> None:
        worker = self._one(pick)
        frame = worker.send()
        if frame is not None:
            self.up.append((worker.name.encode(), frame))

    @precondition(lambda self: self.workers)
    @rule(pick=PICK)
    def beat(self, pick: int) -> None:
        worker = self._one(pick)
        self.up.append((worker.name.encode(), worker.speak()))

    # What the network does: to the oldest frame or to any other.

    @precondition(lambda self: self.up)
    @rule(pick=st.one_of(st.just(0), PICK))
    def deliver_up(self, pick: int) -> None:
        identity, frame = self.up.pop(pick % len(self.up))
        self._heard(identity, frame)

    @precondition(lambda self: self.down)
    @rule(pick=st.one_of(st.just(0), PICK))
    def deliver_down(self, pick: int) -> None:
        identity, frame = self.down.pop(pick % len(self.down))
        self._told(identity, frame)

    @precondition(lambda self: self.up)
    @rule(pick=PICK)
    def double_up(self, pick: int) -> None:
        self.up.append(self.up[pick % len(self.up)])

    @precondition(lambda self: self.down)
    @rule(pick=PICK)
    def double_down(self, pick: int) -> None:
        self.down.append(self.down[pick % len(self.down)])

    @precondition(lambda self: self.up)
    @rule(pick=PICK)
    def drop_up(self, pick: int) -> None:
        self.up.pop(pick % len(self.up))

    @precondition(lambda self: self.down)
    @rule(pick=PICK)
    def drop_down(self, pick: int) -> None:
        self.down.pop(pick % len(self.down))

    @rule(turns=st.integers(min_value=2, max_value=12), chance=st.randoms(use_true_random=False))
    def go_on(self, turns: int, chance: random.Random) -> None:
        """Everybody does what is next, and some frames stay behind; single rules alone would hardly ever get far."""
        for _ in range(turns):
            for number in range(len(self.workers)):
                self.beat(number)
                self.work(number, chance.randint(0, 4))
                self.send(number)
            for _ in range(len(self.up)):
                self._fate(self.up, chance, self.deliver_up, self.double_up, self.drop_up)
            self.grant()
            for _ in range(len(self.down)):
                self._fate(self.down, chance, self.deliver_down, self.double_down, self.drop_down)
            self.wait(0.5)
            self.turns += 1

    @rule(chance=st.randoms(use_true_random=False))
    def go_on_and_draw(self, chance: random.Random) -> None:
        self.go_on(8, chance)
        self.draw()
        if chance.random() < 0.5:
            self.checkpoint()

    def _fate(self, bag: list, chance: random.Random, deliver: Any, double: Any, drop: Any) -> None:
        """A frame is mostly delivered, in order or not; else doubled, lost, or left behind."""
        if bag:
            pick = chance.choice([0, chance.randrange(len(bag))])
            chance.choices([deliver, double, drop, lambda pick: None], [80, 5, 7, 8])[0](pick)

    # What the trainer does.

    @rule()
    def grant(self) -> None:
        for peer, message in list(self.trainer.roster.grants(self.now, None)):
            self.down.append((peer.identity, bytes(self.trainer.codec.encode([message], self.trainer.roster.session))))

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0, 40.0]))
    def wait(self, seconds: float) -> None:
        """Ticks come often, so that silence is silence."""
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.trainer.roster.tick(self.now)

    @rule()
    def draw(self) -> None:
        self.trainer.draw()

    @rule()
    def checkpoint(self) -> None:
        report = self.trainer.report()
        assert report["conserved"], report  # promise 1
        state = {"report": deepcopy(report), "buffer": msgspec.msgpack.encode(self.trainer.buffer.state())}
        self.saved = (list(self.trainer.trained), self.trainer.step, state)

    @precondition(lambda self: self.turns >= 4)
    @rule()
    def kill_and_restore(self) -> None:
        self.starts, self.turns = self.starts + 1, 0
        trained, step, state = self.saved or ([], 0, None)
        self.trainer = Trainer(self.starts, trained, step, state)

    # What must hold whatever they do.

    @invariant()
    def conserved(self) -> None:
        report = self.trainer.report()
        assert report["conserved"], report

    @invariant()
    def at_most_once(self) -> None:
        assert max(Counter(self.trainer.trained).values(), default=1) == 1

    @invariant()
    def whole_steps(self) -> None:
        assert set(self.trainer.trained) == {key for step in range(1, self.trainer.step + 1) for key in keys_of(step)}

    @invariant()
    def bounded(self) -> None:
        assert all(len(worker.outbox) <= WINDOW for worker in self.workers.values())
        assert all(len(peer.window._above) <= WINDOW for peer in self.trainer.roster.peers.values())
        wanted = sum(len(keys_of(step)) for step in range(self.trainer.step + 1, STEPS + 1))
        assert sum(self.trainer.buffer.resident().values()) <= wanted

    def teardown(self) -> None:
        """Once the network behaves, every step trains: nothing was lost for good, and nobody waits for ever."""
        for _ in range(400):
            if self.trainer.step == STEPS:
                break
            self._behave()
        assert self.trainer.step == STEPS, (self.trainer.step, self.trainer.book.work(Source.EXPLORER))
        report = self.trainer.report()
        assert report["conserved"], report
        assert report["explorer"]["trained"] == STEPS * LEASES * SLOTS * SAMPLES

    def _behave(self) -> None:
        if not self.workers:
            self.restart()
        for number, worker in enumerate(sorted(self.workers)):
            if self.workers[worker].over:
                del self.workers[worker]
                self.restart()
                return
            self.beat(number)
            self.work(number, 8)
            self.send(number)
        while self.up:
            self.deliver_up(0)
        self.grant()
        while self.down:
            self.deliver_down(0)
        self.wait(1.0)
        self.draw()

    def _one(self, pick: int) -> Worker:
        return self.workers[sorted(self.workers)[pick % len(self.workers)]]

    def _heard(self, identity: bytes, frame: bytes) -> None:
        replies = self.trainer.hear(identity, frame, self.now)
        if replies is not None:
            self.down.append((identity, replies))

    def _told(self, identity: bytes, frame: bytes) -> None:
        worker = self.workers.get(identity)
        if worker is not None:
            worker.hear(frame)
            if worker.over:  # as rollout.worker: a new session under a new name
                del self.workers[identity]
                self.restart()


TestStream = StreamMachine.TestCase
TestStream.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
