"""WorkerPool with real sockets: what it believes (scripted workers), and what it survives (real processes)."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from bench.faults import engine as fault_engine
from bench.faults.parts import SAMPLING, ScriptedWorker, Sink, eventually, make_lease, make_model
from bench.faults.proxy import ChaosProxy
from core.config import Config
from core.schema import Source, pack_logprobs, pack_tokens
from core.seeds import completion_seed
from rollout.fingerprint import file_digest, fingerprints
from rollout.messages import Acknowledge, Grant, Hello, Join, Lease, Leave, Load, Refused, Rejoin, Stop, Weights
from rollout.pool import WorkerPool, WorkersLost
from rollout.roster import MAX_PEERS, RoleTerms
from rollout.status import Held
from rollout.wire import Link

PoolMaker = Callable[..., WorkerPool]
ScriptedMaker = Callable[..., ScriptedWorker]


def leases(count: int, **settings: object) -> list[Lease]:
    return [make_lease(number, **settings) for number in range(count)]


def explorer(pool: WorkerPool) -> dict[str, object]:
    return pool.counters()["sources"]["explorer"]


def pid_of(pool: WorkerPool, name: str) -> int:
    found = [worker["pid"] for known, worker in pool.counters()["workers"].items() if known.startswith(name)]
    return found[-1]


def all_idle(pool: WorkerPool) -> bool:
    workers = pool.counters()["workers"].values()
    return all(worker["doing"] == "idle" for worker in workers if worker["state"] == "ready")


def all_exact(sink: Sink, wanted: list[Lease]) -> bool:
    """Every key of the leases once and no other, each with the tokens of its seed."""
    keys = {
        (lease.purpose, lease.source, lease.step, item.slot, sample)
        for lease in wanted
        for item in lease.items
        for sample in item.samples
    }
    got = [(purpose, key.source, key.step, key.slot, key.sample) for purpose, key in sink.keys.elements()]
    assert len(got) == len(keys)
    assert set(got) == keys
    for completion in sink.completions:
        tokens, logprobs = fault_engine.expected(
            completion_seed(0, wanted[0].purpose, completion.key), SAMPLING.max_tokens
        )
        assert (completion.token_bytes, completion.logprob_bytes) == (pack_tokens(tokens), pack_logprobs(logprobs))
    return True


@pytest.fixture
def scripted() -> Iterator[ScriptedMaker]:
    workers: list[ScriptedWorker] = []

    def make(pool: WorkerPool, name: str = "scripted.1", **settings: object) -> ScriptedWorker:
        workers.append(ScriptedWorker(pool.endpoint, name, **settings))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


# What it believes.


def test_accepted_once_resent_ignored_and_both_acknowledged(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    pool, lease = make_pool(), make_lease(slots=1, samples=2)
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([lease])
    assert worker.hear(Grant).lease == lease
    first = worker.deliver(1, lease, 0, 0)
    for _ in range(3):
        worker.say(first)
        assert worker.hear(Acknowledge).seqs == (1,)
    worker.say(worker.deliver(2, lease, 0, 1), worker.deliver(3, lease, 0, 1))  # the same key under a new seq
    assert worker.hear(Acknowledge).seqs == (2, 3)
    worker.say(worker.deliver(4, lease, 0, 0))  # late, of a finished lease
    assert worker.hear(Acknowledge).seqs == (4,)
    counts = explorer(pool)
    assert (counts["produced"], counts["received"], counts["resent"]) == (4, 4, 2)
    assert counts["accepted"] == {"train": 2}
    assert counts["rejected"] == {"duplicate": 2}
    assert pool.counters()["duplicates"] == 2
    assert pool.counters()["balanced"]
    assert len(sink.completions) == 2


@dataclass
class Bad:
    reason: str
    changes: dict[str, object]


NAN = float("nan")
BAD = {
    "no tokens": Bad("invalid", {"token_bytes": b"", "logprob_bytes": b""}),
    "unequal arrays": Bad("invalid", {"logprob_bytes": bytes(8)}),
    "torn array": Bad("invalid", {"token_bytes": bytes(13), "logprob_bytes": bytes(13)}),
    "too long": Bad("invalid", {"tokens": 25}),
    "id beyond the vocabulary": Bad("invalid", {"token_bytes": pack_tokens([1, 2, 100])}),
    "negative id": Bad("invalid", {"token_bytes": pack_tokens([1, 2, -1])}),
    "NaN": Bad("invalid", {"logprob_bytes": pack_logprobs([-1.0, NAN, -1.0])}),
    "minus infinity": Bad("invalid", {"logprob_bytes": pack_logprobs([-1.0, -float("inf"), -1.0])}),
    "positive log-prob": Bad("invalid", {"logprob_bytes": pack_logprobs([-1.0, 0.5, -1.0])}),
    "another prompt": Bad("invalid", {"prompt_uid": "p1"}),
    "another worker": Bad("invalid", {"worker": "somebody"}),
    "weights of the future": Bad("invalid", {"version": 1}),
    "backward time": Bad("invalid", {"finished_s": 0.5}),
    "no time": Bad("invalid", {"started_s": NAN}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_right_is_rejected_for_good_and_asked_for_again(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink, name: str
) -> None:
    pool, lease, bad = make_pool(), make_lease(slots=1, samples=1), BAD[name]
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([lease])
    worker.hear(Grant)
    worker.say(worker.deliver(1, lease, 0, 0, **bad.changes))
    assert worker.hear(Acknowledge).seqs == (1,)
    assert explorer(pool)["rejected"] == {bad.reason: 1}
    assert sink.completions == []
    for _ in range(3):  # done with the lease, it names it no more
        worker.say(worker.heartbeat(produced=1))
    assert worker.hear(Grant).lease == lease
    worker.say(worker.deliver(2, lease, 0, 0))
    sink.wait(1, pool.check)
    assert pool.counters()["balanced"]


def test_foreign_and_unknown_deliveries_are_rejected_by_reason(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    pool, lease = make_pool(), make_lease(slots=1)
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([lease])
    worker.hear(Grant)
    foreign = worker.deliver(1, lease, 0, 0)
    foreign = msgspec.structs.replace(foreign, purpose="eval")
    worker.say(foreign, worker.deliver(2, make_lease(9), 36, 0))
    assert worker.hear(Acknowledge).seqs == (1, 2)
    assert explorer(pool)["rejected"] == {"foreign_key": 1, "unknown_lease": 1}
    assert sink.completions == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": "b"}, "its tokenizer is"),
        ({"content": b"other weights"}, "its model is"),
    ],
)
def test_another_tokenizer_or_model_is_refused_with_both_hashes(
    make_pool: PoolMaker, scripted: ScriptedMaker, tmp_path: Path, model: Path, changes: dict[str, object], message: str
) -> None:
    pool, other = make_pool(), make_model(tmp_path / "other", **changes)
    worker = scripted(pool)
    worker.enter(other)
    reason = worker.hear(Refused).reason
    ours, theirs = fingerprints(model, weights=True), fingerprints(other, weights=True)
    assert message in reason
    assert any(mark in reason for mark in (theirs.tokenizer, theirs.weights))
    assert any(mark in reason for mark in (ours.tokenizer, ours.weights))
    honest = scripted(pool, "honest.1")
    honest.enter(model)
    pool.submit([make_lease()])
    assert honest.hear(Grant).lease == make_lease()


def test_another_vocabulary_size_or_role_is_refused(make_pool: PoolMaker, scripted: ScriptedMaker, model: Path) -> None:
    terms = {Source.EXPLORER: RoleTerms(model, fingerprints(model, weights=True), 100)}
    pool = make_pool(terms=terms)
    worker = scripted(pool)
    worker.enter(model, vocab_size=128)
    assert "vocabulary size is 128, the run's is 100" in worker.hear(Refused).reason
    learner = scripted(pool, "learner.1", role=Source.LEARNER)
    learner.say(Join(worker="learner.1", role=Source.LEARNER, pid=1, host="x"))
    assert "no work for learner" in learner.hear(Refused).reason
    liar = scripted(pool, "liar.1")
    liar.say(Join(worker="another", role=Source.EXPLORER, pid=1, host="x"))
    assert "calls itself another" in liar.hear(Refused).reason


def test_frames_of_another_run_or_an_earlier_start_are_not_believed(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    first = make_pool()
    lease = make_lease()
    worker = scripted(first)
    worker.enter(model)
    first.submit([lease])
    worker.hear(Grant)
    second = make_pool(incarnation=2)
    ghost = scripted(second, worker.name)
    ghost.link.session = worker.link.session
    ghost.say(worker.deliver(1, lease, 0, 0))  # never joined this start
    ghost.hear(Rejoin)
    ghost.enter(model)
    second.submit([lease])
    ghost.hear(Grant)
    ghost.link.session = worker.link.session
    ghost.say(worker.deliver(1, lease, 0, 0))  # a replay, with a lease id that is valid again
    ghost.hear(Rejoin)
    assert sink.completions == []
    assert second.counters()["bad_frames"] == {"unknown_worker": 1, "other_session": 1}


def test_a_worker_whose_books_do_not_balance_is_refused(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path
) -> None:
    pool = make_pool()
    for number, (beat, message) in enumerate(
        [
            ({"produced": 5, "unacknowledged": 2}, "3 acknowledged completions, but only 0 were received"),
            ({"produced": 10**9}, "says it produced 1000000000"),
            ({"loads": (Load(version=1, started_s=math.nan, finished_s=2.0),)}, "says it loaded weights in impossible"),
            ({"loads": (Load(version=1, started_s=2.0, finished_s=1.0),)}, "says it loaded weights in impossible"),
        ]
    ):
        worker = scripted(pool, f"liar.{number}")
        worker.enter(model)
        worker.say(worker.heartbeat(**beat))
        assert message in worker.hear(Refused).reason
    early = scripted(pool, "early.1")
    early.join()
    early.say(early.deliver(1, make_lease(), 0, 0))
    assert "before its turn" in early.hear(Refused).reason


def test_completions_on_their_way_are_in_flight_and_lost_with_their_worker(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    pool, lease = make_pool(), make_lease()
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([lease])
    worker.hear(Grant)
    worker.say(worker.heartbeat(produced=5, unacknowledged=5), worker.deliver(2, lease, 0, 0))
    worker.hear(Acknowledge)
    counts = explorer(pool)
    assert (counts["produced"], counts["in_flight"], counts["lost"]) == (5, 4, 0)
    worker.say(Leave(reason="a coffee break"))
    eventually(lambda: explorer(pool)["lost"] == 4)
    assert explorer(pool)["in_flight"] == 0
    assert pool.counters()["balanced"]
    assert "a coffee break" in pool.waiting_for().line


def test_a_lost_grant_and_lost_weights_are_repeated(make_pool: PoolMaker, scripted: ScriptedMaker, model: Path) -> None:
    pool = make_pool()
    worker = scripted(pool, role=Source.LEARNER)
    worker.enter(model)
    file = model / "model.safetensors"
    pool.publish_weights(3, file, file_digest(file))
    lease = make_lease(source=Source.LEARNER, version=2)
    pool.submit([lease])
    worker.hear(Grant)  # and Weights with it; both forgotten
    for _ in range(4):
        worker.say(worker.heartbeat())
    heard_weights = worker.hear(Weights)
    assert (heard_weights.version, heard_weights.digest) == (3, file_digest(file))
    for _ in range(4):
        worker.say(worker.heartbeat())
    assert worker.hear(Grant).lease == lease


def test_damaged_frames_are_counted_and_only_their_sender_is_refused(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    pool = make_pool()
    noisy = scripted(pool, "noisy.1")
    noisy.enter(model)
    for _ in range(60):
        noisy.link._socket.send(b"\x80\x04pickle")
    noisy.say(noisy.heartbeat())  # a good frame in between: damage happens
    eventually(lambda: pool.counters()["bad_frames"].get("not_a_frame") == 60)

    def refused() -> bool:
        noisy.link._socket.send(b"\x80\x04pickle")
        noisy.heard += noisy.link.poll(0.001)
        return any(isinstance(message, Refused) for message in noisy.heard)

    eventually(refused)
    assert "cannot read" in noisy.hear(Refused).reason
    assert pool.counters()["bad_frames"]["not_a_frame"] >= 160
    honest = scripted(pool, "honest.1")
    honest.enter(model)
    pool.submit([make_lease()])
    honest.say(honest.heartbeat())
    assert honest.hear(Grant).lease == make_lease()


def test_workers_that_come_and_go_do_not_pile_up(make_pool: PoolMaker, scripted: ScriptedMaker, model: Path) -> None:
    pool, worker = make_pool(), None
    peers = pool._roster.peers
    peers.limit = 20
    for number in range(60):
        worker = ScriptedWorker(pool.endpoint, f"w.{number}")
        worker.enter(model)
        worker.hear(Acknowledge)
        worker.say(worker.heartbeat(produced=1, unacknowledged=1), Leave(reason="bye"))
        eventually(lambda: explorer(pool)["lost"] == number + 1)  # noqa: B023
        worker.close()
    assert len(peers) == 20 < MAX_PEERS
    assert explorer(pool)["produced"] == 60
    assert pool.counters()["balanced"]


def test_a_full_buffer_holds_leases_back_until_it_has_room(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path
) -> None:
    room = threading.Event()
    pool = make_pool(may_grant=lambda lease: room.is_set() or lease.step == 1)
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([make_lease(step=2), make_lease(step=1, samples=1, slots=1)])
    assert worker.hear(Grant).lease.step == 1
    assert [work.holder for work in pool._book.work(Source.EXPLORER)] == [worker.name, ""]
    room.set()
    assert worker.hear(Grant).lease.step == 2


def test_submitting_an_oversize_lease_names_the_key(make_pool: PoolMaker) -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match=r"stream\.max_frame_mb"):
        pool.submit([make_lease(slots=400, samples=300)])


def test_an_error_on_the_pools_thread_is_raised_by_check(make_pool: PoolMaker) -> None:
    pool = make_pool()
    pool.submit([make_lease(), make_lease()])
    with pytest.raises(RuntimeError, match="submitted before"):
        eventually(pool.check)


def test_tokenizers_that_differ_and_ports_in_use_are_refused(
    make_pool: PoolMaker, config: Config, tmp_path: Path, model: Path
) -> None:
    other = make_model(tmp_path / "other", vocabulary="b")
    terms = {
        Source.EXPLORER: RoleTerms(other, fingerprints(other, weights=True), 100),
        Source.LEARNER: RoleTerms(model, fingerprints(model, weights=False), 100),
    }
    with pytest.raises(ValueError, match="different tokenizers"):
        make_pool(terms=terms)
    first = make_pool(with_endpoint(config, "tcp://127.0.0.1:0"))
    with pytest.raises(ValueError, match=r"stream\.endpoint"):
        make_pool(with_endpoint(config, first.endpoint))
    with pytest.raises(ValueError, match="needs keys"):
        make_pool(with_endpoint(config, "tcp://0.0.0.0:0"))


def with_endpoint(config: Config, endpoint: str) -> Config:
    return msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, endpoint=endpoint))


def test_quiet_sees_counts_while_nothing_moves(
    make_pool: PoolMaker, scripted: ScriptedMaker, model: Path, sink: Sink
) -> None:
    pool = make_pool()
    worker = scripted(pool)
    worker.enter(model)
    pool.submit([make_lease()])
    worker.hear(Grant)
    worker.say(*(worker.deliver(n + 1, make_lease(), n // 4, n % 4) for n in range(16)))
    for _ in range(50):
        assert pool.quiet(lambda sources: sources["explorer"]["accepted"].get("train", 0) == len(sink.completions))
    sink.wait(16)


# What it survives.


def test_explorers_share_the_work_exactly(make_pool: PoolMaker, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_PACE_S", "0.002")
    pool, wanted = make_pool(), leases(24)
    for index in range(3):
        pool.spawn(Source.EXPLORER, index)
    eventually(lambda: sum(w["state"] == "ready" for w in pool.counters()["workers"].values()) == 3)
    pool.submit(wanted)
    sink.wait(384, pool.check)
    assert all_exact(sink, wanted)
    counts = pool.counters()
    assert all(worker["received"] >= 16 for worker in counts["workers"].values())
    assert counts["balanced"]
    assert explorer(pool) == {
        "produced": 384, "received": 384, "accepted": {"train": 384}, "rejected": {}, "in_flight": 0, "lost": 0,
        "resent": 0,
    }  # fmt: skip
    assert pool.waiting_for().line == "nothing: every lease is answered"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_leases_of_a_killed_or_stopped_explorer_go_to_the_other(
    make_pool: PoolMaker, sink: Sink, monkeypatch: pytest.MonkeyPatch, sign: signal.Signals
) -> None:
    monkeypatch.setenv("QUICK_PACE_S", "0.005")
    pool, wanted = make_pool(), leases(12)
    for index in range(2):
        pool.spawn(Source.EXPLORER, index)
    eventually(lambda: sum(w["state"] == "ready" for w in pool.counters()["workers"].values()) == 2)
    pool.submit(wanted)
    sink.wait(40, pool.check)
    victim = pid_of(pool, "explorer-0")
    os.kill(victim, sign)
    sink.wait(192, pool.check)
    assert all_exact(sink, wanted)
    if sign == signal.SIGSTOP:
        eventually(lambda: pool.counters()["events"].get("dead") == 1)
        os.kill(victim, signal.SIGCONT)
        eventually(lambda: pool.counters()["events"].get("revived"))
    eventually(lambda: explorer(pool)["in_flight"] == 0 and all_idle(pool))
    counts = pool.counters()
    assert counts["balanced"]
    assert counts["events"]["requeued"] + counts["events"]["seconded"] >= 1  # late before it is dead
    assert explorer(pool)["accepted"] == {"train": 192}
    assert set(explorer(pool)["rejected"]) <= {"duplicate"}
    if sign == signal.SIGKILL:
        eventually(lambda: pool.counters()["events"]["restarted"] == 1)


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        ("hang", "hung"),
        ("hang with the interpreter", "dead"),
    ],  # the first beats on; of the second, only libzmq answers
)
def test_an_explorer_that_hangs_loses_its_lease_and_is_named(
    make_pool: PoolMaker, sink: Sink, monkeypatch: pytest.MonkeyPatch, fault: str, event: str
) -> None:
    monkeypatch.setenv("QUICK_FAIL", fault)
    said: list[str] = []
    pool, wanted = make_pool(on_event=said.append), leases(2)
    pool.spawn(Source.EXPLORER, 0)
    pool.submit(wanted)
    eventually(lambda: pool.counters()["events"].get(event))
    assert any(line.startswith("explorer-0.") and f"is {event}; 2 of its leases" in line for line in said)
    monkeypatch.delenv("QUICK_FAIL")
    pool.spawn(Source.EXPLORER, 1)
    sink.wait(32, pool.check)
    assert all_exact(sink, wanted)
    hung = pid_of(pool, "explorer-0")
    pool.close("enough")
    assert not Path(f"/proc/{hung}").exists()


def test_frames_lost_doubled_reordered_and_damaged_change_no_count(
    make_pool: PoolMaker, sink: Sink, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_PACE_S", "0.001")
    pool, wanted = make_pool(), leases(24)
    proxy = ChaosProxy(pool.endpoint, seed=0, chance=0.3)
    pool.endpoint = proxy.endpoint  # workers that are spawned from now on
    try:
        for index in range(2):
            pool.spawn(Source.EXPLORER, index)
        pool.submit(wanted)
        sink.wait(384, pool.check)
        eventually(lambda: explorer(pool)["in_flight"] == 0 and all_idle(pool))
    finally:
        pool.close()
        proxy.close()
    assert all_exact(sink, wanted)
    counts = pool.counters()
    assert counts["balanced"]
    assert explorer(pool)["accepted"] == {"train": 384}
    assert set(explorer(pool)["rejected"]) <= {"duplicate"}
    assert counts["bad_frames"]["damaged"] >= 1
    assert explorer(pool)["resent"] >= 1
    assert min(proxy.counts[fate] for fate in ("drop", "double", "late", "flip")) >= 5


def test_a_worker_that_fails_at_start_up_ends_the_run_with_its_log(
    make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_FAIL", "load")
    pool = make_pool()
    pool.spawn(Source.EXPLORER, 0)
    with pytest.raises(WorkersLost, match=r"explorer-0 .*exited with 1 before it(.|\n)*accelerator is on fire"):
        eventually(pool.check)


def test_workers_that_keep_dying_are_given_up_by_name(make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_FAIL", "crash")
    pool = make_pool(max_restarts=1)
    pool.spawn(Source.EXPLORER, 0)
    pool.submit(leases(1))
    with pytest.raises(WorkersLost, match=r"no explorer worker is left(.|\n)*illegal memory access"):
        eventually(pool.check)
    assert pool.counters()["events"]["restarted"] == 1


@pytest.mark.parametrize("fault", ["nan", "phantom"])
def test_a_poisoned_engine_is_rejected_and_named(
    make_pool: PoolMaker, sink: Sink, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("QUICK_FAIL", fault)
    pool = make_pool()
    pool._book.max_losses = 1
    pool.spawn(Source.EXPLORER, 0)
    pool.submit([make_lease(slots=1, samples=2)])
    with pytest.raises(WorkersLost, match=r"was lost 2 times(.|\n)*invalid: explorer-0"):
        eventually(pool.check)
    assert sink.completions == []
    assert explorer(pool)["rejected"] == {"invalid": 4}
    assert pool.counters()["balanced"]


def test_learner_workers_load_weights_before_leases_that_need_them(
    make_pool: PoolMaker, sink: Sink, model: Path
) -> None:
    pool, file, start_s = make_pool(), model / "model.safetensors", time.monotonic()
    pool.spawn(Source.LEARNER, 0)
    pool.submit([make_lease(0, source=Source.LEARNER), make_lease(1, source=Source.LEARNER, version=1)])
    sink.wait(16, pool.check)
    eventually(lambda: "weights 1 are not published yet" in pool.waiting_for().line, pool.waiting_for().line)
    pool.publish_weights(1, file, file_digest(file))
    sink.wait(32, pool.check)
    pool.spawn(Source.LEARNER, 1)  # a late joiner gets them too
    eventually(lambda: sum(w["state"] == "ready" for w in pool.counters()["workers"].values()) == 2)
    pool.submit([make_lease(n, source=Source.LEARNER, version=1) for n in range(2, 8)])
    sink.wait(128, pool.check)
    assert [completion.version for completion in sink.completions[:16]] == [0] * 16
    assert {completion.version for completion in sink.completions[16:]} == {1}
    loads: list[tuple[str, Load]] = []

    def both_told() -> bool:
        loads.extend(pool.held_weights().loads)
        return len(loads) >= 2

    eventually(both_told, "each worker's load, by its heartbeats")
    time.sleep(3 * pool.config.stream.heartbeat_s)  # which repeat it
    assert pool.held_weights() == Held({"learner-0": 1, "learner-1": 1}, [])
    assert sorted(name.partition(".")[0] for name, _ in loads) == ["learner-0", "learner-1"]
    assert all(load.version == 1 and start_s < load.started_s <= load.finished_s for _, load in loads)


def test_damaged_weights_are_not_loaded(make_pool: PoolMaker, model: Path) -> None:
    pool = make_pool(max_restarts=0)
    pool.spawn(Source.LEARNER, 0)
    pool.publish_weights(1, model / "model.safetensors", "0" * 64)
    pool.submit([make_lease(source=Source.LEARNER, version=1)])
    with pytest.raises(WorkersLost, match=r"weights 1: .* has digest"):
        eventually(pool.check)


def test_closing_leaves_nothing_behind(make_pool: PoolMaker, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_PACE_S", "0.05")
    pool = make_pool()
    for index in range(2):
        pool.spawn(Source.EXPLORER, index)
    pool.submit(leases(20))
    eventually(lambda: explorer(pool)["received"])
    pids = list(pool._children.pids().values())
    socket_file = Path(pool.endpoint.removeprefix("ipc://"))
    assert (Path(config.run.dir) / "endpoint").read_text().strip() == pool.endpoint
    pool.close("enough")
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert not socket_file.parent.exists()
    assert not (Path(config.run.dir) / "endpoint").exists()
    pool.close("again")


def test_a_stopped_trainer_takes_nobody_for_dead(
    make_pool: PoolMaker, sink: Sink, scripted: ScriptedMaker, model: Path
) -> None:
    pause = threading.Event()
    pool = make_pool(may_grant=lambda lease: not pause.is_set() or time.sleep(2.5) or pause.clear() or True)
    worker = scripted(pool)
    worker.enter(model)
    worker.hear(Acknowledge)
    pause.set()  # the pool's thread sleeps for longer than liveness_s
    pool.submit([make_lease()])
    assert worker.hear(Grant).lease == make_lease()
    worker.say(worker.heartbeat())
    worker.hear(Acknowledge)
    assert pool.counters()["events"].get("dead") is None


def test_stop_reaches_workers_started_by_others(make_pool: PoolMaker, scripted: ScriptedMaker, model: Path) -> None:
    pool = make_pool()
    worker = scripted(pool)
    worker.enter(model)
    worker.hear(Acknowledge)
    closing = threading.Thread(target=pool.close, args=("that was it",))
    closing.start()
    assert worker.hear(Stop).reason == "that was it"
    worker.say(Leave(reason="home"))
    closing.join()
    assert not Path(pool.endpoint.removeprefix("ipc://")).exists()


def test_a_routable_endpoint_works_with_keys(make_pool: PoolMaker, config: Config, sink: Sink, tmp_path: Path) -> None:
    from rollout.keys import make_keys

    make_keys(tmp_path / "keys")
    stream = msgspec.structs.replace(config.stream, endpoint="tcp://127.0.0.1:0", keys=str(tmp_path / "keys"))
    pool = make_pool(msgspec.structs.replace(config, stream=stream))
    stranger = Link(pool.endpoint, name="stranger.1")
    pool.spawn(Source.EXPLORER, 0)
    pool.submit(leases(2))
    sink.wait(32, pool.check)
    eventually(lambda: pool.counters()["sockets"].get("handshake_failed"))
    assert not stranger.send([Leave(reason="x")])
    stranger.close()


def test_hello_before_join_is_told_to_join(make_pool: PoolMaker, scripted: ScriptedMaker, model: Path) -> None:
    worker = scripted(make_pool())
    worker.say(Hello(fingerprints=fingerprints(model, weights=True), vocab_size=100))
    assert "does not know" in worker.hear(Rejoin).reason
