"""Signals end a run where it can be continued, or at once; stacks are shown on request and when nothing moves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import run_parts
import torch
from run_parts import arguments, eventually, finish, start

from core.config import Checkpoint, Config
from trainer import session, updates
from trainer.session import Session
from trainer.signals import Signals, Stopped
from trainer.stream import GroupStream
from trainer.world import World

REPOSITORY = run_parts.REPOSITORY
PROLOGUE = """
import signal, sys, threading, time
sys.path.insert(0, {repository!r})
from trainer import signals
from trainer.signals import SIGNALS, Stopped
SIGNALS.install()
def say(*words): print(*words, flush=True)
"""


class Script:
    """A process that has the trainer's signals and does what a test wants."""

    def __init__(self, body: str, **environment: str) -> None:
        code = PROLOGUE.format(repository=str(REPOSITORY)) + body
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=run_parts.environment(**environment),
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


BETWEEN_STEPS = """
try:
    with SIGNALS.between_steps_only():
        say("ready")
        while True:
            time.sleep(0.05)
            SIGNALS.check()
except Stopped as stopped:
    say(stopped.name, stopped.between_steps)
    sys.exit(stopped.exit_code)
"""
SETTING_UP = """
try:
    say("ready")
    time.sleep(60)
except Stopped as stopped:
    say(stopped.name, stopped.between_steps)
    sys.exit(stopped.exit_code)
"""
STUCK_IN_C = """
import ctypes
with SIGNALS.between_steps_only():
    say("ready")
    while True:
        ctypes.CDLL(None).sleep(60)  # releases the interpreter, as a collective does, but never runs Python's handlers
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("body", "between"), [(BETWEEN_STEPS, True), (SETTING_UP, False)])
def test_one_signal_stops_at_the_right_place(number: int, code: int, body: str, between: bool) -> None:
    script = Script(body)
    script.process.send_signal(number)
    assert script.end()[:2] == (code, f"{signal.Signals(number).name} {between}\n")


def test_a_second_signal_ends_a_process_that_is_stuck_in_c() -> None:
    script = Script(STUCK_IN_C)
    script.process.send_signal(signal.SIGINT)
    time.sleep(1.2)  # longer than what counts as the same key press
    script.process.send_signal(signal.SIGINT)
    code, _, err = script.end()
    assert code == 130
    assert "stopping before the next step" in err
    assert "stopped at once; continue with --resume" in err


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """From the terminal's process group and from torchrun."""
    script = Script(BETWEEN_STEPS)
    script.process.send_signal(signal.SIGTERM)
    script.process.send_signal(signal.SIGTERM)
    assert script.end()[:2] == (143, "SIGTERM True\n")


def test_stacks_of_all_threads_and_of_children_that_want_to_tell() -> None:
    script = Script(
        """
import subprocess
talks = subprocess.Popen([sys.executable, "-c", "import faulthandler, signal, time\\n"
    "faulthandler.register(signal.SIGUSR1)\\nprint('up', flush=True)\\ntime.sleep(60)"],
    stdout=subprocess.PIPE, text=True)
mute = subprocess.Popen([sys.executable, "-c", "print('up', flush=True)\\nimport time\\ntime.sleep(60)"],
    stdout=subprocess.PIPE, text=True)
talks.stdout.readline(), mute.stdout.readline()
def in_a_thread(): time.sleep(60)
threading.Thread(target=in_a_thread, daemon=True).start()
say("ready")
time.sleep(2)
say(mute.poll())
talks.kill(); mute.kill(); talks.wait(); mute.wait()
"""
    )
    script.process.send_signal(signal.SIGUSR1)
    code, out, err = script.end()
    assert (code, out) == (0, "None\n")  # the mute one lives
    assert "in_a_thread" in err
    assert err.count("(most recent call first)") >= 3  # two threads here, one in the child


def test_a_process_that_does_not_move_shows_its_stacks() -> None:
    code, _, err = Script(
        """
def wedged(): time.sleep(1.5)
with SIGNALS.between_steps_only():
    signals.alive(0.5)
    say("ready")
    wedged()
signals.alive(0.5)
time.sleep(1.0)
"""
    ).end()
    assert code == 0
    assert "Timeout (0:00:00.500000)!" in err
    assert "in wedged" in err
    assert err.count("Timeout") <= 3  # not after training


def test_a_launcher_that_dies_asks_as_sigterm_does() -> None:
    body = BETWEEN_STEPS.replace('say("ready")', 'say("ready", os.getpid())')
    inner = "import os\n" + PROLOGUE.format(repository=str(REPOSITORY)) + body
    with subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"],
        stdout=subprocess.PIPE, text=True, env=run_parts.environment(TORCHELASTIC_RUN_ID="x"),
    ) as launcher:  # fmt: skip
        assert launcher.stdout is not None
        pid = launcher.stdout.readline().split()[1]
        launcher.kill()
        assert launcher.stdout.read() == "SIGTERM True\n"
    eventually(lambda: pid not in map(str, run_parts.processes_naming("between_steps_only")), "it is gone")


def test_nothing_asked_nothing_raised() -> None:
    signals = Signals()
    signals.check()
    signals.asked = signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        signals.check()
    assert stopped.value.exit_code == 143


def test_a_begun_step_has_its_grace() -> None:
    signals = Signals()
    signals.give_up(0.0)
    signals._ask(signal.SIGTERM)
    signals.give_up(60.0)
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        signals.give_up(0.0)
    assert not stopped.value.between_steps


def test_a_step_whose_updates_take_too_long_is_left_between_two_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its completions are there, so nothing waits; what another rank says counts as much as this one's signal."""
    signals, config = Signals(), Config(checkpoint=Checkpoint(grace_s=30.0))
    monkeypatch.setattr(updates, "SIGNALS", signals)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    handed = updates.Updates(config, GroupStream(world, None), Mock(), world)._timed([Mock(), Mock()])
    next(handed)
    signals._ask(signal.SIGTERM)
    signals._asked_s -= 31.0
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        next(handed)
    assert not stopped.value.between_steps
    with pytest.raises(Stopped, match="SIGINT"):
        Signals().give_up(30.0, lambda own: max(own, signal.SIGINT))


@pytest.mark.slow
def test_a_step_that_does_not_end_is_given_up_and_the_run_closes_in_good_order(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    root, run_dir, log = tmp_path_factory.getbasetemp(), tmp_path / "run", tmp_path / "log"
    words = arguments(
        root, run_dir, data__eval="", checkpoint__every=1, checkpoint__grace_s=1, explorer__ahead_steps=1,
        reward__function="run_rewards:stalls", reward__timeout_s=300,
    )  # fmt: skip
    process = start(words, log=log)
    metrics = run_dir / "metrics.jsonl"
    eventually(lambda: metrics.exists() and '"step": 1, "reward"' in metrics.read_text(), "step 1", process)
    endpoint = run_parts.endpoint_of(run_dir)
    time.sleep(5.0)  # it is within step 2 then: one reward is missing
    process.send_signal(signal.SIGTERM)
    text = finish(process, log=log, code=143)
    assert "the step did not end within 1 s (checkpoint.grace_s)" in text
    assert "Traceback" not in text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_1"]
    assert os.path.exists(run_dir / "report.html")
    eventually(lambda: not run_parts.processes_naming(endpoint), "no process is left")


@pytest.mark.slow
def test_sigterm_saves_the_step_it_stands_at_and_the_rest_of_the_run_has_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    root = tmp_path_factory.getbasetemp()
    reference, run_dir, log = run_parts.reference_run(root)[0], tmp_path / "run", tmp_path / "log"
    words = arguments(root, run_dir, checkpoint__every=100)
    process = start(words, log=log)
    metrics = run_dir / "metrics.jsonl"
    eventually(lambda: metrics.exists() and '"step": 3, "reward"' in metrics.read_text(), "step 3", process)
    endpoint = run_parts.endpoint_of(run_dir)
    process.send_signal(signal.SIGTERM)
    text = finish(process, log=log, code=143)
    assert "stopped by SIGTERM; continue with --resume" in text
    assert text.count("report.html") == 2
    assert f"{run_parts.training_lines(run_dir)[-1]['step']} of 6" in (run_dir / "report.html").read_text()
    assert "Traceback" not in text
    eventually(lambda: not run_parts.processes_naming(endpoint), "no process is left")
    step = run_parts.training_lines(run_dir)[-1]["step"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{step}"]
    assert json.loads((run_dir / "ledger.json").read_text())["conserved"]
    finish(start([*words, "--resume"], log=log), log=log)
    assert run_parts.weights_bytes(run_dir) == run_parts.weights_bytes(reference)
    assert run_parts.trained_keys(run_dir) == run_parts.trained_keys(reference)
    assert os.path.exists(run_dir / "report.html")


@pytest.mark.parametrize("asked", [0, signal.SIGTERM])
def test_a_signal_that_cut_the_last_evaluation_short_is_no_finished_run(
    asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, ended = Signals(), Mock(spec=Session)
    ended.world = World(rank=0, size=1, device=torch.device("cpu"))
    signals.asked = asked
    monkeypatch.setattr(session, "SIGNALS", signals)
    if not asked:
        Session.heed_signals(ended)
        return
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        Session.heed_signals(ended)
    assert stopped.value.between_steps
