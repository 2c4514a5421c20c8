"""bench.trl compares like with like, and reads both sides' logs alike. TRL itself is not installed here."""

import json
import statistics
import sys

import pytest

from bench.trl import OURS, RIVALS, grpo_arguments, ratios, summary_of_ours, summary_of_rival, workload
from bench.trl_rival import MARK, countdown
from bench.watched import run_watched

STEPS = 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_sides_take_the_same_updates_on_the_same_samples(tmp_path, ranks):
    config = workload(STEPS, tmp_path)
    arguments = grpo_arguments(config, tmp_path, ranks=ranks)
    algorithm = config.algorithm
    batch = arguments["per_device_train_batch_size"] * ranks
    assert batch == algorithm.mini_batch_prompts * algorithm.group_size
    assert batch * arguments["steps_per_generation"] == algorithm.prompts_per_step * algorithm.group_size
    assert arguments["max_steps"] == algorithm.steps * arguments["steps_per_generation"] * algorithm.epochs
    assert arguments["max_completion_length"] == config.rollout.max_response_tokens
    assert (arguments["learning_rate"], arguments["beta"]) == (config.learner.learning_rate, config.loss.kl_coef)
    assert not arguments["bf16"]
    assert not arguments["gradient_checkpointing"]
    assert config.learner.dtype == arguments["model_init_kwargs"]["dtype"] == "float32"
    assert algorithm.anneal_steps == 0, "every completion is the learner's, as TRL's are"


def test_the_stages_of_trl_add_up_to_its_step(tmp_path):
    config = workload(STEPS, tmp_path)
    lines = [
        {"update": 2 * step, "clock_s": 2.0 * step, "generate_s": 0.5 * step, "reward_s": 0.1 * step,
         "make_batch_s": 0.9 * step, "completions/mean_length": 10.0, "reward": 0.25}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    output = "noise\n" + "\n".join(MARK + json.dumps(line) for line in lines)
    row = summary_of_rival(output, config)
    assert row["step_s"] == pytest.approx(2.0)
    assert row["samples_per_s"] == pytest.approx(128.0)
    assert row["tokens_per_s"] == pytest.approx(1280.0)
    stages = [row[name] for name in ("generate_s", "score_s", "train_s")]
    assert stages == pytest.approx([0.6, 0.3, 1.1])
    with pytest.raises(ValueError, match="logged 5 of 6 steps"):
        summary_of_rival(output.rpartition(MARK)[0], config)


def test_ours_leaves_out_the_first_steps(tmp_path):
    config = workload(STEPS, tmp_path)
    seconds = [9.0, 9.0, 9.0, 1.0, 2.0, 3.0]
    lines = [
        {"step_time": s, "completions/mean_length": 10.0, "time/wait_for_batch": s / 4, "time/score": 0.0,
         "time/train": s / 2, "reward": 0.5}
        for s in seconds
    ]  # fmt: skip
    row = summary_of_ours(lines, config, alone=True)
    assert row["step_s"] == pytest.approx(statistics.mean(seconds[3:]))
    assert row["generate_s"] == pytest.approx(0.5)
    assert summary_of_ours(lines, config, alone=False)["generate_s"] is None, "what overlaps is not seen as a wait"


def test_ratios_are_to_the_best_case_of_trl():
    ours, (slow, quick, *_) = next(iter(OURS)), RIVALS
    rows = [
        {"case": ours, "samples_per_s": 300.0, "cpu_s": 0.5},
        {"case": slow, "samples_per_s": 50.0, "cpu_s": 0.75},
        {"case": quick, "samples_per_s": 100.0, "cpu_s": 1.0},
    ]
    assert ratios(rows) == [f"{ours}: 3.00x the samples/s of {quick}; 1.50x fewer processor seconds than {slow}"]
    assert ratios(rows[:1]) == []


def test_the_reward_of_trl_is_the_task_s():
    prompt = "8 5 9 7 = 15 :"
    good = "9 - 5 = 4 , 8 - 4 = 4 , 7 + 4 = 11"
    assert countdown([prompt, prompt], [good, "8 + 7 = 15 , 9 - 5 = 4 , 15 + 4 = 19"]) == [0.0, 0.0]
    assert countdown([prompt], ["9 + 5 = 14 , 8 - 7 = 1 , 14 + 1 = 15"]) == [1.0]


def test_processor_seconds_of_a_step_are_those_of_all_its_processes(tmp_path):
    """Each step burns 0.1 s in the program and 0.1 s in a child of its own, on whatever machine."""
    burn = "import time\nfor i in range(9):\n t = time.process_time()\n while time.process_time() - t < 0.1: pass\n"
    child = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {burn!r}])\n"
    code = f"{child}{burn} print('x', flush=True)\n"
    log = tmp_path / "log"
    cost = run_watched([sys.executable, "-c", code + "child.wait()"], 1, log, lambda: log.read_text().count("x"), 9)
    assert 0.05 <= cost.own_s < 1.0
    assert cost.own_s <= cost.cpu_s < 2.0
    with pytest.raises(RuntimeError, match="ended with 3"):
        run_watched([sys.executable, "-c", "raise SystemExit(3)"], 1, log, lambda: 0, 9)
