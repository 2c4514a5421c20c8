"""kill -9 and --resume: nothing is skipped, nothing trains twice, and on-policy runs keep their bits (promise 6)."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import run_parts
import torch
from run_parts import arguments, eventually, finish, kill, reference_run, start, train_here, training_lines
from safetensors.torch import load_file

from core.anneal import explorer_quota
from core.configfile import parse_command, write_resolved
from core.configkeys import ConfigError
from rollout.store import read_rollouts, stored_steps, write_rollouts
from trainer.alarm import COUNT
from trainer.session import Session

# What a clock or the machine decides, and faults, which an interrupted run has more of.
VARIABLE = ("time/", "step_time", "tokens_per_second", "clock", "buffer/", "fault/", "weights/", "run/start")
# Rollouts but for the name of the worker, which is new in every start.
COLUMNS = ("step", "slot", "sample", "source", "token_ids", "logprobs", "reward", "advantage", "version")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def lasting(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be equal, whatever interrupted the run."""
    return [{name: value for name, value in line.items() if not name.startswith(VARIABLE)} for line in lines]


def assert_the_same_run(run_dir: Path, reference: Path) -> None:
    assert run_parts.weights_bytes(run_dir) == run_parts.weights_bytes(reference)
    checksums, whole = ([line["weights/checksum"] for line in training_lines(path)] for path in (run_dir, reference))
    assert checksums == whole
    assert len(set(checksums)) == len(checksums)
    assert lasting(training_lines(run_dir)) == lasting(training_lines(reference))
    assert lasting(run_parts.evaluation_lines(run_dir)) == lasting(run_parts.evaluation_lines(reference))
    ours, theirs = (read_rollouts(path, columns=COLUMNS) for path in (run_dir, reference))
    assert ours.equals(theirs)
    assert set(run_parts.trained_keys(run_dir).values()) == {1}
    ledger, whole = run_parts.ledger(run_dir), run_parts.ledger(reference)
    assert ledger["conserved"]
    for source in ("explorer", "learner"):
        assert ledger[source]["trained"] == whole[source]["trained"]


def run_and_kill(words: list[str], log: Path, run_dir: Path, *, after_step: int, delay_s: float) -> None:
    """kill -9 of the trainer some time after it wrote the line of a step; its workers go with it."""
    process = start(words, log=log)
    try:
        reached = f'"step": {after_step}, "reward"'
        metrics = run_dir / "metrics.jsonl"
        eventually(lambda: metrics.exists() and reached in metrics.read_text(), f"step {after_step} trained", process)
        endpoint = run_parts.endpoint_of(run_dir)
        assert run_parts.processes_naming(endpoint)
        time.sleep(delay_s)
    finally:
        kill(process)
    eventually(lambda: not run_parts.processes_naming(endpoint), "the workers died with the trainer")


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts, on a machine that may be busy
def test_a_run_killed_three_times_ends_with_the_bits_of_an_uninterrupted_one(root: Path) -> None:
    """Inside the first checkpoint, just after it was renamed, and at a seeded random instant."""
    reference, run_dir, log = reference_run(root)[0], root / "killed", root / "killed.log"
    words = arguments(root, run_dir)
    finish(start(words, log=log, S2LPO_CRASH_AT="written"), log=log, code=-signal.SIGKILL)
    assert [path.name[:4] for path in (run_dir / "checkpoints").iterdir()] == ["tmp-"]

    text = finish(start([*words, "--resume"], log=log, S2LPO_CRASH_AT="renamed"), log=log, code=-signal.SIGKILL)
    assert "no checkpoint yet: starting at step 1" in text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_2"]

    instant = random.Random(20260530)
    after_step, delay_s = instant.randint(3, 5), instant.uniform(0, 0.4)
    run_and_kill([*words, "--resume"], log, run_dir, after_step=after_step, delay_s=delay_s)
    assert "continuing after step 2" in log.read_text()
    assert not (run_dir / "weights").exists()  # they were in the memory of who was killed

    finish(start([*words, "--resume"], log=log), log=log)
    assert_the_same_run(run_dir, reference)
    assert json.loads((run_dir / "run.json").read_text())["incarnation"] == 4


@pytest.mark.slow
def test_a_spoilt_checkpoint_is_skipped_loudly_and_the_one_before_it_gives_the_same_bits(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reference, run_dir = reference_run(root)[0], tmp_path / "spoilt"
    shutil.copytree(reference, run_dir)
    file = run_dir / "checkpoints" / "step_6" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train_here([*arguments(root, run_dir), "--resume"])
    said = capfd.readouterr()
    assert "CHECKPOINT SKIPPED" in said.err
    assert "model.safetensors does not have the SHA-256 that was written" in said.err
    assert "continuing after step 4" in said.out
    assert_the_same_run(run_dir, reference)


@pytest.mark.slow
def test_a_run_whose_steps_to_come_ask_nothing_of_explorers_goes_on_without_any(root: Path, tmp_path: Path) -> None:
    """α is 0 from step 4 on. Without its checkpoints the run would start again, and wait for explorers for ever."""
    reference = reference_run(root)[0]
    for kept, refused in (("step_4", False), ("none", True)):
        run_dir = shutil.copytree(reference, tmp_path / kept)
        for checkpoint in (run_dir / "checkpoints").iterdir():
            if checkpoint.name != kept:
                shutil.rmtree(checkpoint)
        words = [*arguments(root, run_dir, explorer__processes=0), "--resume"]
        if refused:
            with pytest.raises(ConfigError, match=r"explorer\.processes = 0 with .* Use explorer\.processes=1"):
                train_here(words)
        else:
            assert_the_same_run(train_here(words), reference)


@pytest.mark.slow
def test_with_rollouts_in_flight_every_completion_still_trains_once(root: Path) -> None:
    """lookahead 1, where bits may differ: killed after step 5, continued from the checkpoint of step 3."""
    run_dir, log = root / "ahead", root / "ahead.log"
    words = arguments(root, run_dir, algorithm__lookahead=1, checkpoint__every=3, algorithm__steps=8)
    run_and_kill([*words, "rollout.weights=files"], log, run_dir, after_step=5, delay_s=0.0)
    assert any((run_dir / "weights").iterdir())
    finish(start([*words, "--resume"], log=log), log=log)
    assert not any((run_dir / "weights").iterdir())  # the resumed start has them in memory, and has cleaned up
    assert "continuing after step 3" in log.read_text()
    expected = Counter(
        (step, slot, sample, source)
        for step in range(1, 9)
        for quota in [explorer_quota(step, group_size=4, anneal_steps=4)]
        for slot in range(8)
        for source, count in (("explorer", quota), ("learner", 4 - quota))
        for sample in range(count)
    )
    assert run_parts.trained_keys(run_dir) == expected
    ledger = run_parts.ledger(run_dir)
    assert ledger["conserved"]
    assert ledger["explorer"]["trained"] + ledger["learner"]["trained"] == expected.total()
    assert [line["step"] for line in training_lines(run_dir)] == list(range(1, 9))
    assert max(line["off_policy/staleness_max"] for line in training_lines(run_dir)) == 1


@pytest.mark.slow
def test_what_only_rounds_otherwise_may_change_when_a_run_goes_on(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Memory ran out: smaller micro-batches, recomputation, DeepSpeed. The updates stay those of the run."""
    reference, run_dir = reference_run(root)[0], root / "smaller"
    train_here(arguments(root, run_dir, algorithm__steps=4))
    less = {"learner__micro_batch_tokens": 100, "learner__gradient_checkpointing": "true"}
    train_here([*arguments(root, run_dir, learner__kernels="reference", **less), "--resume"])
    assert "but for rounding: learner.gradient_checkpointing: False → True" in capfd.readouterr().out
    ours = load_file(run_dir / "model" / "model.safetensors")
    theirs = load_file(reference / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=0, msg=name)


def test_steps_after_the_checkpoint_do_not_count_twice(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 3, before its first checkpoint: those steps happen again, or, with a smaller algorithm.steps,
    never; alarms of them are raised again, and rows of them are not the run's."""
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    words = arguments(root, tmp_path, data__eval="")
    write_resolved(parse_command(words).config, tmp_path / "config.resolved.json")
    lines = [{"step": step, COUNT: step, "num_tokens": step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (1, 2, 3):
        write_rollouts(tmp_path, step, [])
    with Session(parse_command([*words, "--resume"])) as session:
        assert (session.learner.step, session.alarm.count) == (0, 0)
        assert stored_steps(tmp_path) == []
