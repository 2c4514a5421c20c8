"""The replay buffer and the ledger: at most once, conserved, restorable."""

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.buffer import ReplayBuffer
from rollout.ledger import RESCUED, SPARE, Ledger


def completion(source: Source, step: int, slot: int, sample: int, length: int = 3) -> Completion:
    return Completion(
        key=CompletionKey(source=source, step=step, slot=slot, sample=sample),
        prompt_uid="p",
        token_bytes=pack_tokens(range(length)),
        logprob_bytes=pack_logprobs([-0.5] * length),
        finish="stop",
        version=0,
        worker="w",
        started_s=0.0,
        finished_s=1.0,
    )


def counts(buffer: ReplayBuffer, produced: dict[Source, int], in_flight: int = 0) -> dict:
    """The ledger's report, where the pool says that these were produced and nothing was turned away at its door."""
    pool = {
        source: {"produced": produced.get(source, 0), "accepted": {}, "rejected": {}, "in_flight": in_flight, "lost": 0}
        for source in Source
    }
    return buffer.ledger.report(pool, buffer.resident())


def new_buffer(max_bytes: int = 10_000) -> ReplayBuffer:
    return ReplayBuffer(Ledger(), max_bytes=max_bytes)


def test_a_completion_is_inserted_once_and_never_after_its_step_trained() -> None:
    buffer = new_buffer()
    row = completion(Source.EXPLORER, 1, 0, 0)
    assert buffer.insert(row)
    assert not buffer.insert(row)
    buffer.score(row.key, 1.0, "text")
    buffer.take(1, [row.key])
    assert not buffer.insert(row)
    report = counts(buffer, {Source.EXPLORER: 3})
    assert report["explorer"]["rejected"] == {"duplicate": 1, "late": 1}
    assert report["explorer"]["trained"] == 1
    assert report["conserved"]


def test_a_failed_reward_drops_the_completion_and_remembers_its_key() -> None:
    buffer = new_buffer()
    row = completion(Source.LEARNER, 2, 4, 1)
    buffer.insert(row)
    buffer.fail_reward(row.key, "reward_timeout")
    assert buffer.failed(2) == {row.key}
    assert buffer.knows(row.key)
    assert not buffer.insert(row)
    assert buffer.num_bytes == 0


def test_take_drops_what_the_step_did_not_use_as_spare() -> None:
    buffer = new_buffer()
    rows = [completion(Source.EXPLORER, 1, 0, sample) for sample in range(3)]
    for row in rows:
        buffer.insert(row)
        buffer.score(row.key, 0.0, "")
    buffer.take(1, [rows[0].key])
    report = counts(buffer, {Source.EXPLORER: 3})
    assert report["conserved"]
    assert report["explorer"]["dropped"] == {"spare": 2}
    assert report["explorer"]["resident"] == 0


def test_planned_drops_are_no_fault_and_the_others_have_their_reasons() -> None:
    ledger = Ledger()
    for source, reason, count in (
        (Source.EXPLORER, SPARE, 64),
        (Source.LEARNER, RESCUED, 8),
        (Source.EXPLORER, "unknown_token", 2),
        (Source.LEARNER, "unknown_token", 1),
    ):
        ledger.drop(source, reason, count)
    ledger.reject(Source.LEARNER, "late")
    assert ledger.totals() == {
        "fault/dropped": 3, "fault/dropped/unknown_token": 3, "fault/rejected": 1, "fault/rejected/late": 1,
        "fault/replaced": 0,
    }  # fmt: skip


def test_conservation_fails_when_a_count_disagrees_with_the_buffer_or_the_pool() -> None:
    buffer = new_buffer()
    buffer.insert(completion(Source.EXPLORER, 1, 0, 0))
    assert counts(buffer, {Source.EXPLORER: 1})["conserved"]
    assert not counts(buffer, {Source.EXPLORER: 2})["conserved"]  # one was produced that nobody has
    buffer.ledger.insert(Source.EXPLORER)  # counted, but never put in
    assert not counts(buffer, {Source.EXPLORER: 2})["conserved"]


def test_restart_counts_what_was_in_flight() -> None:
    buffer = new_buffer()
    saved = {
        "produced": 5,
        "reused": 0,
        "inserted": 0,
        "rejected": {"late": 1},
        "in_flight": 4,
        "trained": 0,
        "dropped": {},
        "replaced": 0,
    }
    buffer.ledger.restore({source.value: saved for source in Source})
    report = counts(buffer, {})
    assert report["explorer"]["rejected"] == {"in_flight_at_restart": 4, "late": 1}
    assert report["conserved"]


def test_room_is_what_the_bound_leaves() -> None:
    buffer = new_buffer(max_bytes=100)
    assert buffer.has_room(100)
    assert not buffer.has_room(101)
    buffer.insert(completion(Source.EXPLORER, 1, 0, 0, length=10))  # 80 bytes
    assert buffer.has_room(20)
    assert not buffer.has_room(21)


def test_fail_wakes_a_waiter_with_the_error() -> None:
    buffer = new_buffer()
    threading.Timer(0.05, buffer.fail, [RuntimeError("explorer e0 is dead")]).start()
    with pytest.raises(RuntimeError, match="explorer e0 is dead"):
        buffer.wait(lambda: False, timeout_s=30)


class BufferMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, rewards, training and restarts conserves every completion."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = new_buffer()
        self.trained: list[CompletionKey] = []
        self.produced = dict.fromkeys(Source, 0)  # since the last start
        self.step, self.part_taken = 1, False

    @rule(
        source=st.sampled_from(list(Source)), ahead=st.integers(-1, 2), slot=st.integers(0, 2), sample=st.integers(0, 2)
    )
    def arrive(self, source: Source, ahead: int, slot: int, sample: int) -> None:
        self.produced[source] += 1
        self.buffer.insert(completion(source, max(self.step + ahead, 0), slot, sample))

    @rule(slot=st.integers(0, 2), sample=st.integers(0, 2), good=st.booleans())
    def reward(self, slot: int, sample: int, good: bool) -> None:
        key = CompletionKey(source=Source.LEARNER, step=self.step, slot=slot, sample=sample)
        if good:
            self.buffer.score(key, 1.0, "")
        else:
            self.buffer.fail_reward(key, "reward_raised")

    @rule(slot=st.integers(0, 2))
    def drop_prompt(self, slot: int) -> None:
        self.buffer.drop_prompt(self.step, slot)

    @rule()
    def train(self) -> None:
        keys = list(self.buffer.scored(self.step))
        self.buffer.take(self.step, keys)
        self.trained += keys
        self.step += 1
        self.part_taken = False

    @rule(slot=st.integers(0, 2))
    def train_a_part(self, slot: int) -> None:
        keys = [key for key in self.buffer.scored(self.step) if key.slot == slot]
        self.buffer.take(self.step, keys, last=False)
        self.trained += keys
        self.part_taken = True

    @precondition(lambda self: not self.part_taken)  # checkpoints are made between steps
    @rule()
    def restart_from_a_checkpoint(self) -> None:
        saved = counts(self.buffer, self.produced)
        self.produced = dict.fromkeys(Source, 0)
        state = self.buffer.state()
        self.buffer = new_buffer()
        self.buffer.ledger.restore(saved)
        self.buffer.restore(state, self.step - 1)

    @invariant()
    def conserved(self) -> None:
        assert counts(self.buffer, self.produced)["conserved"]

    @invariant()
    def counts_of_slots_are_those_of_the_rows(self) -> None:
        for slot in range(3):
            scored = sum(key.slot == slot for key in self.buffer.scored(self.step))
            assert self.buffer.missing(self.step, [slot], 6) == 6 - scored

    @invariant()
    def at_most_once(self) -> None:
        assert len(self.trained) == len(set(self.trained))

    @invariant()
    def bytes_are_those_of_the_residents(self) -> None:
        assert self.buffer.num_bytes == sum(row.num_bytes for row in self.buffer.state().completions)


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
