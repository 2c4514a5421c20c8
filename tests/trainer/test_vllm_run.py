"""A whole run with vLLM behind the explorer and the learner's rollouts, one worker killed on the way."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, train_here

from trainer.session import Session


@pytest.mark.slow
def test_vllm_serves_both_roles_and_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    killed = []

    def kill_the_learner_rollouts(session: Session, step: int) -> None:
        workers = session.stream.rollouts.pool.counters()["workers"].values()
        (pid,) = [worker["pid"] for worker in workers if worker["role"] == "learner" and worker["state"] == "ready"]
        if step == 1:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    words = arguments(
        tmp_path, tmp_path / "run", rollout__engine="vllm", algorithm__steps=3, algorithm__schedule="constant",
        algorithm__alpha=0.5, rollout__lease_prompts=8, data__eval="",
    )  # fmt: skip
    run_dir = train_here(words, on_step=kill_the_learner_rollouts)
    assert killed
    assert run_parts.trained_keys(run_dir) == Counter(
        (step, slot, sample, source)
        for step in range(1, 4)
        for slot in range(8)
        for sample in range(2)
        for source in ("explorer", "learner")
    )
    assert run_parts.ledger(run_dir)["conserved"]
    for line in run_parts.training_lines(run_dir):
        # The engine's log-probs are the trainer's: of the weights of the step before, at the sampling temperature.
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["off_policy/staleness_max"] == 0
