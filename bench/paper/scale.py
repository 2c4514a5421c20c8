"""The two scales of the evidence: what each setting's runs are started with, and what the arms' braces stand for."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.paper.data import data_folder, filtered_store, hard_problems, write_splits
from bench.paper.experiments import ARMS, Arm
from bench.paper.models import embedded, llama_family, smaller_explorer
from bench.paper.runs import Job
from core.anneal import explorer_quota

TINY_RATES = ("2e-4", "3e-4", "4.5e-4")
SEARCHES = ("grpo", "grpo_hot", "s2l", "s2l_hot")
SEARCH_SEED = 1000  # seeds of the search, which no other run has
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = {
    "main": "qwen3_1.7b_to_8b.toml",
    "other_size": "qwen3_4b_to_8b.toml",
    "family2": "internlm2.5_1.8b_to_7b.toml",
    "hard": "qwen3_1.7b_to_8b.toml",
}


class Scale(NamedTuple):
    """How arms become runs. `base`: the arguments of each setting; `values`: what braces stand for, by setting.

    Example: scale.job(ARMS["grpo"], 0, {"grpo": "3e-4"})
    """

    name: str
    steps: int
    base: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Mapping[str, str]]
    validation: tuple[str, ...] = ()  # the search's problems; no search without
    rates: tuple[str, ...] = ()
    launcher: tuple[str, ...] = (sys.executable,)

    def job(self, arm: Arm, seed: int, tuned: Mapping[str, str]) -> Job:
        """The run of an arm and a seed, with the learning rate that its search chose."""
        filled = [word for text in arm.overrides for word in text.format(**self.values[arm.setting]).split()]
        rate = [f"learner.learning_rate={tuned[arm.tuned]}"] if arm.tuned in tuned else []
        return Job(arm.name, seed, (*self.base[arm.setting], *filled, *rate))

    def searches(self, seeds: int) -> dict[str, dict[str, list[Job]]]:
        """Per search and learning rate its runs: as many for GRPO as for S2L-PO, on the validation problems."""
        found: dict[str, dict[str, list[Job]]] = {}
        for name in SEARCHES if self.validation else ():
            for rate in self.rates:
                jobs = [self.job(ARMS[name], SEARCH_SEED + seed, {name: rate}) for seed in range(seeds)]
                found.setdefault(name, {})[rate] = [
                    Job(f"search {name} {rate}", job.seed, (*job.arguments, *self.validation)) for job in jobs
                ]
        return found


def equal_switch(steps: int, group_size: int) -> int:
    """The step of an abrupt switch after which the explorer has made as many completions as under linear annealing."""
    owed = sum(explorer_quota(step, group_size=group_size, anneal_steps=steps // 2) for step in range(1, steps + 1))
    return round(owed / group_size)


def schedule(steps: int, group_size: int) -> dict[str, str]:
    """T_mix in the paper's proportions: 8 and 5 of 16 steps, and the abrupt switch of equal samples."""
    return {
        "half": str(steps // 2),
        "short": str(round(steps * 5 / 16)),
        "equal": str(equal_switch(steps, group_size)),
    }


def tiny(work: Path, *, steps: int = 48) -> Scale:
    """The embedded pair on two cores: 48 steps of 32 prompts x 8 completions. Models and data are made in `work`."""
    work = work.resolve()
    family, second = embedded(), llama_family(work / "models")
    models = {
        "main": family,
        "other_size": family._replace(explorer=smaller_explorer(work / "models")),
        "family2": second,
        "hard": family,
    }
    data = data_folder(work)
    files = write_splits(data)
    files |= hard_problems(data, files, family.learner)
    common = (
        str(CONFIGS / "tiny.toml"), f"algorithm.steps={steps}", f"evaluation.every={max(1, steps // 4)}",
        f"evaluation.diversity_every={max(1, steps // 4)}", f"checkpoint.every={steps}",
        "reward.function=bench.paper_reward:countdown", "stream.liveness_s=60",
    )  # fmt: skip
    base = {}
    for name, pair in models.items():
        train, test, limit = ("hard_train", "hard_test", 0) if name == "hard" else ("train", "test", 320)
        base[name] = (
            *common, f"learner.model={pair.learner}", f"explorer.model={pair.explorer}", f"data.train={files[train]}",
            f"data.eval={files[test]}", f"evaluation.problems={limit}",
        )  # fmt: skip
    shared = schedule(steps, 8) | {
        # Rescue with 2 spare completions makes 10 of them per prompt: 40 prompts of 8 make as many.
        "more_prompts": "algorithm.prompts_per_step=40 algorithm.mini_batch_prompts=20",
        "filtered": str(data / "filtered"),
    }
    filtered_store(Path(shared["filtered"]), (*base["main"], f"algorithm.anneal_steps={shared['half']}"))
    values = {name: shared | {"learner": str(pair.learner)} for name, pair in models.items()}
    validation = (f"data.eval={files['validation']}", "evaluation.problems=0", "evaluation.every=0")
    return Scale("tiny", steps, base, values, validation, TINY_RATES)


def paper(options: Sequence[str], *, models: Path, data: Path, gpus: int) -> Scale:
    """The paper's models and hyper-parameters (Appendix C, the same for all arms: no search), on `gpus` GPUs.

    `models` and `data` hold what the presets name; `options` are further overrides of every run. Table 4's recorded
    completions and the hard prompts are expected at `data`/filtered and `data`/hard_train.parquet, hard_test.parquet.
    """
    names = {
        "main": ("Qwen3-8B-Base", "Qwen3-1.7B-Base"),
        "other_size": ("Qwen3-8B-Base", "Qwen3-4B-Base"),
        "family2": ("internlm2_5-7b", "internlm2_5-1_8b"),
        "hard": ("Qwen3-8B-Base", "Qwen3-1.7B-Base"),
    }
    base, values = {}, {}
    for name, (learner, explorer) in names.items():
        train, test = ("hard_train", "hard_test") if name == "hard" else ("dapo-math-17k", "math-500")
        base[name] = (
            str(CONFIGS / PRESETS[name]), f"learner.model={models / learner}", f"explorer.model={models / explorer}",
            f"data.train={data / train}.parquet", f"data.eval={data / test}.parquet", "evaluation.every=4", *options,
        )  # fmt: skip
        values[name] = schedule(16, 16) | {
            "learner": str(models / learner),
            "filtered": str(data / "filtered"),
            "more_prompts": "algorithm.prompts_per_step=1152",
        }
    return Scale("paper", 16, base, values, launcher=("torchrun", f"--nproc-per-node={gpus}"))
