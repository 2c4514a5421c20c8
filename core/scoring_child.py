"""One scoring process as its parent sees it, and what it is handed."""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from core.scoring_worker import Outcome, Started, environment, take_replies

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120.0  # a user's module may import torch
# A child holds several cheap items, so that it does not wait for the parent between two; but what is handed over is
# scored before all that is more urgent and comes later, so no more than it scores in AHEAD_S.
DEPTH, AHEAD_S = 16, 0.2


class Item(NamedTuple):
    urgency: tuple[int, ...]
    number: int  # no two are equal, so that nothing after it is ever compared
    ticket: Any
    frame: bytes


class Child:
    """One scoring process as its parent sees it."""

    def __init__(self, function: str, memory_bytes: int) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        arguments = (function, theirs.fileno(), memory_bytes, os.getpid(), os.getcwd())
        # A session of its own: Ctrl-C is the trainer's to handle, and a kill reaches what the reward function started.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "core.scoring_worker", *map(str, arguments)],
            cwd=REPOSITORY,
            env=environment(),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self.held: collections.deque[Item] = collections.deque()  # the first one is being scored
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._pace_s = AHEAD_S  # seconds an item takes, the last ones counting most

    @property
    def has_room(self) -> bool:
        """Whether it may hold one more item."""
        return not self.held or (len(self.held) < DEPTH and (len(self.held) + 1) * self._pace_s <= AHEAD_S)

    def took(self, seconds: float) -> None:
        """Its first item is scored."""
        self._pace_s = (self._pace_s + seconds) / 2

    def send(self) -> None:
        # A child that died is noticed when its socket is read, after the scores it had still sent.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.outgoing:
                del self.outgoing[: self.socket.send(self.outgoing)]

    def receive(self) -> tuple[list[Outcome | Started], bool]:
        """What it said since, and whether it is still there."""
        alive = True
        with contextlib.suppress(BlockingIOError):
            try:
                while chunk := self.socket.recv(1 << 16):
                    self.incoming += chunk
                alive = False
            except ConnectionResetError:
                alive = False
        return take_replies(self.incoming), alive

    def kill(self) -> str:
        """End it and what it started; how it ended, in words."""
        if self.process.returncode is None:  # its id may be another process's once it was waited for
            os.killpg(self.process.pid, signal.SIGKILL)
        self.socket.close()
        status = self.process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
