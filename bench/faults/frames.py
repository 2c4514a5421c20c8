"""Rows about frames: lost, doubled, late, damaged, malicious, of another version, of another run."""

import random
import time
from collections.abc import Sequence
from typing import Any

import zmq

from bench.faults.corpus import corpus, framed, honest_frame, of_version
from bench.faults.parts import eventually
from bench.faults.proxy import ChaosProxy
from bench.faults.rows import Verdict, row
from bench.faults.stream import PoolOfQuickWorkers, resident_bytes
from rollout.frame import HEADER_BYTES, FrameError, trainer_codec
from rollout.messages import SCHEMA_VERSION, Acknowledge, Grant, Leave, Refused, Rejoin

FUZZED = 100_000


def _through_proxy(name: str, seed: int, fates: Sequence[str], chance: float = 0.25) -> tuple[Verdict, dict[str, int]]:
    with PoolOfQuickWorkers(name) as stream:
        proxy = ChaosProxy(stream.pool.endpoint, seed=seed, chance=chance, fates=fates)
        stream.pool.endpoint = proxy.endpoint  # workers that are spawned from now on
        try:
            stream.spawn(2, QUICK_PACE_S="0.001")
            stream.submit(12)
            counts = stream.settle()
            account, bad = stream.account(), stream.pool.counters()["bad_frames"]
            stream.pool.close("the row is over")
        finally:
            proxy.close()
    hit = {fate: proxy.counts[fate] for fate in fates}
    assert min(hit.values()) >= 3, f"the proxy did too little: {proxy.counts}"
    assert set(account["rejected"]) <= {"duplicate"}, account
    frames = proxy.counts.total()
    text = (
        f"{', '.join(f'{count} of {frames} frames {fate}' for fate, count in hit.items())}; {account['resent']} resent"
    )
    if bad:
        text += f"; refused: {bad}"
    return Verdict("tolerated", text, None, **counts), bad


@row("F9", "frames doubled by a proxy, p = 0.25", quick=True)
def doubled(seed: int) -> Verdict:
    return _through_proxy("doubled", seed, ["double"])[0]


@row("F10", "frames delayed and reordered by a proxy, p = 0.25", quick=True)
def reordered(seed: int) -> Verdict:
    return _through_proxy("reordered", seed, ["late"])[0]


@row("F11", "frames lost in a proxy, p = 0.25", quick=True)
def lost(seed: int) -> Verdict:
    return _through_proxy("lost", seed, ["drop"])[0]


@row("F12", "frames bit-flipped or truncated by a proxy, p = 0.25", quick=True)
def damaged(seed: int) -> Verdict:
    verdict, bad = _through_proxy("damaged", seed, ["flip", "cut"])
    assert bad.get("damaged"), bad
    return verdict


@row(
    "F13", "malicious frames over the socket: pickle, deep nesting, bad UTF-8, length bombs, unequal arrays", quick=True
)
def malicious(seed: int) -> Verdict:
    with PoolOfQuickWorkers("malicious") as stream:
        stream.spawn(1)
        before = resident_bytes()
        hostile: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        hostile.connect(stream.pool.endpoint)
        start = time.monotonic()
        for body in corpus().values():
            hostile.send(framed(body))
            hostile.send(body)
        wanted = 2 * len(corpus())
        eventually(lambda: sum(stream.pool.counters()["bad_frames"].values()) == wanted, "all are counted")
        seconds = time.monotonic() - start
        hostile.close(linger=0)
        stream.submit(4)
        counts = stream.settle()
        refused = stream.pool.counters()["bad_frames"]
        grown = resident_bytes() - before
    assert grown < 16 << 20, f"memory grew by {grown / 1e6:.1f} MB"
    return Verdict("refused", f"{refused}; the honest worker went on", seconds, **counts)


@row("F13b", "100,000 fuzzed frames", quick=True)
def fuzzed(seed: int) -> Verdict:
    chance, codec, whole = random.Random(seed), trainer_codec(1 << 20), honest_frame()
    bodies = [*corpus().values(), whole[HEADER_BYTES:]]
    bodies.remove(corpus()["deep nesting"])
    reasons: dict[str, int] = {}
    before = resident_bytes()
    for number in range(FUZZED):
        body = bytearray(bodies[number % len(bodies)])
        for _ in range(chance.randint(0, 3)):
            if body:
                body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            codec.decode(framed(bytes(body)) if number % 4 else bytes(body))
            reason = "well-formed"
        except FrameError as problem:
            reason = problem.reason
        reasons[reason] = reasons.get(reason, 0) + 1
    grown = resident_bytes() - before
    assert grown < 8 << 20, f"memory grew by {grown / 1e6:.1f} MB"
    assert sum(reasons.values()) == FUZZED
    return Verdict("refused", f"{dict(sorted(reasons.items()))}; memory {grown / 1e6:+.1f} MB")


@row("F13c", "token ids beyond the vocabulary, NaN and positive log-probs", quick=True)
def poisoned(seed: int) -> Verdict:
    from core.schema import pack_logprobs, pack_tokens

    poisons: dict[str, dict[str, Any]] = {
        "phantom id": {"token_bytes": pack_tokens([100, 7, 7])},
        "negative id": {"token_bytes": pack_tokens([-1, 7, 7])},
        "NaN": {"logprob_bytes": pack_logprobs([float("nan"), -1.0, -1.0])},
        "-inf": {"logprob_bytes": pack_logprobs([float("-inf"), -1.0, -1.0])},
        "positive": {"logprob_bytes": pack_logprobs([0.5, -1.0, -1.0])},
        "lengths differ": {"logprob_bytes": pack_logprobs([-1.0])},
        "too long": {"token_bytes": pack_tokens([7] * 25), "logprob_bytes": pack_logprobs([-1.0] * 25)},
        "another prompt": {"prompt_uid": "p9"},
        "another version": {"version": 3},
        "another's name": {"worker": "w.9"},
    }
    with PoolOfQuickWorkers("poisoned") as stream:
        worker = stream.scripted()
        worker.enter(stream.model)
        stream.submit(1)
        worker.hear(Grant)
        start, sent = time.monotonic(), 0
        for changes in poisons.values():
            try:
                worker.say(worker.deliver(sent + 1, stream.leases[0], 0, 0, **changes))
                sent += 1
            except ValueError:  # cannot even be made: the type refuses it
                continue
        if sent:
            worker.hear(Acknowledge)
        eventually(lambda: sum(stream.account()["rejected"].values()) == sent, "all are refused")
        seconds = time.monotonic() - start
        assert not stream.sink.completions
        worker.say(Leave(reason="enough"))
        stream.spawn(1)
        counts = stream.settle()
        rejected = stream.account()["rejected"]
    return Verdict(
        "refused", f"{len(poisons)} kinds: {rejected}, {len(poisons) - sent} cannot be made", seconds, **counts
    )


@row("F14", "frame above the limit", quick=True)
def oversize(seed: int) -> Verdict:
    with PoolOfQuickWorkers("oversize") as stream:
        stream.spawn(1)
        worker = stream.scripted()
        worker.join()
        worker.link.limit(1 << 20)
        try:
            worker.link.send([Leave(reason="x" * (2 << 20))])
            said = "nothing"
        except ValueError as problem:
            said = str(problem)
        assert "stream.max_frame_mb" in said, said
        hostile: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        hostile.connect(stream.pool.endpoint)
        start = time.monotonic()
        hostile.send(b"x" * (4 << 20))
        eventually(lambda: stream.pool.counters()["sockets"].get("disconnected"), "its connection is closed")
        seconds = time.monotonic() - start
        hostile.close(linger=0)
        stream.submit(4)
        counts = stream.settle()
    return Verdict(
        "refused",
        "the sender names stream.max_frame_mb; the receiver cuts the connection and counts it",
        seconds,
        **counts,
    )


@row("F15", "another schema version", quick=True)
def version(seed: int) -> Verdict:
    with PoolOfQuickWorkers("version") as stream:
        stream.spawn(1)
        worker = stream.scripted()
        worker.join()
        start = time.monotonic()
        for other in (SCHEMA_VERSION - 1, SCHEMA_VERSION + 1):
            worker.link._socket.send(of_version(other))
            reason = worker.hear(Refused).reason
            assert f"peer speaks version {other}, this side {SCHEMA_VERSION}" in reason, reason
        seconds = time.monotonic() - start
        stream.submit(4)
        counts = stream.settle()
    return Verdict("refused", reason[reason.index("peer") :], seconds, **counts)


@row("F28", "frames of an earlier start of the run, and of another run, replayed", quick=True)
def replayed(seed: int) -> Verdict:
    with (
        PoolOfQuickWorkers("earlier", incarnation=1, run_id="run") as earlier,
        PoolOfQuickWorkers("another", incarnation=2, run_id="another") as another,
        PoolOfQuickWorkers("later", incarnation=2, run_id="run") as stream,
    ):
        worker = stream.scripted("ghost.1")
        worker.enter(stream.model)
        stream.submit(1)
        worker.hear(Grant)
        ours, start = worker.link.session, time.monotonic()
        for other in (earlier, another):
            ghost = other.scripted("ghost.1")
            ghost.enter(other.model)
            worker.link.session = ghost.link.session
            worker.say(*(worker.deliver(n + 1, stream.leases[0], n // 4, n % 4) for n in range(16)))
            worker.hear(Rejoin)
        seconds = (time.monotonic() - start) / 2
        assert not stream.sink.completions, "a replayed completion was believed"
        assert stream.pool.counters()["bad_frames"] == {"other_session": 2}
        worker.link.session = ours
        worker.say(Leave(reason="enough"))
        stream.spawn(1)
        counts = stream.settle()
    return Verdict("refused", "2 × 16 valid completions under another session tag: none believed", seconds, **counts)
