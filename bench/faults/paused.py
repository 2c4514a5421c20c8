"""Rows about processes of a run that stand still for longer than liveness (SIGSTOP), then go on (SIGCONT)."""

import os
import signal
import time

from bench.faults.rows import Verdict, row
from bench.faults.runs import SETTINGS, TORCHRUN, Run, demanded, difference, rank_of
from bench.faults.stream import resident_bytes

PAUSE_S = float(str(SETTINGS["stream.liveness_s"])) + 2


def _paused(run: Run, pid: int) -> float:
    """Stop a worker of a run until the run has taken it for dead; seconds until then."""
    heard = run.text().count(" is dead")
    os.kill(pid, signal.SIGSTOP)
    seconds = run.wait_for("it is said", lambda: run.text().count(" is dead") > heard)
    os.kill(pid, signal.SIGCONT)
    run.wait_for("it is back", lambda: run.text().count(" is back") > heard)
    return seconds


@row("F3c", "SIGSTOP of a run's explorer, then of its rollout worker, each then SIGCONT")
def workers(seed: int) -> Verdict:
    run = Run("paused-workers")
    run.start()
    seconds = []
    for name, word in (("explorer-0", "rollout.explorer"), ("learner-0", "--role learner")):
        run.wait_for(f"{name} is ready", lambda name=name: any(  # type: ignore[misc]
            line.startswith(name) and " is ready" in line for line in run.text().splitlines()
        ))  # fmt: skip
        seconds.append(_paused(run, run.pid_of(word)))
    run.finish()
    lost, duplicated = difference(run)
    text = "each found dead and named, its leases waited for it; final parameters bit-equal"
    return Verdict("tolerated", text, max(seconds), lost, duplicated)


@row("F7c", "SIGSTOP of rank 0 for longer than liveness, then SIGCONT")
def trainer(seed: int) -> Verdict:
    run = Run("paused-trainer", algorithm__lookahead=1, algorithm__steps=40)
    run.start()
    run.wait_for_step(4)
    assert run.process is not None
    others = list(run.family())
    before = {pid: resident_bytes(pid) for pid in others}
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    grown = max(resident_bytes(pid) - before[pid] for pid in others)
    run.process.send_signal(signal.SIGCONT)
    run.finish()
    assert " is dead" not in run.text(), "a trainer's own pause is nobody's silence"
    assert grown < 16 << 20, f"a worker grew by {grown / 1e6:.1f} MB while nothing was taken"
    lost, duplicated = difference(run, exact=False, steps=40)
    text = f"{PAUSE_S:g} s: workers held ({grown / 1e6:+.1f} MB), nobody taken for dead, {demanded(40).total()} trained"
    return Verdict("tolerated", text, None, lost, duplicated)


@row("F6b", "SIGSTOP of rank 1 of two for longer than liveness, then SIGCONT")
def rank_1(seed: int) -> Verdict:
    steps = 40
    run = Run("paused-rank", algorithm__steps=steps)
    run.start(launcher=(*TORCHRUN, "2"))
    run.wait_for_step(3)
    victim = rank_of(run, 1)
    os.kill(victim, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    done = len(run.lines())
    os.kill(victim, signal.SIGCONT)
    run.finish()
    assert done < steps, "it was not waited for"
    lost, duplicated = difference(run, exact=False, steps=steps)
    return Verdict("tolerated", f"rank 0 waited from step {done} on, then both finished", None, lost, duplicated)
