"""A late lease is given to a second worker; the first answer wins, the second is counted."""

from collections.abc import Callable
from pathlib import Path

from bench.faults.parts import ScriptedWorker, Sink, eventually, make_completion, make_lease
from core.schema import Source
from rollout.leases import LeaseBook
from rollout.messages import Grant, Join, Lease
from rollout.peers import Peer, Peers, SeqWindow, State
from rollout.pool import WorkerPool
from rollout.stragglers import Stragglers


def peers_of(book: LeaseBook, *names: str, role: Source = Source.EXPLORER) -> Peers:
    peers = Peers(16)
    for name in names:
        join = Join(worker=name, role=role, pid=1, host="h")
        peers.enter(Peer(join, name.encode(), SeqWindow(8), 0.0, 0.0, 0.0, state=State.READY))
        book.admit(name, role)
    return peers


def finish(book: LeaseBook, lease: Lease) -> None:
    for item in lease.items:
        for sample in item.samples:
            book.receive(lease.lease_id, make_completion(lease, item.slot, sample))


def given(stragglers: Stragglers, peers: Peers, now: float) -> list[tuple[str, str]]:
    return [(peer.name, lease.lease_id) for peer, lease in stragglers.second(peers, now)]


def test_a_late_lease_goes_to_an_idle_worker_once() -> None:
    book = LeaseBook(credit=64)
    peers, stragglers = peers_of(book, "a", "b"), Stragglers(book)
    leases = [make_lease(number, samples=1) for number in range(5)]
    for lease in leases[:3]:  # 2 seconds each
        book.submit(lease)
        (granted,) = book.grant("a")
        stragglers.granted(granted, 0.0)
        finish(book, granted)
    assert given(stragglers, peers, 2.0) == []
    book.submit(leases[3])
    stragglers.granted(book.grant("a")[0], 10.0)
    assert given(stragglers, peers, 15.9) == []
    assert given(stragglers, peers, 16.1) == [("b", leases[3].lease_id)]
    assert given(stragglers, peers, 30.0) == []  # once
    assert stragglers.seconded == 1
    finish(book, leases[3])
    assert given(stragglers, peers, 31.0) == []
    book.submit(leases[4])
    stragglers.granted(book.grant("a")[0], 40.0)
    assert given(stragglers, peers, 90.0) == [("b", leases[4].lease_id)]  # who helped before may help again


def test_only_idle_workers_of_the_role_with_the_weights_help() -> None:
    book = LeaseBook(credit=64)
    peers, stragglers = peers_of(book, "a", "busy", "old", role=Source.LEARNER), Stragglers(book)
    peers |= peers_of(book, "explorer")
    stragglers._took_s.extend([1.0, 1.0, 1.0])
    for name in ("a", "busy"):
        book.learn(name, 5)
        book.submit(make_lease(len(book._entries), source=Source.LEARNER, step=6, version=5))
        stragglers.granted(book.grant(name)[0], 0.0)
    assert given(stragglers, peers, 100.0) == []
    book.learn("old", 5)
    assert len(given(stragglers, peers, 100.0)) == 1


def test_nothing_is_late_before_it_is_known_how_long_a_lease_takes() -> None:
    book = LeaseBook(credit=64)
    peers, stragglers = peers_of(book, "a", "b"), Stragglers(book)
    book.submit(make_lease())
    stragglers.granted(book.grant("a")[0], 0.0)
    assert given(stragglers, peers, 1e6) == []


def test_a_slow_worker_does_not_hold_the_run(make_pool: Callable[..., WorkerPool], sink: Sink, model: Path) -> None:
    pool = make_pool()
    pool.spawn(Source.EXPLORER, 0)
    for number in range(4):
        pool.submit([make_lease(number)])
        sink.wait(16 * (number + 1), pool.check)
    slow = ScriptedWorker(pool.endpoint, "slow.1")
    slow.enter(model)
    eventually(lambda: pool.counters()["workers"].get("slow.1", {}).get("state") == "ready")
    late = [make_lease(4), make_lease(5)]
    pool.submit(late)  # one for each
    held = slow.hear(Grant).lease

    def beat() -> None:  # it beats and makes progress, so that it is slow and not hung
        slow.say(slow.heartbeat(leases=(held.lease_id,)))
        pool.check()

    sink.wait(96, beat)
    assert pool.counters()["events"]["seconded"] == 1
    assert pool.counters()["workers"]["slow.1"]["state"] == "ready"
    item = held.items[0]
    slow.say(slow.deliver(1, held, item.slot, item.samples[0]))
    eventually(lambda: pool.counters()["duplicates"] == 1, "the second answer is counted")
    assert len(sink.completions) == len(sink.keys) == 96
    slow.close()
