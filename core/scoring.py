"""Scores completions in processes that can be killed, because a reward function may hang, crash or eat all memory.

A time-out inside the process is not enough: SIGALRM does not interrupt C code (`\\boxed{(10^{10})!}` under gmpy2). The
parent keeps the time, kills the process of an overdue completion and starts another.
"""

import collections
import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.rewards import RewardItem
from core.scoring_worker import Outcome, Started, environment, frame, take_replies

REPOSITORY = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120.0  # a user's module may import torch
DEPTH = 16  # items a child holds at once, so that it does not wait for the parent between two cheap ones


class _Child:
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
        self.held: collections.deque[tuple[Any, bytes]] = collections.deque()  # the first one is being scored
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.deadline = time.monotonic() + START_TIMEOUT_S

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


class RewardPool:
    """Scores submitted completions in `workers` processes; each gets `timeout_s` seconds from when its turn comes.

    `on_score(ticket, outcome)` is called once per submitted item, in the pool's thread, in no fixed order. A child that
    is killed or dies takes only the completion it was scoring with it: the others go to the next child. As many items
    wait as the caller submits. `counts` has the outcomes by failure, and "scored". `memory_bytes` bounds the address
    space of a child. `needs` has the columns that the function requires. Raises ValueError where the reward function
    cannot be used, before anything is submitted.

    Example: pool = RewardPool("math", workers=2, timeout_s=10, on_score=buffer.scored); pool.submit(key, item)
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int,
        timeout_s: float,
        on_score: Callable[[Any, Outcome], None],
        memory_bytes: int = 8 << 30,
    ) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"RewardPool needs workers >= 1 and timeout_s > 0, got {workers} and {timeout_s}")
        self.counts: collections.Counter[str] = collections.Counter()
        self.needs: tuple[str, ...] = ()
        self._function, self._workers, self._memory_bytes = function, workers, memory_bytes
        self._timeout_s, self._on_score = timeout_s, on_score
        self._queue: collections.deque[tuple[Any, bytes]] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._closing = False
        self._error: Exception | None = None
        self._settled = threading.Event()  # the first child is ready, or the pool has failed
        # The thread starts the children, because the kernel ends them with the thread that started them.
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            self.close()
            raise ValueError(str(self._error)) from self._error

    def submit(self, ticket: Any, item: RewardItem) -> None:
        """Score `item`; `ticket` comes back with the outcome. Raises RuntimeError after a failure or `close`."""
        self.check()
        if self._closing:
            raise RuntimeError("the reward pool is closed")
        self._queue.append((ticket, frame(item)))
        self._rouse()

    def check(self) -> None:
        """Raise RuntimeError where the pool has failed: a caller that waits for scores calls this as it waits."""
        if self._error is not None:
            raise RuntimeError(f"the reward pool has failed: {self._error}") from self._error

    def close(self) -> None:
        """Kill the children. Items without an outcome get none."""
        self._closing = True
        self._rouse()
        self._thread.join()
        self._wake.close()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rouse(self) -> None:
        # A full socket wakes the thread as well as one byte more would; a closed one has nobody left to wake.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _run(self) -> None:
        children: list[_Child] = []
        self._selector.register(self._woken, selectors.EVENT_READ)
        try:
            for _ in range(self._workers):
                children.append(self._started())
            while not self._closing:
                self._feed(children)
                self._listen(children)
                self._replace_overdue(children)
        # Whatever ends this thread, a raising on_score too, is raised again to the next caller of check or submit.
        except Exception as error:
            self._error = error
        finally:
            for child in children:
                child.kill()
            self._selector.close()
            self._woken.close()
            self._settled.set()

    def _started(self) -> _Child:
        child = _Child(self._function, self._memory_bytes)
        self._selector.register(child.socket, selectors.EVENT_READ, child)
        return child

    def _feed(self, children: list[_Child]) -> None:
        """Hand waiting items to the children that hold fewest."""
        ready = [child for child in children if child.ready]
        while self._queue and ready:
            child = min(ready, key=lambda child: len(child.held))
            if len(child.held) >= DEPTH:
                break
            if not child.held:
                child.deadline = time.monotonic() + self._timeout_s
            child.held.append(self._queue.popleft())
            child.outgoing += child.held[-1][1]
        for child in ready:
            if child.outgoing:
                child.send()
                writing = selectors.EVENT_WRITE if child.outgoing else 0
                self._selector.modify(child.socket, selectors.EVENT_READ | writing, child)

    def _listen(self, children: list[_Child]) -> None:
        """Wait for a reply, a new item or a deadline, and deal with the replies."""
        nearest = min(child.deadline for child in children)
        wait_s = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._woken.recv(1 << 16)
                continue
            replies, alive = key.data.receive()
            for reply in replies:
                self._take(key.data, reply)
            if not alive:
                ending = self._end(key.data)
                if not key.data.ready:
                    raise RuntimeError(f"{self._named()}: its scoring process ended as it started, with {ending}")
                self._replace(children, key.data, Outcome(None, "crashed", f"the scoring process ended with {ending}"))

    def _take(self, child: _Child, reply: Outcome | Started) -> None:
        if isinstance(reply, Started):
            if reply.error:
                raise RuntimeError(reply.error)
            child.ready, self.needs = True, reply.needs
            self._settled.set()
        else:
            self._report(child.held.popleft()[0], reply)
        child.deadline = time.monotonic() + self._timeout_s if child.held else math.inf

    def _replace_overdue(self, children: list[_Child]) -> None:
        # Replies were read just before, so a score that was sent in time counts, however late this thread comes.
        for child in list(children):
            if child.deadline <= time.monotonic():
                if not child.ready:
                    raise RuntimeError(f"{self._named()} took over {START_TIMEOUT_S:.0f} s to start a scoring process")
                self._end(child)
                self._replace(children, child, Outcome(None, "timeout", f"no score within {self._timeout_s:g} s"))

    def _named(self) -> str:
        return f'reward.function = "{self._function}"'

    def _end(self, child: _Child) -> str:
        self._selector.unregister(child.socket)
        return child.kill()

    def _replace(self, children: list[_Child], child: _Child, outcome: Outcome) -> None:
        """Put a new process in the place of an ended one; what it was scoring gets `outcome`, the rest waits again."""
        guilty = child.held.popleft() if child.held else None
        self._queue.extendleft(reversed(child.held))
        children[children.index(child)] = self._started()
        if guilty is not None:
            self._report(guilty[0], outcome)

    def _report(self, ticket: Any, outcome: Outcome) -> None:
        self.counts[outcome.failure or "scored"] += 1
        self._on_score(ticket, outcome)
