"""Scores completions in processes that can be killed, because a reward function may hang, crash or eat all memory.

A time-out inside the process is not enough: SIGALRM does not interrupt C code (`\\boxed{(10^{10})!}` under gmpy2). The
parent keeps the time, kills the process of an overdue completion and starts another.
"""

import collections
import contextlib
import itertools
import math
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from core.rewards import RewardItem
from core.scoring_child import START_TIMEOUT_S, Child, Item
from core.scoring_worker import Outcome, Started, frame


class RewardPool:
    """Scores submitted completions in `workers` processes; each gets `timeout_s` seconds from when its turn comes.

    `on_score(ticket, outcome)` is called once per submitted item, in the pool's thread, in no fixed order: items of the
    lowest `urgency` are handed to a child first, and among these the oldest; a child holds what it scores in 0.2 s, or
    one. A child that is killed or dies takes only the completion it was scoring with it: the others go to the next
    child. As many items wait as the caller submits. `submitted` and `finished` count them, `finished_s` is when the
    last one was (time.monotonic()), `counts` has the outcomes by failure, and "scored". `memory_bytes` bounds the
    address space of a child. `needs` has the columns that the function requires. Raises ValueError where the reward
    function cannot be used, before anything is submitted.

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
        self._queue: queue.PriorityQueue[Item] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self.submitted = self.finished = 0
        self.finished_s = time.monotonic()  # the last of them
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._roused = self._closing = False
        self._error: Exception | None = None
        self._settled = threading.Event()  # the first child is ready, or the pool has failed
        # The thread starts the children, because the kernel ends them with the thread that started them.
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            self.close()
            raise ValueError(str(self._error)) from self._error

    def submit(self, ticket: Any, item: RewardItem, *, urgency: tuple[int, ...] = ()) -> None:
        """Score `item`; `ticket` comes back with the outcome. Raises RuntimeError after a failure or `close`."""
        self.check()
        if self._closing:
            raise RuntimeError("the reward pool is closed")
        self.submitted += 1
        self._queue.put(Item(urgency, next(self._numbers), ticket, frame(item)))
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
        # One byte until the thread has seen it: a call for each item would hand Python's lock over as often.
        if not self._roused:
            self._roused = True
            with contextlib.suppress(OSError):  # a closed socket has nobody left to wake
                self._wake.send(b"\0")

    def _run(self) -> None:
        children: list[Child] = []
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

    def _started(self) -> Child:
        child = Child(self._function, self._memory_bytes)
        self._selector.register(child.socket, selectors.EVENT_READ, child)
        return child

    def _feed(self, children: list[Child]) -> None:
        """Hand waiting items to the children that hold fewest."""
        ready = [child for child in children if child.ready]
        while not self._queue.empty() and (roomy := [child for child in ready if child.has_room]):
            child = min(roomy, key=lambda child: len(child.held))
            if not child.held:
                child.deadline = time.monotonic() + self._timeout_s
            child.held.append(self._queue.get_nowait())
            child.outgoing += child.held[-1].frame
        for child in ready:
            if child.outgoing:
                child.send()
                writing = selectors.EVENT_WRITE if child.outgoing else 0
                self._selector.modify(child.socket, selectors.EVENT_READ | writing, child)

    def _listen(self, children: list[Child]) -> None:
        """Wait for a reply, a new item or a deadline, and deal with the replies."""
        nearest = min(child.deadline for child in children)
        wait_s = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._woken.recv(1 << 16)
                self._roused = False  # before the queue is looked at: what is put in from now on rouses again
                continue
            replies, alive = key.data.receive()
            for reply in replies:
                self._take(key.data, reply)
            if not alive:
                ending = self._end(key.data)
                if not key.data.ready:
                    raise RuntimeError(f"{self._named()}: its scoring process ended as it started, with {ending}")
                self._replace(children, key.data, Outcome(None, "crashed", f"the scoring process ended with {ending}"))

    def _take(self, child: Child, reply: Outcome | Started) -> None:
        if isinstance(reply, Started):
            if reply.error:
                raise RuntimeError(reply.error)
            child.ready, self.needs = True, reply.needs
            self._settled.set()
        else:
            child.took(time.monotonic() - (child.deadline - self._timeout_s))
            self._report(child.held.popleft().ticket, reply)
        child.deadline = time.monotonic() + self._timeout_s if child.held else math.inf

    def _replace_overdue(self, children: list[Child]) -> None:
        # Replies were read just before, so a score that was sent in time counts, however late this thread comes.
        for child in list(children):
            if child.deadline <= time.monotonic():
                if not child.ready:
                    raise RuntimeError(f"{self._named()} took over {START_TIMEOUT_S:.0f} s to start a scoring process")
                self._end(child)
                self._replace(children, child, Outcome(None, "timeout", f"no score within {self._timeout_s:g} s"))

    def _named(self) -> str:
        return f'reward.function = "{self._function}"'

    def _end(self, child: Child) -> str:
        self._selector.unregister(child.socket)
        return child.kill()

    def _replace(self, children: list[Child], child: Child, outcome: Outcome) -> None:
        """Put a new process in the place of an ended one; what it was scoring gets `outcome`, the rest waits again."""
        guilty = child.held.popleft() if child.held else None
        for item in child.held:
            self._queue.put(item)
        children[children.index(child)] = self._started()
        if guilty is not None:
            self._report(guilty.ticket, outcome)

    def _report(self, ticket: Any, outcome: Outcome) -> None:
        self.counts[outcome.failure or "scored"] += 1
        self.finished, self.finished_s = self.finished + 1, time.monotonic()
        self._on_score(ticket, outcome)
