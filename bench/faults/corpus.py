"""Frames that nobody should send: hostile bodies under headers that are right, headers of other versions."""

import struct
import zlib

import msgspec

from bench.faults.parts import ScriptedWorker, make_lease
from core.schema import Source
from rollout.frame import HEADER_BYTES, worker_codec
from rollout.messages import Heartbeat, Leave

_MANY = 0xDF  # msgpack: a map of up to 2^32 - 1 pairs


def honest_frame(session: int = 7) -> bytes:
    """What a worker may send."""
    lease = make_lease()
    worker = ScriptedWorker.__new__(ScriptedWorker)
    worker.name, worker.role = "w.1", Source.EXPLORER
    beat = Heartbeat(beat=1, progress=0, doing="", produced=0, unacknowledged=0, leases=("a",), version=0)
    messages = [worker.deliver(1, lease, 0, 0), beat, Leave(reason="bye")]
    return bytes(worker_codec(1 << 20).encode(messages, session))


def corpus() -> dict[str, bytes]:
    """Bodies that a hostile peer may put under a valid header."""
    unequal = msgspec.msgpack.decode(honest_frame()[HEADER_BYTES:])
    unequal[0]["completion"]["logprob_bytes"] = b"\0" * 4
    return {
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
        "deep nesting": b"\x91" * 100_000 + b"\x90",
        "bad UTF-8": b"\x91\x82\xa4type\xa5Leave\xa6reason\xa2\xff\xfe",
        "array length bomb": b"\xdd\xff\xff\xff\xff",
        "bytes length bomb": b"\x91\xc6\xff\xff\xff\xff",
        "map length bomb": bytes([0x91, _MANY]) + b"\xff\xff\xff\xff",
        "unequal arrays": msgspec.msgpack.encode(unequal),
        "unknown type": msgspec.msgpack.encode([{"type": "Exec", "code": "1"}]),
        "extension type": b"\x91\xd4\x01\x00",
        "negative count": msgspec.msgpack.encode([{"type": "Heartbeat", "beat": -1}]),
        "trailing bytes": msgspec.msgpack.encode([]) + b"\x00",
        "nothing": b"",
    }


def framed(body: bytes) -> bytes:
    """A body under a header whose length and checksum are right."""
    frame = bytearray(worker_codec(1 << 24).encode([], 7))[:HEADER_BYTES] + body
    head = struct.Struct("<4sHHQI")
    magic, version, zero, session, _ = head.unpack_from(frame)
    head.pack_into(frame, 0, magic, version, zero, session, len(body))
    struct.pack_into("<I", frame, head.size, zlib.crc32(body, zlib.crc32(frame[: head.size])))
    return bytes(frame)


def of_version(version: int) -> bytes:
    """An empty frame of another schema version."""
    frame = bytearray(framed(b"\x90"))
    struct.pack_into("<H", frame, 4, version)
    crc = zlib.crc32(frame[HEADER_BYTES:], zlib.crc32(frame[: HEADER_BYTES - 4]))
    struct.pack_into("<I", frame, HEADER_BYTES - 4, crc)
    return bytes(frame)
