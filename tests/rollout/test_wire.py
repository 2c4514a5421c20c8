"""Frames, sockets and addresses: whatever arrives, the trainer's end lives, counts it and serves the next peer."""

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.faults.parts import eventually, make_completion, make_lease
from rollout.access import Keys, why_silent
from rollout.endpoints import MAX_IPC_PATH_BYTES, PrivateIpc, check_endpoint, reachable, resolve
from rollout.frame import HEADER_BYTES, FrameError, session_of, trainer_codec, worker_codec
from rollout.messages import SCHEMA_VERSION, Acknowledge, Deliver, Heartbeat, Leave, Stop
from rollout.wire import Hub, Link, Received, new_keypair

LIMIT = 1 << 16
LEAVE = Leave(reason="test")
CODEC = trainer_codec(LIMIT)


def deliver(seq: int = 1, **changes: object) -> Deliver:
    lease = make_lease()
    completion = make_completion(lease, 0, 0, **changes)
    return Deliver(seq=seq, lease_id=lease.lease_id, purpose="train", completion=completion)


def frame_of(payload: bytes, *, version: int = SCHEMA_VERSION, session: int = 0) -> bytes:
    """A frame with right header and checksum around any payload."""
    head = struct.pack("<4sHHQI", b"S2LP", version, 0, session, len(payload))
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


HubMaker = Callable[..., Hub]


@pytest.fixture
def make_hub(tmp_path: Path) -> Iterator[HubMaker]:
    hubs: list[Hub] = []

    def make(endpoint: str = "tcp://127.0.0.1:0", **settings: Any) -> Hub:
        defaults = {"session": 7, "max_frame_bytes": LIMIT, "heartbeat_s": 0.1, "liveness_s": 10.0}
        hubs.append(Hub(endpoint, **(defaults | settings)))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


RawSocket = Callable[[int], zmq.Socket]


@pytest.fixture
def raw_socket() -> Iterator[RawSocket]:
    """Makes sockets without any of our options, which are closed at the end."""
    context, sockets = zmq.Context(), []

    def make(kind: int) -> zmq.Socket:
        sockets.append(context.socket(kind))
        return sockets[-1]

    yield make
    for made in sockets:
        made.close(linger=0)
    context.term()


def raw_peer(raw_socket: RawSocket, endpoint: str, name: bytes = b"raw") -> zmq.Socket:
    peer = raw_socket(zmq.DEALER)
    peer.setsockopt(zmq.ROUTING_ID, name)
    peer.connect(endpoint)
    return peer


def receive(hub: Hub, count: int) -> list[Received]:
    received: list[Received] = []

    def enough() -> bool:
        received.extend(hub.poll(0.05))
        return len(received) >= count

    eventually(enough, f"{len(received)} of {count} frames")
    return received


def send_when_connected(link: Link, *messages: object) -> None:
    eventually(lambda: link.send(messages), "not connected")


def test_messages_cross_both_ways_in_order(make_hub: HubMaker) -> None:
    hub = make_hub()
    link = Link(hub.endpoint, name="w.1")
    link.session = 7
    send_when_connected(link, LEAVE, deliver(1), deliver(2))
    (received,) = receive(hub, 1)
    assert received == Received(b"w.1", 7, [LEAVE, deliver(1), deliver(2)])
    assert hub.send(b"w.1", [Acknowledge(seqs=(1, 2), beat=0), Stop(reason="enough")])
    heard: list[object] = []
    eventually(lambda: heard.extend(link.poll(0.05)) or len(heard) == 2)
    assert heard == [Acknowledge(seqs=(1, 2), beat=0), Stop(reason="enough")]
    link.close()


def test_a_message_to_an_unknown_peer_is_reported_and_counted(make_hub: HubMaker) -> None:
    hub = make_hub()
    assert not hub.send(b"nobody", [Stop(reason="x")])
    assert hub.counts["unsent"] == 1


def test_wake_ends_a_poll_from_another_thread(make_hub: HubMaker) -> None:
    hub = make_hub()
    timer = threading.Timer(0.05, hub.wake)
    timer.start()
    assert hub.poll(50.0) == []
    timer.join()


def test_a_sender_refuses_an_oversize_frame_and_names_the_key(make_hub: HubMaker) -> None:
    hub = make_hub()
    with pytest.raises(ValueError, match=r"stream\.max_frame_mb"):
        hub.send(b"w", [Stop(reason="x" * LIMIT)])
    link = Link(hub.endpoint, name="w.1", max_frame_bytes=LIMIT)
    with pytest.raises(ValueError, match="exceeds the limit"):
        link.send([deliver(tokens=LIMIT // 4)])
    link.close()


def test_an_oversize_frame_costs_its_sender_the_connection_and_is_counted(
    make_hub: HubMaker, raw_socket: RawSocket
) -> None:
    hub = make_hub()
    peer = raw_peer(raw_socket, hub.endpoint)
    peer.send(frame_of(bytes(LIMIT + 1)))
    eventually(lambda: hub.poll(0.05) == [] and hub.counts["disconnected"] >= 1)
    received: list[Received] = []

    def heard() -> bool:
        peer.send(frame_of(msgspec.msgpack.encode([LEAVE])))  # lost where the peer has not noticed yet
        received.extend(hub.poll(0.05))
        return bool(received)

    eventually(heard, "it reconnects")
    assert received[0].messages == [LEAVE]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


MALICIOUS = {
    "pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "deep nesting": nested(50_000),
    "array bomb": b"\xdd\xff\xff\xff\xff",
    "binary bomb": b"\x91\x82\xa4type\xa7Deliver\xa8lease_id\xc6\xff\xff\xff\xff",
    "bad UTF-8": b"\x91\x82\xa4type\xa5Leave\xa6reason\xa2\xff\xfe",
    "unknown tag": msgspec.msgpack.encode([{"type": "Execute", "code": "1"}]),
    "unknown field": msgspec.msgpack.encode([{"type": "Leave", "reason": "x", "more": 1}]),
    "not a list": msgspec.msgpack.encode(LEAVE),
    "too many": msgspec.msgpack.encode([LEAVE] * 5000)[:LIMIT // 2],
    "empty": b"",
    "huge seq": msgspec.msgpack.encode([deliver(2**63)]),
    "zero seq": msgspec.msgpack.encode([deliver(0)]),
    "negative step": msgspec.msgpack.encode([deliver(key={"source": "explorer", "step": -1, "slot": 0, "sample": 0})]),
    "wrong source": msgspec.msgpack.encode([deliver(key={"source": "oracle", "step": 1, "slot": 0, "sample": 0})]),
    "tokens as text": msgspec.msgpack.encode([deliver(token_bytes="abc")]),
    "long name": msgspec.msgpack.encode([{"type": "Leave", "reason": "x" * 5000}]),
    "trailing bytes": msgspec.msgpack.encode([LEAVE]) + b"\x00",
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_payloads_are_refused(name: str) -> None:
    with pytest.raises(FrameError) as caught:
        CODEC.decode(frame_of(MALICIOUS[name]))
    assert caught.value.reason == "malformed"


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    frame = bytes(CODEC.encode([deliver(), LEAVE], 5))
    assert CODEC.decode(frame).messages == [deliver(), LEAVE]
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            CODEC.decode(bytes(damaged))
    for size in range(len(frame)):
        with pytest.raises(FrameError):
            CODEC.decode(frame[:size])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_payloads_decode_or_are_refused(payload: bytes) -> None:
    reason = ""
    try:
        assert isinstance(CODEC.decode(frame_of(payload)).messages, list)
    except FrameError as problem:
        reason = problem.reason
    assert reason in ("", "malformed")


def test_another_schema_version_is_named() -> None:
    with pytest.raises(FrameError, match=f"version {SCHEMA_VERSION + 1}.*upgrade") as caught:
        CODEC.decode(frame_of(b"\x90", version=SCHEMA_VERSION + 1))
    assert caught.value.reason == "schema_version"


def test_a_worker_that_hears_another_version_stops(make_hub: HubMaker, raw_socket: RawSocket) -> None:
    router = raw_socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    link = Link(f"tcp://127.0.0.1:{port}", name="w.1")
    send_when_connected(link, LEAVE)
    peer, _ = router.recv_multipart()
    router.send_multipart([peer, frame_of(b"\x90", version=99)])
    with pytest.raises(FrameError, match="version 99"):
        eventually(lambda: link.poll(0.05))
    link.close()


def test_sessions_of_runs_and_starts_differ() -> None:
    assert len({session_of("a", 1), session_of("a", 2), session_of("b", 1)}) == 3
    assert session_of("a", 1) == session_of("a", 1) < 2**64


def mutate(frame: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or replace bytes; half of the time with a checksum that fits."""
    body = bytearray(frame[HEADER_BYTES:])
    for _ in range(chance.randint(1, 8)):
        where = chance.randrange(len(body))
        match chance.randrange(4):
            case 0:
                body[where] ^= 1 << chance.randrange(8)
            case 1:
                del body[where : where + chance.randint(1, 9)]
            case 2:
                body[where:where] = chance.randbytes(chance.randint(1, 9))
            case _:
                body[where] = chance.choice([0xC1, 0xDD, 0xC6, 0xDF, 0xFF, 0x80, 0x90])
        body = body or bytearray(b"\x00")
    return frame_of(bytes(body)) if chance.random() < 0.5 else frame[:HEADER_BYTES] + bytes(body)


def test_thousands_of_fuzzed_frames_do_not_reach_the_next_peer(make_hub: HubMaker, raw_socket: RawSocket) -> None:
    hub, chance = make_hub(), random.Random(0)
    peer = raw_peer(raw_socket, hub.endpoint)
    beat = Heartbeat(beat=1, progress=0, doing="", produced=0, unacknowledged=0, leases=("a",), version=0)
    whole = bytes(CODEC.encode([deliver(), beat, LEAVE], 7))
    total, heard = 5000, 0
    for start in range(0, total, 50):
        for _ in range(start, start + 50):
            peer.send(mutate(whole, chance) if chance.random() < 0.8 else chance.randbytes(chance.randint(0, 300)))
        heard += sum(frame.problem is not None or isinstance(frame.messages, list) for frame in receive(hub, 50))
    assert heard == total
    peer.send_multipart([b"one", b"too many"])
    peer.send(whole)
    last = receive(hub, 2)
    assert [frame.problem.reason if frame.problem else frame.messages for frame in last] == [
        "not_a_frame",
        [deliver(), beat, LEAVE],
    ]


def test_noise_on_the_port_does_not_disturb_a_worker(make_hub: HubMaker) -> None:
    import socket

    hub = make_hub()
    port = int(hub.endpoint.rpartition(":")[2])
    for noise in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", random.Random(1).randbytes(500), b"\xff" + bytes(8) + b"\x7f"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(noise)
    link = Link(hub.endpoint, name="w.1")
    send_when_connected(link, LEAVE)
    received: list[Received] = []
    eventually(lambda: received.extend(hub.poll(0.05)) or any(frame.peer == b"w.1" for frame in received))
    # Noise may pass for ZMTP 1.0, the unversioned ancestor; then it is refused as a frame.
    assert all(frame.problem or frame.messages == [LEAVE] for frame in received)
    link.close()


def test_a_peer_that_comes_back_under_its_name_is_heard(make_hub: HubMaker) -> None:
    hub = make_hub()
    first, second = Link(hub.endpoint, name="w.1"), None
    send_when_connected(first, LEAVE)
    receive(hub, 1)
    second = Link(hub.endpoint, name="w.1")  # while the first connection still stands
    send_when_connected(second, deliver())
    assert receive(hub, 1)[0].messages == [deliver()]
    first.close()
    second.close()


def keypairs() -> tuple[Keys, Keys, Keys]:
    (trainer, trainer_secret), (worker, worker_secret), (stranger, stranger_secret) = (new_keypair() for _ in range(3))
    return (
        Keys(public=trainer, secret=trainer_secret, trainer=trainer, allowed=frozenset([worker])),
        Keys(public=worker, secret=worker_secret, trainer=trainer),
        Keys(public=stranger, secret=stranger_secret, trainer=trainer),
    )


def test_curve_lets_in_known_keys_only(make_hub: HubMaker) -> None:
    trainer, worker, stranger = keypairs()
    hub = make_hub(keys=trainer)
    unknown = Link(hub.endpoint, name="unknown", keys=stranger)
    plaintext = Link(hub.endpoint, name="plaintext")
    eventually(lambda: hub.poll(0.05) == [] and hub.counts["key_refused"] and hub.counts["handshake_failed"])
    known = Link(hub.endpoint, name="known", keys=worker)
    send_when_connected(known, LEAVE)
    received = receive(hub, 1)
    assert [frame.peer for frame in received] == [b"known"]
    for link in (unknown, plaintext):
        assert not link.send([LEAVE])
        link.close()
    for _ in range(10):
        assert hub.poll(0.02) == []
    assert known.poll(0) == []
    assert known.refusal == ""
    assert not known.counts
    known.close()


@pytest.mark.parametrize(
    ("trainer_has", "worker_has", "worker_hears", "trainer_says"),
    [
        ("keys", "none", "lets nobody in without keys, and this worker gave none: --keys DIR", "a worker without keys"),
        (
            "keys",
            "unlisted",
            "does not list this worker's key: put its .pub file into the trainer's",
            "with a key that",
        ),
        ("none", "listed", "has no keys: leave out --keys", "a worker with keys (this run has none"),
    ],
)
def test_both_ends_name_keys_that_do_not_fit(
    make_hub: HubMaker, trainer_has: str, worker_has: str, worker_hears: str, trainer_says: str
) -> None:
    trainer, worker, stranger = keypairs()
    said: list[str] = []
    hub = make_hub(keys=trainer if trainer_has == "keys" else None, on_event=said.append)
    link = Link(hub.endpoint, name="w.1", keys={"listed": worker, "unlisted": stranger, "none": None}[worker_has])
    eventually(lambda: hub.poll(0.02) == link.poll(0.02) == [] and link.refusal and said)
    assert link.refusal.startswith(f"the trainer at {hub.endpoint} ")
    assert worker_hears in link.refusal
    assert said[0].startswith("1 connection was refused in its handshake: ")
    assert trainer_says in said[0]
    for keys in (trainer, worker, stranger):
        for secret in (keys.public, keys.secret):
            assert secret.decode() not in link.refusal + said[0]
    link.close()


def test_a_worker_with_the_wrong_trainer_key_is_not_connected(make_hub: HubMaker) -> None:
    trainer, worker, stranger = keypairs()
    said: list[str] = []
    hub = make_hub(keys=trainer, on_event=said.append)
    fooled = Link(hub.endpoint, name="fooled", keys=worker._replace(trainer=stranger.public))

    def refused(times: int) -> bool:
        return hub.poll(0.02) == fooled.poll(0.02) == [] and hub.counts["handshake_failed"] >= times

    eventually(lambda: refused(12))  # it goes on trying: another trainer may come
    assert [line.partition(":")[0] for line in said] == [
        "1 connection was refused in its handshake", "10 connections were refused so far",
    ]  # fmt: skip
    assert not fooled.send([LEAVE])
    assert fooled.refusal == ""
    why = why_silent(fooled.endpoint, fooled.counts, has_keys=fooled.has_keys)
    assert f" at {hub.endpoint}: {fooled.counts['handshake_failed']} handshakes failed there, likely over keys" in why
    assert "trainer.pub is of another trainer" in why
    fooled.close()


def test_a_port_in_use_is_named_with_its_key_and_a_remedy(make_hub: HubMaker) -> None:
    hub = make_hub()
    with pytest.raises(ValueError, match=r"stream\.endpoint = .*in use by another process: choose another port"):
        make_hub(hub.endpoint)


def test_an_ipc_path_in_use_is_not_taken_over(make_hub: HubMaker, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/hub"
    hub = make_hub(endpoint)
    with pytest.raises(ValueError, match="in use by another process"):
        make_hub(endpoint)
    link = Link(endpoint, name="w.1")
    send_when_connected(link, LEAVE)
    assert receive(hub, 1)[0].messages == [LEAVE]
    link.close()


def test_a_stale_socket_is_replaced_but_no_file_is(make_hub: HubMaker, tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    assert make_hub(f"ipc://{tmp_path}/stale").endpoint == f"ipc://{tmp_path}/stale"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file, not a socket"):
        make_hub(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("tcp://0.0.0.0:5555", "needs keys"),
        ("tcp://*:5555", "needs keys"),
        ("tcp://192.168.1.7:5555", "needs keys"),
        ("tcp://trainer.example:5555", "needs keys"),
        ("tcp://[::]:5555", "needs keys"),
        ("tcp://127.0.0.1:http", "port must be a number"),
        ("tcp://127.0.0.1:70000", "port must be a number"),
        ("pgm://eth0;1.2.3.4:5", "an endpoint is"),
        ("5555", "an endpoint is"),
        ("ipc://@abstract", "no permissions"),
        ("ipc://", "name a file"),
        ("ipc:///" + "x" * MAX_IPC_PATH_BYTES, f"{MAX_IPC_PATH_BYTES + 1} bytes of path"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        check_endpoint(endpoint, has_keys=False)


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:0", "tcp://localhost:5", "tcp://[::1]:5", "ipc:///" + "x" * (MAX_IPC_PATH_BYTES - 1)]
)
def test_endpoints_that_are_free(endpoint: str) -> None:
    check_endpoint(endpoint, has_keys=False)
    check_endpoint("tcp://0.0.0.0:5555", has_keys=True)
    assert reachable(endpoint) == endpoint


def test_a_routable_hub_needs_keys_and_says_where_to_find_it(make_hub: HubMaker) -> None:
    with pytest.raises(ValueError, match=r"rollout\.keys"):
        make_hub("tcp://0.0.0.0:0")
    assert "0.0.0.0" not in make_hub("tcp://0.0.0.0:0", keys=keypairs()[0]).endpoint


def test_the_automatic_endpoint_is_private_and_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    ipc = PrivateIpc()
    try:
        assert len(ipc.endpoint.removeprefix("ipc://")) <= MAX_IPC_PATH_BYTES
        assert ipc.directory.stat().st_mode & 0o777 == 0o700
    finally:
        ipc.close()
    assert not ipc.directory.exists()
    assert list(long.iterdir()) == []


def test_what_killed_trainers_left_is_swept_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directories = {name: tmp_path / f"s2lpo-{name}" for name in ("dead", "alive", "young", "empty")}
    sockets = {}
    for name, directory in directories.items():
        directory.mkdir(mode=0o700)
        if name != "empty":
            sockets[name] = socket.socket(socket.AF_UNIX)
            sockets[name].bind(str(directory / "hub"))
        if name != "young":
            os.utime(directory, (1000, 1000))
    sockets["alive"].listen()
    for name in ("dead", "young"):
        sockets[name].close()
    fresh = PrivateIpc()
    assert {path for path in tmp_path.iterdir()} == {*directories.values(), fresh.directory} - {directories["dead"]}
    sockets["alive"].close()
    fresh.close()


def test_a_living_hub_is_left_in_peace_and_a_killed_one_s_directory_swept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody connects to find out that it lives: the hub would count and report a stranger."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = PrivateIpc()
    hub = Hub(living.endpoint, session=7, max_frame_bytes=LIMIT, heartbeat_s=0.1, liveness_s=10.0)
    script = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n" + KILLED
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = Path(killed.stdout.strip())
    assert (left / "hub").is_socket()
    for directory in (living.directory, left):
        os.utime(directory, (1000, 1000))
    fresh = PrivateIpc()
    assert set(tmp_path.iterdir()) == {living.directory, fresh.directory}
    hub.poll(0.2)
    assert not hub.counts
    fresh.close()
    hub.close()
    living.close()
    assert not any(tmp_path.iterdir())


KILLED = """
import os, signal, socket
from rollout.endpoints import PrivateIpc
ipc = PrivateIpc()
socket.socket(socket.AF_UNIX).bind(ipc.endpoint.removeprefix("ipc://"))
print(ipc.directory, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_connect_takes_an_endpoint_or_a_run_directory(tmp_path: Path) -> None:
    assert resolve("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"
    with pytest.raises(ValueError, match="directory of a running run"):
        resolve(str(tmp_path))
    (tmp_path / "endpoint").write_text("ipc:///tmp/x/hub\n")
    assert resolve(str(tmp_path)) == "ipc:///tmp/x/hub"


def test_deep_nesting_does_not_depend_on_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    for depth in (10, limit - 5, limit + 5, 10 * limit):
        with pytest.raises(FrameError):
            worker_codec(1 << 20).decode(frame_of(nested(depth)))
