"""The embedded family, the learner's rollouts in a process of their own: lookahead 1 against lookahead 0.

Plain GRPO, so that one process generates and one trains from the first step to the last. Two cores are used fully where
both cost the same, which they do not by themselves. What balances them: log μ of the engine is the anchor (no π_old
pass), no KL penalty (no reference pass), prompts computed once, and leases of LEASE_PROMPTS prompts, whose smaller
batches generate less efficiently. With several updates a step, lookahead 0 overlaps too: an update begins when its
prompts are complete. A round is one seed of prompts and sampling.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.watched import REPOSITORY, WARM_STEPS, run_watched
from core.metrics import FILE_NAME, is_evaluation, read_metrics
from trainer.family import default_cache_root, embedded_family

LEASE_PROMPTS = 2
SETTINGS = ["algorithm.anneal_steps=0", "data.eval=", "evaluation.diversity_every=0", "loss.kl_coef=0",
            "correction.learner.anchor=sampler", "correction.learner.weight=none",
            f"rollout.lease_prompts={LEASE_PROMPTS}", "algorithm.prompts_per_step=32"]  # fmt: skip
UPDATES = (2, 1)  # of a step
QUARTERS = 4


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """For each number of updates a step, rounds of both lookaheads in turn, then what they say together."""
    learner = embedded_family(default_cache_root(), 0).learner
    found = []
    for updates in UPDATES:
        rows = [_run(updates, lookahead, seed, steps, learner) for seed in range(rounds) for lookahead in (0, 1)]
        found += [*rows, summary(rows)]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Lookahead 1 over 0: medians of the rounds' ratios, and its reward minus the other's, quarter by quarter.

    `cpu_bound_ratio` is what two cores of their own would give: both costs in turn over the larger one. The noise of a
    reward difference is the standard error over the seeds.
    """
    pairs = list(zip(*([row for row in rows if row["lookahead"] == lookahead] for lookahead in (0, 1))))
    differences = [[b - a for a, b in zip(zero["rewards"], one["rewards"])] for zero, one in pairs]
    by_quarter = list(zip(*differences))
    return {
        "case": "real, 1 over 0", "updates": rows[0]["updates"], "rounds": len(pairs),
        "speed_up": statistics.median(zero["step_s"] / one["step_s"] for zero, one in pairs),
        "speed_ups": [zero["step_s"] / one["step_s"] for zero, one in pairs],
        "cpu_bound_ratio": statistics.median(
            (one["train_cpu_s"] + one["generate_cpu_s"]) / max(one["train_cpu_s"], one["generate_cpu_s"])
            for _, one in pairs
        ),
        "reward_differences": [statistics.mean(quarter) for quarter in by_quarter],
        "reward_noise": [
            statistics.stdev(quarter) / len(quarter) ** 0.5 if len(quarter) > 1 else None for quarter in by_quarter
        ],
        "loadavg": os.getloadavg()[0],
    }  # fmt: skip


def _run(updates: int, lookahead: int, seed: int, steps: int, learner: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="s2l-") as folder:
        run = Path(folder) / "run"
        words = [*SETTINGS, f"run.dir={run}", f"run.seed={seed}", f"learner.model={learner}"]
        words += [f"algorithm.steps={steps}", f"checkpoint.every={steps}", f"algorithm.lookahead={lookahead}"]
        words.append(f"algorithm.mini_batch_prompts={32 // updates}")

        def lines() -> list[dict[str, Any]]:
            found = (run / FILE_NAME).exists()
            return [line for line in read_metrics(run) if not is_evaluation(line)] if found else []

        command = [sys.executable, str(REPOSITORY / "trainer" / "main.py"), *words]
        cost = run_watched(command, 1, Path(folder) / "log", lambda: len(lines()), steps)
        training = lines()
    steady = training[WARM_STEPS:]
    rewards = [line["reward"] for line in training]
    size = len(rewards) // QUARTERS
    return {
        "case": "real", "updates": updates, "lookahead": lookahead, "round": seed, "steps": steps,
        "step_s": statistics.median(line["step_time"] for line in steady),
        "wait_s": statistics.median(line["time/wait_for_batch"] for line in steady),
        "train_s": statistics.median(line["time/train"] for line in steady),
        "train_cpu_s": cost.own_s, "generate_cpu_s": cost.children_s,
        "tokens_per_s": statistics.median(line["tokens_per_second"] for line in steady),
        "mixed_versions": statistics.mean(line["off_policy/mixed_versions"] for line in steady),
        "rewards": [statistics.mean(rewards[i * size : (i + 1) * size]) for i in range(QUARTERS)],
        "loadavg": os.getloadavg()[0],
    }  # fmt: skip
