"""TRL's GRPOTrainer beside us: `python -m bench.trl [--steps N] [--rounds N] [--only CASE …]`.

Plain GRPO on the embedded family's learner with TRL's default loss: the same prompts in the same order, group size,
lengths, optimizer, updates and precision; every completion comes from the learner, on both sides. TRL runs in an
environment of its own, with this environment's torch and transformers, made under the cache folder the first time
(`--pip`: options of pip install, such as where CPU builds of torch are). It generates a whole step in one batch with
transformers' `generate` (vLLM's server needs a GPU); its cases differ in how they use two cores, and ours are compared
to the quickest. Every round runs all cases in turn. `cpu_s` is the processor time of all processes in a step: unlike
seconds, it does not depend on who else uses the machine. Rows go to bench/results/trl.jsonl.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.measure import record, table
from bench.trl_rival import MARK
from bench.watched import REPOSITORY, WARM_STEPS, run_watched
from core.config import Config
from core.configfile import load_config
from core.metrics import FILE_NAME, is_evaluation, read_metrics
from core.schema import Prompt
from trainer.console import Console
from trainer.family import default_cache_root
from trainer.materials import load_materials
from trainer.world import World

TRL = "1.16.0"  # the newest that takes this project's transformers
# What each case adds: settings of ours, and for TRL threads, ranks and GRPOConfig's own.
OURS: dict[str, dict[str, Any]] = {
    "ours, 1 rank, lookahead 0": {"words": ["algorithm.lookahead=0"]},
    "ours, 1 rank, lookahead 1": {"words": ["algorithm.lookahead=1"]},
    "ours, 2 ranks, lookahead 0": {
        "words": ["algorithm.lookahead=0", "rollout.processes=2", "rollout.lease_prompts=16"], "ranks": 2
    },
    "ours, 2 ranks, lookahead 1": {"words": ["algorithm.lookahead=1"], "ranks": 2},
    # What the last one owes to computing less: TRL computes every row, and each row's prompt.
    "the same, every row": {"words": ["algorithm.lookahead=1", "learner.skip_zero_gradient=false"], "ranks": 2},
    "the same, every row and prompt": {
        "words": ["algorithm.lookahead=1", "learner.skip_zero_gradient=false", "learner.share_prompts=false"],
        "ranks": 2,
    },
}  # fmt: skip
RIVALS: dict[str, dict[str, Any]] = {
    "TRL, 1 thread": {"threads": 1},
    "TRL, 2 threads": {"threads": 2},
    "TRL, 2 ranks": {"threads": 1, "ranks": 2},
    "TRL, continuous batching": {"threads": 2, "arguments": {"use_transformers_continuous_batching": True}},
}
USUAL = [name for name in (*OURS, *RIVALS) if name != "TRL, continuous batching"]  # which takes 20 s a step on a CPU
# At lookahead 0 the engine's own log-probs are π_old's, so that nothing needs scoring; TRL's generate gives none.
SETTINGS = ["algorithm.anneal_steps=0", "data.eval=", "evaluation.diversity_every=0", "loss.kl_coef=0",
            "correction.learner.anchor=sampler", "correction.learner.weight=none",
            "learner.micro_batch_tokens=2048"]  # fmt: skip
COLUMNS = ["case", "round", "samples_per_s", "tokens_per_s", "step_s", "generate_s", "score_s", "train_s", "wait_s",
           "cpu_s", "mean_length", "reward", "loadavg"]  # fmt: skip


def workload(steps: int, folder: Path) -> Config:
    """Plain GRPO and nothing but training: no evaluation, no diversity, no checkpoint but the last."""
    return load_config(
        overrides=[*SETTINGS, f"run.dir={folder}", f"algorithm.steps={steps}", f"checkpoint.every={steps}"]
    )


def grpo_arguments(config: Config, folder: Path, *, ranks: int = 1) -> dict[str, Any]:
    """GRPOConfig's arguments that mean what `config` means; a rank's batch is its part of one optimizer update."""
    algorithm, learner, rollout, loss = config.algorithm, config.learner, config.rollout, config.loss
    mini_batches = algorithm.prompts_per_step // algorithm.mini_batch_prompts
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "seed": config.run.seed, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": mini_batches, "shuffle_dataset": False,
        "max_steps": algorithm.steps * mini_batches, "per_device_train_batch_size":
            algorithm.mini_batch_prompts * algorithm.group_size // ranks,
        "steps_per_generation": mini_batches, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        "num_generations": algorithm.group_size, "num_iterations": algorithm.epochs,
        "max_completion_length": rollout.max_response_tokens, "temperature": rollout.temperature,
        "top_p": rollout.top_p, "top_k": rollout.top_k, "model_init_kwargs": {"dtype": learner.dtype},
        "learning_rate": learner.learning_rate, "adam_beta1": learner.adam_beta1, "adam_beta2": learner.adam_beta2,
        "weight_decay": learner.weight_decay, "max_grad_norm": learner.grad_clip,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": learner.warmup_updates,
        "beta": loss.kl_coef, "epsilon": loss.clip_low, "epsilon_high": loss.clip_high, "delta": loss.dual_clip,
        "loss_type": "dapo", "scale_rewards": "group", "importance_sampling_level": "token",
    }  # fmt: skip


def rival_environment(options: Sequence[str]) -> Path:
    """Python of TRL's environment; made where it is not there."""
    wanted = [f"{name}=={version(name)}" for name in ("torch", "transformers")] + [f"trl=={TRL}"]
    name = hashlib.sha256(" ".join([sys.version, *wanted]).encode()).hexdigest()[:16]
    folder = default_cache_root() / f"trl-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {' '.join(wanted)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, *wanted], check=True)
        (folder / "complete").touch()
    return python


def run_ours(name: str, config: Config, folder: Path) -> dict[str, Any]:
    """One run of the trainer: ranks and rollout workers, a thread each."""
    case, steps = OURS[name], config.algorithm.steps
    words = [*SETTINGS, f"run.dir={folder / 'run'}", f"algorithm.steps={steps}", f"checkpoint.every={steps}"]
    command = [sys.executable, *_launcher(case.get("ranks", 1)), str(REPOSITORY / "trainer" / "main.py"), *words]

    def steps_done() -> int:
        """Lines, unread: reading them would take from the run's processors. There are no evaluations."""
        found = folder / "run" / FILE_NAME
        return found.read_bytes().count(b"\n") if found.exists() else 0

    cost = run_watched([*command, *case["words"]], 1, folder / "log", steps_done, steps)
    lines = [line for line in read_metrics(folder / "run") if not is_evaluation(line)]
    return summary_of_ours(lines, config, alone="algorithm.lookahead=0" in case["words"]) | {"cpu_s": cost.cpu_s}


def summary_of_ours(lines: list[dict[str, Any]], config: Config, *, alone: bool) -> dict[str, Any]:
    """Means over the steps after the first ones. `alone`: nothing overlaps, so that waiting is generation."""
    steady = lines[WARM_STEPS:]

    def mean(key: str) -> float:
        return statistics.mean(line[key] for line in steady)

    return _speed(config, mean("step_time"), mean("completions/mean_length")) | {
        "generate_s": mean("time/wait_for_batch") if alone else None, "score_s": mean("time/score"),
        "train_s": mean("time/train"), "wait_s": mean("time/wait_for_batch"), "reward": mean("reward"),
    }  # fmt: skip


def run_rival(
    name: str, config: Config, prompts: list[Prompt], model: Path, python: Path, folder: Path
) -> dict[str, Any]:
    """One run of TRL."""
    case = RIVALS[name]
    ranks = case.get("ranks", 1)
    job = folder / "job.json"
    job.write_text(json.dumps({
        "arguments": grpo_arguments(config, folder / "trl", ranks=ranks) | case.get("arguments", {}),
        "model": str(model), "threads": case["threads"],
        "prompts": [{"text": prompt.text, "ids": list(prompt.token_ids)} for prompt in prompts],
    }), "utf-8")  # fmt: skip
    command = [str(python), *_launcher(ranks), "-m", "bench.trl_rival", str(job)]
    log = folder / "log"
    cost = run_watched(
        command, case["threads"], log, lambda: log.read_text("utf-8").count(MARK), config.algorithm.steps
    )
    return summary_of_rival(log.read_text("utf-8"), config) | {"cpu_s": cost.cpu_s}


def summary_of_rival(output: str, config: Config) -> dict[str, Any]:
    """Means over the same steps, from the lines that bench.trl_rival prints, one a step."""
    lines = [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
    if len(lines) != config.algorithm.steps:
        raise ValueError(f"TRL logged {len(lines)} of {config.algorithm.steps} steps: {output[-2000:]}")
    steady = lines[WARM_STEPS - 1 :]

    def mean(key: str) -> float:
        return statistics.mean(b[key] - a[key] for a, b in pairwise(steady))

    step_s, made_s = mean("clock_s"), mean("make_batch_s")
    generated_s, rewarded_s = mean("generate_s"), mean("reward_s")
    length = statistics.mean(line["completions/mean_length"] for line in steady[1:])
    return _speed(config, step_s, length) | {
        "generate_s": generated_s + rewarded_s, "score_s": made_s - generated_s - rewarded_s,
        "train_s": step_s - made_s, "wait_s": made_s, "reward": statistics.mean(line["reward"] for line in steady[1:]),
    }  # fmt: skip


def _speed(config: Config, step_s: float, mean_length: float) -> dict[str, Any]:
    samples = config.algorithm.prompts_per_step * config.algorithm.group_size
    per_s = samples / step_s
    return {"step_s": step_s, "samples_per_s": per_s, "tokens_per_s": per_s * mean_length, "mean_length": mean_length}


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Each of our cases against the TRL case with the most samples a second, and the thriftiest: medians of rounds."""

    def medians(key: str, cases: Iterable[str]) -> dict[str, float]:
        found = {name: [row[key] for row in rows if row["case"] == name] for name in cases}
        return {name: statistics.median(values) for name, values in found.items() if values}

    speed, work = medians("samples_per_s", RIVALS), medians("cpu_s", RIVALS)
    if not speed:
        return []
    quickest, thriftiest = max(speed, key=speed.__getitem__), min(work, key=work.__getitem__)
    our_work = medians("cpu_s", OURS)
    return [
        f"{name}: {value / speed[quickest]:.2f}x the samples/s of {quickest}; "
        f"{work[thriftiest] / our_work[name]:.2f}x fewer processor seconds than {thriftiest}"
        for name, value in medians("samples_per_s", OURS).items()
    ]


def _launcher(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *RIVALS], default=USUAL)
    parser.add_argument("--pip", default="", help="options of pip install for TRL's environment")
    options = parser.parse_args()
    python = rival_environment(shlex.split(options.pip))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="s2l-") as place:
        config = workload(options.steps, Path(place) / "run")
        materials = load_materials(config, World(rank=0, size=1, device=torch.device("cpu")), Console(config))
        prompts = [p for step in range(1, options.steps + 1) for p in materials.demand.prompts_at(step)]
        for number in range(options.rounds):
            for name in options.only:
                folder = Path(place) / f"{number}-{len(rows)}"
                folder.mkdir()
                if name in OURS:
                    row = run_ours(name, config, folder)
                else:
                    row = run_rival(name, config, prompts, materials.learner_dir, python, folder)
                rows.append({"case": name, "round": number, "steps": options.steps, **row})
                rows[-1]["loadavg"] = os.getloadavg()[0]
                print(table(rows[-1:], COLUMNS), flush=True)
    print(table(rows, COLUMNS))
    print("\n".join(ratios(rows)))
    print(f"recorded in {record('trl', [row | {'trl': TRL} for row in rows])}")


if __name__ == "__main__":
    main()
