"""A frame: a fixed header with checksum, then a batch of messages as msgpack. No sockets here."""

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Annotated, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from rollout.messages import SCHEMA_VERSION, FromTrainer, FromWorker

MAGIC = b"S2LP"
# magic, schema version, two zero bytes, session, payload bytes; then CRC-32 of all that and of the payload.
_HEAD = struct.Struct("<4sHHQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
MAX_MESSAGES = 4096

M = TypeVar("M")


class FrameError(ValueError):
    """A frame that was refused. `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Frame(NamedTuple, Generic[M]):
    """A decoded frame."""

    session: int
    messages: list[M]


def session_of(run_id: str, incarnation: int) -> int:
    """Unsigned 64-bit tag of one start of one run: frames of another run or of an earlier start are not believed."""
    return int.from_bytes(hashlib.blake2b(f"{run_id}/{incarnation}".encode(), digest_size=8).digest(), "little")


class Codec(Generic[M]):
    """Encodes messages of one direction and decodes those of the other. Not for use by two threads at once."""

    def __init__(self, incoming: type[M], *, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Annotated[list[incoming], Meta(max_length=MAX_MESSAGES)])  # type: ignore[valid-type]

    def encode(self, messages: Sequence[object], session: int) -> bytearray:
        """One frame of all `messages`. Raises ValueError where it would exceed max_frame_bytes."""
        frame = bytearray(HEADER_BYTES)
        self._encoder.encode_into(messages, frame, HEADER_BYTES)
        if len(frame) > self.max_frame_bytes:
            raise ValueError(
                f"a message of {len(frame)} bytes exceeds the limit of {self.max_frame_bytes}: "
                "raise stream.max_frame_mb, or make leases smaller (rollout.lease_prompts)"
            )
        _HEAD.pack_into(frame, 0, MAGIC, SCHEMA_VERSION, 0, session, len(frame) - HEADER_BYTES)
        _CRC.pack_into(frame, _HEAD.size, _checksum(frame))
        return frame

    def decode(self, frame: bytes) -> Frame[M]:
        """The messages of a frame. Raises FrameError for anything but a whole, undamaged, well-typed frame."""
        if len(frame) < HEADER_BYTES or frame[:4] != MAGIC:
            raise FrameError("not_a_frame", f"{len(frame)} bytes that begin with {bytes(frame[:8])!r}")
        if len(frame) > self.max_frame_bytes:
            raise FrameError("oversize", f"{len(frame)} bytes, limit {self.max_frame_bytes}")
        _, version, _, session, size = _HEAD.unpack_from(frame)
        if size != len(frame) - HEADER_BYTES or _CRC.unpack_from(frame, _HEAD.size)[0] != _checksum(frame):
            raise FrameError("damaged", f"length or checksum of {len(frame)} bytes disagree with the header")
        if version != SCHEMA_VERSION:
            raise FrameError(
                "schema_version", f"peer speaks version {version}, this side {SCHEMA_VERSION}: upgrade the older one"
            )
        try:
            return Frame(session, self._decoder.decode(memoryview(frame)[HEADER_BYTES:]))
        except (ValueError, RecursionError) as error:  # bad UTF-8 and deep nesting are not msgspec errors
            raise FrameError("malformed", f"{type(error).__name__}: {error}") from error


def trainer_codec(max_frame_bytes: int) -> Codec[FromWorker]:
    """The trainer's side: decodes what workers say."""
    return Codec(FromWorker, max_frame_bytes=max_frame_bytes)  # type: ignore[arg-type]


def worker_codec(max_frame_bytes: int) -> Codec[FromTrainer]:
    """A worker's side: decodes what the trainer says."""
    return Codec(FromTrainer, max_frame_bytes=max_frame_bytes)  # type: ignore[arg-type]


def _checksum(frame: bytes | bytearray) -> int:
    view = memoryview(frame)
    return zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _HEAD.size]))
