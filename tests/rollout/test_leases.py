"""LeaseBook: order, credit, versions, losses; then every interleaving of a lossy world against a model."""

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.faults.parts import make_completion, make_lease
from core.schema import CompletionKey, Source
from rollout.leases import LEASES_AHEAD, MISSED_BEATS, LeaseBook, Verdict
from rollout.messages import Deliver, Lease
from rollout.outbox import Outbox
from rollout.peers import SeqWindow


def book_with(*leases: Lease, credit: int = 1000, **settings: int) -> LeaseBook:
    book = LeaseBook(credit=credit, **settings)
    for lease in leases:
        book.submit(lease)
    book.admit("a", Source.EXPLORER)
    book.admit("b", Source.EXPLORER)
    return book


def finish(book: LeaseBook, lease: Lease) -> list[CompletionKey]:
    """Answer what is outstanding of a lease."""
    keys = []
    for item in lease.items:
        for sample in item.samples:
            completion = make_completion(lease, item.slot, sample)
            if book.verdict(lease.lease_id, lease.purpose, completion.key) == Verdict.WANTED:
                book.receive(lease.lease_id, completion)
                keys.append(completion.key)
    return keys


def test_order_is_evaluation_then_step_then_prompt() -> None:
    """A replacement for an early prompt, asked for last, does not wait for the rest of the step."""
    late, early, second = make_lease(0, step=5), make_lease(0, step=2), make_lease(1, step=2)
    exam = make_lease(0, step=9, purpose="eval")
    book = book_with(late, second, early, exam)
    granted = []
    for _ in range(4):
        (lease,) = book.grant("a")
        granted.append(lease)
        finish(book, lease)
    assert granted == [exam, early, second, late]


def test_credit_bounds_what_a_worker_owes_but_a_large_lease_is_still_served() -> None:
    book = book_with(make_lease(0), make_lease(1), credit=20)  # 16 completions each
    (first,) = book.grant("a")
    assert book.grant("a") == []
    assert [lease.lease_id for lease in book.grant("b")] == ["train-explorer-1-1"]
    finish(book, first)
    large = book_with(make_lease(0), credit=3)
    assert len(large.grant("a")) == 1


def test_a_worker_takes_no_more_than_it_can_use_soon() -> None:
    book = book_with(*(make_lease(n) for n in range(9)))
    assert len(book.grant("a", limit=9)) == LEASES_AHEAD


def test_roles_and_versions_are_respected() -> None:
    book = book_with(make_lease(0, source=Source.LEARNER, version=2), make_lease(1, source=Source.LEARNER, version=1))
    book.admit("l", Source.LEARNER)
    assert book.grant("a") == []
    assert book.grant("l") == []
    book.learn("l", 1)
    assert [lease.version for lease in book.grant("l", limit=2)] == [1]
    book.learn("l", 2)
    assert [lease.version for lease in book.grant("l", limit=2)] == [2]


def test_leases_held_back_are_skipped() -> None:
    book = book_with(make_lease(0, step=1), make_lease(0, step=2))
    assert [lease.step for lease in book.grant("a", limit=2, may_grant=lambda lease: lease.step == 2)] == [2]


def test_a_lost_worker_gives_its_leases_back_and_the_first_answer_wins() -> None:
    lease = make_lease(0, slots=1, samples=2)
    book = book_with(lease)
    book.grant("a")
    assert book.lose("a") == 1
    assert book.grant("b") == [lease]
    finish(book, lease)  # whoever answers
    assert book.verdict(lease.lease_id, "train", make_completion(lease, 0, 0).key) == Verdict.DUPLICATE
    assert book.grant("b") == []
    assert book.owed("b") == 0


def test_a_queued_lease_answered_late_by_its_former_holder_is_not_granted_again() -> None:
    lease = make_lease(0)
    book = book_with(lease)
    book.grant("a")
    book.lose("a")
    finish(book, lease)
    assert book.grant("b") == []


def test_a_lease_that_no_heartbeat_names_is_granted_again() -> None:
    lease = make_lease(0)
    book = book_with(lease)
    book.grant("a")
    assert [book.reconcile("a", []) for _ in range(MISSED_BEATS)] == [0] * (MISSED_BEATS - 1) + [1]
    assert book.grant("b") == [lease]
    for _ in range(10):
        assert book.reconcile("b", [lease.lease_id]) == 0


def test_a_lease_lost_too_often_is_exhausted() -> None:
    lease = make_lease(0)
    book = book_with(lease, max_losses=2)
    for _ in range(3):
        book.admit("a", Source.EXPLORER)
        assert book.grant("a") == [lease]
        book.lose("a")
    book.admit("a", Source.EXPLORER)
    assert book.grant("a") == []
    assert list(book.exhausted.values()) == [lease]


def test_a_grant_that_could_not_be_sent_is_no_loss() -> None:
    lease = make_lease(0)
    book = book_with(lease, max_losses=0)
    for _ in range(5):
        assert book.grant("a") == [lease]
        book.retract("a", lease.lease_id)
    assert book.requeued == 0


@pytest.mark.parametrize(
    ("purpose", "source", "step", "slot", "sample"),
    [
        ("eval", "explorer", 1, 0, 0),
        ("train", "learner", 1, 0, 0),
        ("train", "explorer", 2, 0, 0),
        ("train", "explorer", 1, 99, 0),
        ("train", "explorer", 1, 0, 4),
    ],
)
def test_keys_of_another_lease_are_foreign(purpose: str, source: str, step: int, slot: int, sample: int) -> None:
    book = book_with(make_lease(0))
    key = CompletionKey(source=Source(source), step=step, slot=slot, sample=sample)
    assert book.verdict("train-explorer-1-0", purpose, key) == Verdict.FOREIGN_KEY
    assert book.verdict("nothing", purpose, key) == Verdict.UNKNOWN_LEASE


def test_submitting_twice_or_overlapping_is_refused() -> None:
    book = book_with(make_lease(0))
    with pytest.raises(ValueError, match="submitted before"):
        book.submit(make_lease(0))
    with pytest.raises(ValueError, match="another lease has"):
        book.submit(make_lease(7, first_slot=2))


def test_memory_of_finished_leases_is_bounded() -> None:
    book = book_with(remembered=10)
    for number in range(50):
        lease = make_lease(number, slots=1, samples=1)
        book.submit(lease)
        finish(book, lease)
    key = make_completion(lease, 49, 0).key
    assert book.verdict("train-explorer-1-49", "train", key) == Verdict.DUPLICATE
    assert book.verdict("train-explorer-1-30", "train", key) == Verdict.UNKNOWN_LEASE
    assert len(book._finished) == 10
    assert not book._live


class LossyWorld(RuleBasedStateMachine):
    """Workers with outboxes, and wires that lose, double and reorder; workers crash, and are lost and come back."""

    SLOTS, SAMPLES, WINDOW = 2, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.book = LeaseBook(credit=6, max_losses=10**9)
        self.inserted: Counter[CompletionKey] = Counter()
        self.rejected: Counter[str] = Counter()
        self.submitted = 0
        self.starts = 0
        self.windows: dict[str, SeqWindow] = {}
        self.outboxes: dict[str, Outbox] = {}
        self.todo: dict[str, deque[tuple[Lease, int, int]]] = {}
        self.wire: list[tuple[str, Deliver]] = []
        self.dead_produced: dict[str, int] = {}
        self.start()

    @rule()
    def start(self) -> None:
        if len(self.outboxes) < 3:
            name = f"w{self.starts}"
            self.starts += 1
            self.windows[name], self.outboxes[name], self.todo[name] = (
                SeqWindow(self.WINDOW),
                Outbox(self.WINDOW),
                deque(),
            )
            self.book.admit(name, Source.EXPLORER)

    @rule()
    def submit(self) -> None:
        self.book.submit(make_lease(self.submitted, slots=self.SLOTS, samples=self.SAMPLES))
        self.submitted += 1

    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        for lease in self.book.grant(self.pick(data, self.outboxes)):
            name = next(work.holder for work in self.book.work(Source.EXPLORER) if work.lease is lease)
            self.todo[name].extend((lease, item.slot, sample) for item in lease.items for sample in item.samples)

    @precondition(lambda self: any(self.todo.values()))
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        name = self.pick(data, {name: todo for name, todo in self.todo.items() if todo})
        if not self.outboxes[name].full:
            lease, slot, sample = self.todo[name].popleft()
            self.outboxes[name].put(lease.lease_id, "train", make_completion(lease, slot, sample))

    @rule(data=st.data(), beat=st.integers(0, 3))
    def send(self, data: st.DataObject, beat: int) -> None:
        name = self.pick(data, self.outboxes)
        batch = self.outboxes[name].unsent(10**6, 3)
        self.outboxes[name].sent(batch, beat)
        self.wire.extend((name, deliver) for deliver in batch)

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), fate=st.sampled_from(["arrive", "arrive", "double", "drop", "unacknowledged"]))
    def transmit(self, data: st.DataObject, fate: str) -> None:
        name, deliver = self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))
        for _ in range({"drop": 0, "double": 2}.get(fate, 1)):
            self.receive(name, deliver)
        if fate in ("arrive", "double") and name in self.outboxes:
            self.outboxes[name].acknowledge((deliver.seq,), 0)

    def receive(self, name: str, deliver: Deliver) -> None:
        window = self.windows[name]
        assert window.admits(deliver.seq)
        if not window.add(deliver.seq):
            return
        verdict = self.book.verdict(deliver.lease_id, deliver.purpose, deliver.completion.key)
        if verdict == Verdict.WANTED:
            self.book.receive(deliver.lease_id, deliver.completion)
            self.inserted[deliver.completion.key] += 1
        else:
            self.rejected[verdict] += 1

    @rule(data=st.data(), beat=st.integers(1, 5))
    def beat(self, data: st.DataObject, beat: int) -> None:
        name = self.pick(data, self.outboxes)
        self.outboxes[name].acknowledge((), beat)
        held = {lease.lease_id for lease, _, _ in self.todo[name]} | set(self.outboxes[name].leases)
        self.book.reconcile(name, held)

    @precondition(lambda self: len(self.outboxes) > 1)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        name = self.pick(data, self.outboxes)
        self.dead_produced[name] = self.outboxes.pop(name).produced
        del self.todo[name]
        self.book.lose(name)

    @rule(data=st.data())
    def silence(self, data: st.DataObject) -> None:
        """Given up for dead, and heard again: it goes on with what it had."""
        name = self.pick(data, self.outboxes)
        self.book.lose(name)
        self.book.admit(name, Source.EXPLORER)

    @staticmethod
    def pick(data: st.DataObject, names: dict[str, object]) -> str:
        return data.draw(st.sampled_from(sorted(names)))

    @invariant()
    def at_most_once(self) -> None:
        assert set(self.inserted.values()) <= {1}
        assert set(self.rejected) <= {Verdict.DUPLICATE}

    @invariant()
    def conserved(self) -> None:
        received = sum(window.total for window in self.windows.values())
        assert received == self.inserted.total() + self.rejected.total()
        produced = sum(box.produced for box in self.outboxes.values()) + sum(self.dead_produced.values())
        assert produced >= received
        for name, box in self.outboxes.items():
            assert box.produced - len(box) <= self.windows[name].total <= box.produced

    @invariant()
    def nothing_is_forgotten(self) -> None:
        outstanding = sum(work.lease.num_completions - work.received for work in self.book.work(Source.EXPLORER))
        assert outstanding + self.inserted.total() == self.submitted * self.SLOTS * self.SAMPLES
        assert all(self.book.owed(name) <= 2 * self.book.credit for name in self.outboxes)

    def teardown(self) -> None:
        """Without faults, what is left arrives exactly once."""
        for name in self.outboxes:
            self.todo[name].clear()
            self.book.lose(name)
        for name in list(self.outboxes)[:1]:
            self.book.admit(name, Source.EXPLORER)
            while leases := self.book.grant(name):
                self.inserted.update(finish(self.book, leases[0]))
            self.at_most_once()
            assert not self.book.work(Source.EXPLORER)


LossyWorld.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
test_lossy_world = LossyWorld.TestCase
