"""Rows about the trainer's own processes: killed at any instant; and runs that must come out equal."""

import os
import random
import signal
import time

from bench.faults.processes import gone
from bench.faults.rows import Verdict, row
from bench.faults.runs import TORCHRUN, Run, demanded, difference, rank_of, reference

KILLS, KILLS_AHEAD = 20, 4


def _killed(run: Run, kills: int, seed: int) -> list[str]:
    """kill -9 at random instants: half of them while it starts, half while it trains. Says where each one hit."""
    chance, start_s, hits = random.Random(seed), 0.0, []
    for number in range(kills):
        resume = ["--resume"] if (run.dir / "run.json").exists() else []
        before = len(run.lines()) if resume else 0
        begun = time.monotonic()
        run.start(*resume)
        if number % 2 and start_s:
            time.sleep(chance.uniform(0.0, start_s))
        else:
            _wait_for_more(run, before)
            start_s = max(start_s, time.monotonic() - begun)
            time.sleep(chance.uniform(0.0, 0.3))
        family = list(run.family())
        run.kill()
        gone(family)
        hits.append("starting" if len(run.lines()) == before else f"after step {len(run.lines())}")
    return hits


def _wait_for_more(run: Run, before: int) -> None:
    run.wait_for("a further step", lambda: len(run.lines()) != before)


@row("F5", f"kill -9 of rank 0 at {KILLS} random instants, each time resumed; lookahead 0")
def kill_rank_0(seed: int) -> Verdict:
    steps = 60
    whole = Run("whole", algorithm__steps=steps).complete()
    run = Run("killed", algorithm__steps=steps)
    hits = _killed(run, KILLS, seed)
    run.complete("--resume")
    lost, duplicated = difference(run, exact=False, steps=steps)
    assert run.weights() == whole.weights(), "final parameters differ from the undisturbed run's"
    starting = hits.count("starting")
    text = f"{starting} while starting, {KILLS - starting} while training; final parameters bit-equal"
    return Verdict("tolerated", text, None, lost, duplicated)


@row("F5b", f"kill -9 of rank 0 at {KILLS_AHEAD} random instants with rollouts in flight; lookahead 1")
def kill_rank_0_ahead(seed: int) -> Verdict:
    steps = 40
    run = Run("killed-ahead", algorithm__steps=steps, algorithm__lookahead=1, checkpoint__every=3)
    _killed(run, KILLS_AHEAD, seed + 1)
    run.complete("--resume")
    lost, duplicated = difference(run, exact=False, steps=steps)
    return Verdict("tolerated", f"{demanded(steps).total()} completions trained, each once", None, lost, duplicated)


@row("F5c", "kill -9 of an explorer, a rollout worker and a reward worker of one run")
def kill_children(seed: int) -> Verdict:
    steps = 60
    run = Run("killed-children", algorithm__steps=steps, algorithm__schedule="constant", algorithm__alpha=0.5)
    run.start()
    for step, word in ((3, "rollout.explorer"), (10, "--role learner"), (15, "scoring_worker")):
        run.wait_for_step(step)
        os.kill(run.pid_of(word), signal.SIGKILL)
        if word != "scoring_worker":
            run.wait_for("it is said", lambda: "was killed by SIGKILL" in run.text())
    run.finish()
    keys, ledger = run.keys(), run.ledger()
    assert ledger["conserved"], ledger
    assert {count for count in keys.values()} == {1}, "a completion trained twice"
    assert keys.total() == steps * 16, keys.total()
    dropped = ledger["explorer"]["dropped"] | ledger["learner"]["dropped"]
    text = f"each restarted and named; {keys.total()} completions trained, dropped with their scorer: {dropped}"
    return Verdict("tolerated", text, None, steps * 16 - keys.total(), keys.total() - len(keys))


@row("F6", "kill -9 of rank 1 of two")
def kill_rank_1(seed: int) -> Verdict:
    run = Run("two-ranks", algorithm__steps=2000)
    run.start(launcher=(*TORCHRUN, "2"))
    run.wait_for_step(3)
    family, victim, start = list(run.family()), rank_of(run, 1), time.monotonic()
    os.kill(victim, signal.SIGKILL)
    run.finish(1, within_s=60)
    seconds = time.monotonic() - start
    gone(family)
    text = run.text()
    assert "SIGKILL" in text, run.tail()
    return Verdict("stopped", "torchrun names rank 1 and its signal; the other rank and all workers are gone", seconds)


@row("F37", "the same run twice")
def deterministic(seed: int) -> Verdict:
    lost, duplicated = difference(Run("again").complete())
    return Verdict("tolerated", "final parameters bit-equal", None, lost, duplicated)


@row("F34", "explorers faster than the learner at the end of the run")
def drain(seed: int) -> Verdict:
    run = reference()
    assert "Traceback" not in run.text(), run.tail()
    lost, duplicated = difference(run)
    return Verdict("tolerated", "exit code 0, last checkpoint, report and model written", None, lost, duplicated)
