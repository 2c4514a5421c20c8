"""Stands between workers and the trainer and loses, doubles, reorders and damages frames, by a seed."""

import random
import threading
from collections import Counter
from collections.abc import Sequence

import zmq


class ChaosProxy:
    """Workers connect to `endpoint`; each gets a connection of its own, under its own name, to the trainer.

    A frame meets one of `fates` with `chance`: drop, double, late (out of order), flip (one bit), cut (truncated).
    """

    def __init__(
        self, trainer: str, *, seed: int, chance: float, fates: Sequence[str] = ("drop", "double", "late", "flip")
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._fates = list(fates)
        self._trainer, self._chance, self._random = trainer, chance, random.Random(seed)
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._back: dict[bytes, zmq.Socket] = {}
        self._held: list[tuple[zmq.Socket, list[bytes]]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for socket in (self._front, *self._back.values()):
            socket.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._stop.is_set():
            for socket, _ in poller.poll(20):
                if socket is self._front:
                    name, frame = socket.recv_multipart()
                    if name not in self._back:
                        self._back[name] = self._context.socket(zmq.DEALER)
                        self._back[name].setsockopt(zmq.ROUTING_ID, name)
                        self._back[name].connect(self._trainer)
                        poller.register(self._back[name], zmq.POLLIN)
                    self._pass(self._back[name], [frame])
                else:
                    name = socket.getsockopt(zmq.ROUTING_ID)
                    self._pass(self._front, [name, socket.recv()])
            if self._held and self._random.random() < 0.5:
                socket, parts = self._held.pop(self._random.randrange(len(self._held)))
                socket.send_multipart(parts)

    def _pass(self, socket: zmq.Socket, parts: list[bytes]) -> None:
        fate = self._random.choice(self._fates) if self._random.random() < self._chance else "pass"
        self.counts[fate] += 1
        if fate == "flip":
            damaged = bytearray(parts[-1])
            bit = self._random.randrange(8 * len(damaged))
            damaged[bit // 8] ^= 1 << bit % 8
            parts = [*parts[:-1], bytes(damaged)]
        if fate == "cut":
            parts = [*parts[:-1], parts[-1][: self._random.randrange(len(parts[-1]))]]
        if fate == "late":
            self._held.append((socket, parts))
        elif fate != "drop":
            for _ in range(2 if fate == "double" else 1):
                socket.send_multipart(parts)
