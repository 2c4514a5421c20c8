"""Worker processes that the trainer starts: they die with it, log to files, and are restarted a few times at most."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.schema import Source
from rollout.peers import State

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {Source.EXPLORER: "rollout.explorer", Source.LEARNER: "rollout.worker"}
LOG_TAIL_LINES = 15
# What torchrun tells its own ranks; an engine in a worker must not take itself for one of them.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")


class Exit(NamedTuple):
    """A child that ended."""

    name: str
    role: Source
    pid: int
    was_ready: bool
    code: int  # negative: the signal that killed it
    restarts_left: int

    @property
    def fatal(self) -> bool:
        """It failed by itself before it could work, so that it would fail again; or it was restarted too often."""
        return (self.code > 0 and not self.was_ready) or self.restarts_left == 0

    def line(self) -> str:
        """How it ended, in words."""
        how = f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exited with {self.code}"
        return f"{self.name} (pid {self.pid}) {how}"


@dataclass
class _Child:
    name: str
    role: Source
    process: subprocess.Popen[bytes]
    gpus: str | None = None
    first: Source | None = None  # the role it begins in, where that is another
    restarts: int = 0
    ready: bool = False
    asked: bool = False  # for its stacks
    restart_at_s: float | None = None


class Children:
    """Spawned workers by name. One thread owns it: the children are killed when that thread's process dies."""

    def __init__(self, run_dir: Path, *, threads: int, max_restarts: int, arguments: tuple[str, ...]) -> None:
        self.logs = run_dir / "logs"
        self.threads, self.max_restarts, self.arguments = threads, max_restarts, arguments
        self.restarted = 0
        self._children: dict[str, _Child] = {}

    def start(
        self, role: Source, index: int, endpoint: str, gpus: str | None = None, first: Source | None = None
    ) -> None:
        """Start worker number `index` of a role. `gpus`: its CUDA_VISIBLE_DEVICES; None: this process's.

        `first`: the role that it joins in until `settle`, after a restart as well.
        """
        name = f"{role}-{index}"
        assert name not in self._children, name
        self._children[name] = _Child(name, role, self._launch(name, first or role, endpoint, gpus), gpus, first)

    def settle(self, name: str) -> None:
        """Started again, this child joins in its own role."""
        self._children[name].first = None

    def note(self, pid: int, state: State) -> None:
        """How a worker of this process id stands. One that hangs is asked once for its stacks, which go to its log."""
        for child in self._children.values():
            if child.process.pid == pid and state == State.READY:
                child.ready, child.asked = True, False
            elif child.process.pid == pid and state == State.HUNG and not child.asked and child.process.poll() is None:
                child.asked = True
                os.kill(pid, signal.SIGUSR1)

    def may_return(self, role: Source) -> bool:
        """Whether a child of this role runs or will be started again."""
        return any(
            child.role == role and (child.process.poll() is None or child.restart_at_s is not None)
            for child in self._children.values()
        )

    def pids(self) -> dict[str, int]:
        """Of every running child."""
        return {child.name: child.process.pid for child in self._children.values() if child.process.poll() is None}

    def reap(self, now: float, endpoint: str) -> list[Exit]:
        """Children that ended since the last call; those that may are started again after a growing pause."""
        exits = []
        for child in self._children.values():
            if child.restart_at_s is not None:
                if now >= child.restart_at_s:
                    child.restart_at_s, child.ready = None, False
                    child.process = self._launch(child.name, child.first or child.role, endpoint, child.gpus)
                    self.restarted += 1
                continue
            code = child.process.poll()
            if code is None or child.restarts > self.max_restarts:
                continue
            left = self.max_restarts - child.restarts
            end = Exit(child.name, child.role, child.process.pid, child.ready, code, left)
            child.restarts = self.max_restarts + 1 if end.fatal else child.restarts + 1
            child.restart_at_s = None if end.fatal else now + 0.25 * child.restarts
            exits.append(end)
        return exits

    def tail(self, name: str) -> str:
        """The last lines of a child's log."""
        lines = (self.logs / f"{name}.log").read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def stop(self, *, grace_s: float) -> None:
        """Wait for children to end by themselves, then terminate, then kill; within about 2 × grace_s all are gone."""
        self._wait(grace_s)
        for step in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children.values():
                if child.process.poll() is None:
                    os.killpg(child.process.pid, step)  # each leads its own process group
            self._wait(grace_s)
        self._children.clear()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _launch(self, name: str, role: Source, endpoint: str, gpus: str | None) -> subprocess.Popen[bytes]:
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", MODULES[role], "--connect", endpoint, "--name", name]
        command += ["--parent", str(os.getpid()), "--threads", str(self.threads), *self.arguments]
        if role == Source.LEARNER:
            command += ["--role", role.value]
        ours = {key: value for key, value in os.environ.items() if key not in _TORCHRUN and "TORCHELASTIC" not in key}
        environment = ours | {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with (self.logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
