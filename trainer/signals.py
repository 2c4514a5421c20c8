"""What signals do to the trainer, and stacks when nothing moves.

SIGTERM, Ctrl-C   a run that trains stops before its next step, with a checkpoint (exit code 143, 130), or without one
                  where the step does not end within checkpoint.grace_s; one that is being set up, or is asked again,
                  stops at once, whatever its main thread is busy with
SIGUSR1           the stacks of all threads go to the error stream, and those of every worker to its log

A launcher that dies asks as SIGTERM does, so that no rank outlives torchrun.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

_PR_SET_PDEATHSIG = 1
# A signal to the whole process group reaches a rank twice: from the system and, a moment later, from torchrun.
REPEAT_S = 1.0
STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run is to end because of a signal. `between_steps`: all ranks agreed to, so a checkpoint can be written."""

    def __init__(self, number: int, *, between_steps: bool) -> None:
        self.name = signal.Signals(number).name
        super().__init__(self.name)
        self.between_steps, self.exit_code = between_steps, 128 + number


class Signals:
    """Of this process. `asked`: the signal that asked the run to stop, or 0. `training`: in `between_steps_only`.

    A thread reads which signals came, because Python's own handlers wait for as long as the main thread is in C code.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._asked_s = 0.0
        self.training, self.alive_s = False, 0.0

    def install(self) -> None:
        """Called once, on the main thread, before anything that takes long."""
        faulthandler.enable()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGUSR1):
            signal.signal(number, self._handle)
        faulthandler.register(signal.SIGUSR1, chain=True)
        threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True).start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _die_with_launcher()

    @contextlib.contextmanager
    def between_steps_only(self) -> Iterator[None]:
        """While training: a first signal waits for `check`."""
        self.training, self.alive_s = True, 0.0
        try:
            yield
        finally:
            self.training = False
            faulthandler.cancel_dump_traceback_later()

    def check(self, among: Callable[[int], int] = int) -> None:
        """Between steps: raise Stopped where a signal asked for it. `among` gives the largest of all ranks' values, so
        that they leave together."""
        if asked := among(self.asked):
            raise Stopped(asked, between_steps=True)

    def overdue(self, grace_s: float) -> int:
        """Within a step: the signal that asked `grace_s` seconds ago or earlier, or 0."""
        return self.asked if time.monotonic() - self._asked_s >= grace_s else 0

    def give_up(self, grace_s: float, among: Callable[[int], int] = int) -> None:
        """Within a step: raise Stopped where `overdue`; `among` as in `check`."""
        if asked := among(self.overdue(grace_s)):
            _say(f"the step did not end within {grace_s:g} s (checkpoint.grace_s): stopping without a checkpoint of it")
            raise Stopped(asked, between_steps=False)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in STOPPING and not self.training:
            raise Stopped(number, between_steps=False)

    def _watch(self, arrived: socket.socket) -> None:
        while numbers := arrived.recv(64):
            for number in numbers:
                if number in STOPPING:
                    self._ask(number)
                elif number == signal.SIGUSR1:
                    show_stacks_of_children()

    def _ask(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if not self.asked:
            self.asked, self._asked_s = number, now
            if self.training:
                _say(f"{name}: stopping before the next step, with a checkpoint; once more stops at once")
        elif now - self._asked_s > REPEAT_S:
            _say(f"{name} again: stopped at once; continue with --resume")
            os._exit(128 + number)  # the system ends the workers with this process


SIGNALS = Signals()


def show_stacks() -> None:
    """Every thread's stack to the error stream, and those of child processes to theirs."""
    faulthandler.dump_traceback(all_threads=True)
    show_stacks_of_children()


def show_stacks_of_children() -> None:
    """SIGUSR1 to all descendants that handle it: it would end those that do not."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if _handles(child.pid, signal.SIGUSR1):
                os.kill(child.pid, signal.SIGUSR1)


def alive(limit_s: float) -> None:
    """While training: the main thread moves. Unless this is called again within `limit_s` seconds, all stacks of its
    process are shown."""
    now = time.monotonic()
    if SIGNALS.training and now - SIGNALS.alive_s >= limit_s / 100:  # it starts a thread each time
        SIGNALS.alive_s = now
        faulthandler.dump_traceback_later(limit_s, repeat=True)


def _handles(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _die_with_launcher() -> None:
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"s2l-po: {text}", file=sys.stderr, flush=True)
