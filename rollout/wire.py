"""The sockets: `Hub` (trainer, ROUTER) and `Link` (worker, DEALER) move frames of typed messages. The only zmq import.

What the options are for (each measured, docs/log.md): ROUTER_MANDATORY: a message to a peer that is gone is an error,
not silence. ROUTER_HANDOVER: a peer that reconnects under its name is not ignored. IMMEDIATE: a worker queues nothing
for a trainer that is away. ZMTP heartbeats find peers that stopped; MAXMSGSIZE and the high-water marks bound memory.
"""

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from rollout.access import AllowList, Keys, refused_line, why_refused
from rollout.endpoints import bind_problem, bindable, check_endpoint, reachable, refuse_live_ipc
from rollout.frame import FrameError, trainer_codec, worker_codec
from rollout.messages import FromTrainer, FromWorker
from rollout.wake import Wake

MAX_FRAMES_PER_POLL = 256
_RECEIVE_FRAMES, _SEND_FRAMES = 64, 512
_LAST_WORDS_MS = 500
_MONITORED = {
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake_failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake_failed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "handshake_failed",
}
_HANDSHAKES = sum(event for event, name in _MONITORED.items() if name == "handshake_failed")


class Received(NamedTuple):
    """What one frame of a worker was: messages, or the reason why it was refused."""

    peer: bytes
    session: int
    messages: list[FromWorker]
    problem: FrameError | None = None


def new_keypair() -> tuple[bytes, bytes]:
    """Public and secret CURVE key, Z85."""
    return zmq.curve_keypair()


class Hub:
    """The trainer's end. One thread owns it; only `wake` may be called from another.

    `endpoint`: ipc://PATH or tcp://HOST:PORT (port 0: any). ValueError for an address that is in use, too long, or
    routable without keys. `on_event(line)`: connections were refused, said of the 1st, the 10th, the 100th, …
    """

    def __init__(
        self, endpoint: str, *, session: int, max_frame_bytes: int, heartbeat_s: float, liveness_s: float,
        keys: Keys | None = None, on_event: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        check_endpoint(endpoint, has_keys=keys is not None)
        refuse_live_ipc(endpoint)
        self.session, self.counts, self._has_keys, self._on_event = session, Counter[str](), keys is not None, on_event
        self._codec = trainer_codec(max_frame_bytes)
        self._context = zmq.Context()
        self._authenticator = self._authenticate(keys) if keys is not None else None
        self._socket = self._context.socket(zmq.ROUTER)
        _set_options(self._socket, endpoint, max_frame_bytes, heartbeat_s, liveness_s)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keys is not None:
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
        self._monitor = self._socket.get_monitor_socket(sum(set(_MONITORED)))
        self._wake = Wake()
        try:
            self._socket.bind(bindable(endpoint))
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(bind_problem(endpoint, error.errno or 0, str(error))) from error
        self.endpoint: str = reachable(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake.fd):
            self._poller.register(source, zmq.POLLIN)

    def _authenticate(self, keys: Keys) -> ThreadAuthenticator:
        """Without this thread libzmq would accept any key (encryption is not authentication)."""
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=AllowList(keys.allowed, self.counts))
        return authenticator

    def poll(self, timeout_s: float) -> list[Received]:
        """Wait for frames or `wake`, then take what is there, at most MAX_FRAMES_PER_POLL frames."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        self._wake.clear()
        if self._monitor in ready:
            self._count_events()
        received: list[Received] = []
        while len(received) < MAX_FRAMES_PER_POLL:
            try:
                peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            received.append(self._decode(peer, parts))
        return received

    def _decode(self, peer: bytes, parts: list[bytes]) -> Received:
        try:
            if len(parts) != 1:
                raise FrameError("not_a_frame", f"{len(parts)} parts")
            session, messages = self._codec.decode(parts[0])
        except FrameError as problem:
            return Received(peer, 0, [], problem)
        return Received(peer, session, messages)

    def _count_events(self) -> None:
        while self._monitor.poll(0):
            name = _MONITORED.get(zmq.Event(recv_monitor_message(self._monitor)["event"]))
            if name is not None:
                self.counts[name] += 1
            if name == "handshake_failed" and str(self.counts[name]).rstrip("0") == "1":
                self._on_event(refused_line(self.counts[name], has_keys=self._has_keys))

    def frame_bytes(self, messages: Sequence[FromTrainer]) -> int:
        """Size of a frame of these messages. ValueError where it would be refused. Any thread may ask."""
        return len(trainer_codec(self._codec.max_frame_bytes).encode(messages, self.session))

    def send(self, peer: bytes, messages: Sequence[FromTrainer]) -> bool:
        """Send one frame; False where the peer is not connected or takes nothing, so that nothing was sent."""
        frame = self._codec.encode(messages, self.session)
        try:
            self._socket.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                self.counts["unsent"] += 1
                return False
            raise
        return True

    def wake(self) -> None:
        """End a poll that is under way, or the next one. Any thread."""
        self._wake.set()

    def close(self) -> None:
        """Close sockets and threads; the last messages have half a second to leave."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=_LAST_WORDS_MS)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._wake.close()
        self._context.term()


class Link:
    """A worker's end. One thread owns it; only `wake` may be called from another. `session` goes into every frame.

    `refusal`: why the trainer lets this worker in never, or "": the socket then tries no more.
    """

    def __init__(
        self, endpoint: str, *, name: str, max_frame_bytes: int = 64 << 20, heartbeat_s: float = 1.0,
        liveness_s: float = 10.0, keys: Keys | None = None,
    ) -> None:  # fmt: skip
        check_endpoint(endpoint, has_keys=keys is not None)
        self.session, self.counts, self.refusal = 0, Counter[str](), ""
        self.endpoint, self.has_keys = endpoint, keys is not None
        self._codec = worker_codec(max_frame_bytes)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _set_options(self._socket, endpoint, max_frame_bytes, heartbeat_s, liveness_s)
        self._socket.setsockopt(zmq.ROUTING_ID, name.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if keys is not None:
            self._socket.curve_serverkey = keys.trainer
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret
        self._monitor = self._socket.get_monitor_socket(_HANDSHAKES)
        self._socket.connect(endpoint)
        self._wake = Wake()
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake.fd):
            self._poller.register(source, zmq.POLLIN)

    def limit(self, max_frame_bytes: int) -> None:
        """The trainer's limit, once it is known."""
        self._codec.max_frame_bytes = max_frame_bytes

    def send(self, messages: Sequence[FromWorker]) -> bool:
        """Send one frame; False where the trainer is not connected or takes nothing, so that nothing was sent."""
        frame = self._codec.encode(messages, self.session)
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def poll(self, timeout_s: float) -> list[FromTrainer]:
        """Wait for messages or `wake`, then take what is there. FrameError where the trainer speaks another version."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        self._wake.clear()
        if self._monitor in ready:
            self._note_failures()
        messages: list[FromTrainer] = []
        for _ in range(MAX_FRAMES_PER_POLL):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                messages += self._codec.decode(b"".join(parts)).messages
            except FrameError as problem:
                if problem.reason == "schema_version":
                    raise
                self.counts[problem.reason] += 1
        return messages

    def _note_failures(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            self.counts["handshake_failed"] += 1
            unlisted = event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            if unlisted or event["value"] == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                self.refusal = why_refused(self.endpoint, unlisted=unlisted, has_keys=self.has_keys)

    def wake(self) -> None:
        """End a poll that is under way, or the next one. Any thread."""
        self._wake.set()

    def close(self, linger_s: float = 0.0) -> None:
        """Close; `linger_s` is how long the last frames may take to leave."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(linger_s * 1000))
        self._wake.close()
        self._context.term()


def _set_options(socket: Any, endpoint: str, max_frame_bytes: int, heartbeat_s: float, liveness_s: float) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_FRAMES)
    socket.setsockopt(zmq.SNDHWM, _SEND_FRAMES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(heartbeat_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(liveness_s * 1000)))
    socket.setsockopt(zmq.HEARTBEAT_TTL, max(100, int(liveness_s * 1000)))
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))  # else an IPv4 address would be bound as a mapped IPv6 one
