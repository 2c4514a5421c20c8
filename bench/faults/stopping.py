"""Rows about runs that are told to stop, or left alone by their launcher."""

import os
import signal
import time

from bench.faults.processes import gone
from bench.faults.rows import Verdict, row
from bench.faults.runs import TORCHRUN, Run, difference


@row("F32", "kill -9 of the launcher (torchrun), of the trainer")
def orphans(seed: int) -> Verdict:
    run = Run("orphans", algorithm__steps=2000)
    run.start(launcher=(*TORCHRUN, "1"))
    run.wait_for_step(2)
    family = list(run.family())
    run.kill()
    seconds = gone(family, within_s=30)
    assert "stopping before the next step" in run.text(), run.tail()
    newest = max(int(name.removeprefix("step_")) for name in run.checkpoints())
    run.start("--resume")
    run.wait_for_step(newest + 1)
    family = list(run.family())
    run.kill()
    at_once = gone(family)
    text = f"without torchrun: checkpoint, then all gone; without the trainer: all gone after {at_once:.1f} s"
    return Verdict("stopped", text, seconds)


@row("F36", "SIGTERM while it starts, while it trains, while it waits for completions")
def terminate(seed: int) -> Verdict:
    run = Run("terminated")
    run.start()
    run.wait_for("it starts", lambda: "completions per prompt" in run.text())
    run.signal(signal.SIGTERM)
    run.finish(143, within_s=30)
    run.start("--resume")
    run.wait_for_step(2)
    family = list(run.family())
    run.signal(signal.SIGTERM)
    seconds = run.finish(143, within_s=30)
    gone(family)
    step = len(run.lines())
    assert f"step_{step}" in run.checkpoints(), run.checkpoints()
    assert "stopped by SIGTERM; continue with --resume" in run.text(), run.tail()
    run.start("--resume")
    worker = run.wait_for("a rollout worker", lambda: "--role learner" in str(run.family())) and run.pid_of(
        "--role learner"
    )
    os.kill(int(worker), signal.SIGSTOP)
    time.sleep(3.0)
    run.signal(signal.SIGTERM)
    run.finish(143, within_s=30)
    run.complete("--resume")
    lost, duplicated = difference(run)
    return Verdict(
        "stopped",
        f"exit code 143 with a checkpoint of step {step}; resumed: parameters bit-equal",
        seconds,
        lost,
        duplicated,
    )


@row("F36b", "Ctrl-C once; Ctrl-C twice while the main thread is stuck; SIGUSR1")
def interrupt(seed: int) -> Verdict:
    run = Run("interrupted", algorithm__steps=2000)
    run.start()
    run.wait_for_step(2)
    family = list(run.family())
    run.signal(signal.SIGUSR1)
    run.wait_for("stacks", lambda: "Current thread" in run.text() or "most recent call first" in run.text())
    run.wait_for("a worker's stacks", lambda: "call first" in (run.dir / "logs" / "explorer-0.log").read_text())
    run.signal(signal.SIGINT)
    once = run.finish(130, within_s=30)
    gone(family)
    assert "continue with --resume" in run.text(), run.tail()
    run.start("--resume")
    step = len(run.lines())
    run.wait_for_step(step + 2)
    family = list(run.family())
    os.kill(run.pid_of("--role learner"), signal.SIGSTOP)  # the next step cannot come, nor can its worker leave
    run.signal(signal.SIGINT)
    time.sleep(1.2)
    run.signal(signal.SIGINT)
    twice = run.finish(130, within_s=10)
    gone(family)
    text = (
        f"once: {once:.1f} s with a checkpoint and the hint; twice: {twice:.1f} s; stacks of trainer and workers shown"
    )
    return Verdict("stopped", text, once)
