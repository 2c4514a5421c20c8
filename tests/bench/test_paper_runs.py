"""The runner of bench.paper: what is done is not done again, arms are shared, a failure is said and loses nothing."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.paper.runs import Job, RunFailed, Runner, code_hash, run_key

LINES = [
    {"step": 0, "eval/pass@1": 0.25},
    {"step": 1, "reward": 0.5},
    {"step": 1, "eval/pass@1": 0.5},
]


class Launch:
    """Writes what a run leaves behind; jobs whose arguments name `bad` end with 1."""

    def __init__(self, bad: str = "nothing") -> None:
        self.bad, self.commands = bad, []

    def __call__(self, command, log):
        self.commands.append(list(command))
        if any(self.bad in word for word in command):
            log.write_text("it went wrong")
            return 1, 0.0
        place = Path(next(word.partition("=")[2] for word in command if word.startswith("run.dir=")))
        for name in ("model", "rollouts", "checkpoints"):
            (place / name).mkdir(parents=True)
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
        (place / "ledger.json").write_text(json.dumps({"explorer": {"produced": 3}, "learner": {"produced": 5}}))
        return 0, 12.5


def job(arm="a", seed=0, steps=4):
    return Job(arm, seed, (f"algorithm.steps={steps}", "algorithm.anneal_steps=2"))


def runner(tmp_path, launch, lines=None):
    return Runner(tmp_path, jobs=2, launch=launch, say=[].append if lines is None else lines.append)


def test_a_run_is_done_once(tmp_path):
    launch = Launch()
    with runner(tmp_path, launch) as first:
        done = first.run([job(seed=0), job(seed=1), job(seed=0)])
    assert len(launch.commands) == 2
    assert [one.evaluations[-1]["eval/pass@1"] for one in done] == [0.5, 0.5, 0.5]
    assert (done[0].cpu_s, done[0].produced) == (12.5, {"explorer": 3, "learner": 5})
    with runner(tmp_path, launch) as second:
        second.run([job(seed=1), job(seed=2)])
    assert len(launch.commands) == 3


def test_arms_of_equal_settings_share_their_run(tmp_path):
    launch = Launch()
    with runner(tmp_path, launch) as one:
        done = one.run([job("grpo"), job("control")])
    assert done[0].key == done[1].key
    assert len(launch.commands) == 1


def test_only_what_the_page_needs_is_kept(tmp_path):
    with runner(tmp_path, Launch()) as one:
        place = one.run([job()])[0].model.parent
    assert sorted(entry.name for entry in place.iterdir()) == ["ledger.json", "metrics.jsonl", "model", "result.json"]


def test_a_failure_is_said_and_the_others_are_done(tmp_path):
    launch, lines = Launch(bad="steps=9"), []
    with runner(tmp_path, launch, lines) as one:
        with pytest.raises(RunFailed, match=r"1 of 3 runs failed; the first: bad seed 0 .*it went wrong"):
            one.run([job(), job("bad", steps=9), job("other", steps=5)])
        assert [found.job.arm for found in one.known([job(), job("bad", steps=9), job("other", steps=5)])] == [
            "a",
            "other",
        ]
    assert any("FAILED" in line for line in lines)


def test_settings_seed_and_code_make_the_key():
    keys = {run_key(job(), "x"), run_key(job(seed=1), "x"), run_key(job(steps=5), "x"), run_key(job(), "y")}
    assert len(keys) == 4
    assert run_key(Job("a", 0, ("algorithm.anneal_steps=2", "algorithm.steps=4")), "x") == run_key(job(), "x")


def test_code_hash_reads_what_computes(tmp_path):
    (tmp_path / "core").mkdir()
    before = code_hash(tmp_path)
    (tmp_path / "core" / "config.py").write_text("comment")
    assert code_hash(tmp_path) == before
    (tmp_path / "core" / "anneal.py").write_text("changed")
    assert code_hash(tmp_path) != before


def test_a_real_child_is_waited_for(tmp_path):
    one = Runner(tmp_path, jobs=1)
    code, cpu_s = one._start(["sh", "-c", "echo hello; exit 3"], tmp_path / "log")
    assert (code, (tmp_path / "log").read_text()) == (3, "hello\n")
    assert cpu_s >= 0


def test_an_interrupt_ends_the_runs_in_work(tmp_path):
    """As SIGTERM does: the main thread leaves the pool, which would wait for every run that is left."""
    child = [sys.executable, "-c", "import time; time.sleep(200)"]
    one = Runner(tmp_path, jobs=2, say=lambda line: None)
    one._launch = lambda command, log: one._start(child, log)

    def interrupt():
        while len(one._children) < 2:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)

    def handler(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(SystemExit), one:
            one.run([job(seed=seed) for seed in range(6)])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not one._children
    assert one.known([job(seed=seed) for seed in range(6)]) == []
