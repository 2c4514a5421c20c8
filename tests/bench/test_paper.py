"""bench.paper: its arms resolve at the paper's scale, its plan, its search, its page, and one real tiny arm."""

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.choose_explorer import Drawn
from bench.paper.__main__ import choose, commands, main, plan
from bench.paper.data import choose_subset, write_splits
from bench.paper.experiments import ARMS, EXPERIMENTS, find
from bench.paper.measures import count, measure_other, premise
from bench.paper.models import LlamaRecipe, build_llama
from bench.paper.page import verdict_lines, write_page
from bench.paper.results import by_arm, compare, results, size_results, summarise, verdict_of
from bench.paper.runs import Finished, Job, Runner
from bench.paper.scale import CONFIGS, PRESETS, Scale, equal_switch, paper, schedule
from bench.paper_reward import countdown
from core.configfile import parse_command
from trainer.pretrain import Recipe, Shape, make_family

KS = tuple(2**power for power in range(7))


def paper_scale():
    return paper((), models=Path("models"), data=Path("data"), gpus=8)


def test_every_arm_of_an_experiment_exists_and_is_used():
    used = {name for experiment in EXPERIMENTS for name in experiment.arms}
    assert used == ARMS.keys()
    assert {arm.setting for arm in ARMS.values()} == PRESETS.keys()


@pytest.mark.parametrize("name", ARMS)
def test_paper_scale_commands_are_configurations_that_run(name):
    job = paper_scale().job(ARMS[name], 3, {})
    config = parse_command([*job.arguments, "run.seed=3"]).config
    preset = parse_command([str(CONFIGS / PRESETS[ARMS[name].setting])]).config
    assert config.learner.learning_rate == preset.learner.learning_rate == 1e-6
    assert config.algorithm.steps == 16
    assert not re.search(r"[{}]", " ".join(job.arguments))


def test_paper_scale_keeps_the_papers_proportions():
    scale = paper_scale()

    def algorithm(name):
        return parse_command(scale.job(ARMS[name], 0, {}).arguments).config.algorithm

    assert [algorithm(name).anneal_steps for name in ("grpo", "s2l", "short", "abrupt")] == [0, 8, 5, 8]
    assert algorithm("small_only").schedule == "constant"
    assert algorithm("grpo_more").prompts_per_step * 16 == 1024 * 18  # rescue makes 2 more per prompt


def test_dry_run_prints_torchrun_commands(capsys):
    assert main(["--scale", "paper", "--dry-run", "--only", "fig6", "--gpus", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("# ")[2] for line in lines] == ["s2l", "abrupt", "abrupt_equal"]
    assert all(line.startswith("torchrun --nproc-per-node=4 trainer/main.py ") for line in lines)


def test_unknown_experiments_and_missing_results_are_refused(tmp_path, capsys):
    assert main(["--only", "fig9"]) == 2
    assert "use one of table1" in capsys.readouterr().err
    assert main(["--page", "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_an_abrupt_switch_of_equal_samples():
    quotas = [-(-8 * (24 - step) // 23) for step in range(1, 25)]
    assert equal_switch(48, 8) == round(sum(quotas) / 8) == 13
    assert schedule(16, 16) == {"half": "8", "short": "5", "equal": "4"}


def plain_scale():
    base = {setting: ("algorithm.steps=4",) for setting in PRESETS}
    values = {setting: schedule(16, 8) | {"learner": "l", "filtered": "f", "more_prompts": ""} for setting in PRESETS}
    return Scale("tiny", 4, base, values, ("evaluation.problems=8",), ("1e-4", "2e-4"))


def test_main_arms_come_first_and_seeds_are_whole():
    jobs = plan(plain_scale(), find(["fig6", "table1"]), {"grpo": "3e-4"}, 2, 1)
    names = [(job.arm, job.seed) for job in jobs]
    mains = [name for name in names if ARMS[name[0]].main]
    assert names[: len(mains)] == mains
    assert [seed for _, seed in mains] == sorted(seed for _, seed in mains)
    assert {seed for name, seed in names if not ARMS[name].main} == {0}
    assert "learner.learning_rate=3e-4" in next(job for job in jobs if job.arm == "grpo").arguments
    assert not any("learning_rate" in word for job in jobs if job.arm == "s2l" for word in job.arguments)


def test_the_search_gives_both_methods_the_same_budget_and_picks_the_best():
    class Recorded:
        def run(self, jobs):
            return [finished(job, [0.3, 0.4 + 0.1 * ("2e-4" in job.arm)]) for job in jobs]

    searches = plain_scale().searches(2)
    assert len({tuple(len(jobs) for jobs in rates.values()) for rates in searches.values()}) == 1
    assert all(job.seed >= 1000 for rates in searches.values() for jobs in rates.values() for job in jobs)
    tuned, seen = choose(plain_scale(), Recorded(), {"grpo", "s2l"}, 2)
    assert tuned == {"grpo": "2e-4", "s2l": "2e-4"}
    assert seen["grpo"] == {"1e-4": [0.4, 0.4], "2e-4": [0.5, 0.5]}
    assert len(commands(plain_scale(), find(["fig6"]), 1, 1)) == 8 + 3


def finished(job, accuracy, explorer_rows=0):
    training = [
        {"step": step, "explorer/rows": explorer_rows, "explorer/length": 10.0, "learner/rows": 8 - explorer_rows,
         "learner/length": 20.0, "step_time": 1.0, "kl": 0.5, "groups/all_fail": 0.25, "frac_reward_zero_std": 0.3,
         "explorer/ess": 0.4}
        for step in range(1, 5)
    ]  # fmt: skip
    places = np.linspace(0, 4, len(accuracy)).round().astype(int).tolist()
    evaluations = [
        {"step": place, "eval/pass@1": one, "eval/pass@8": min(1.0, 1.5 * one)} for place, one in zip(places, accuracy)
    ]
    made = {"explorer": 4 * explorer_rows, "learner": 32 - 4 * explorer_rows}
    return Finished(job, "k", evaluations, training, made, 9.0, "abc", Path("model"))


def test_recorded_runs_rates_and_models_are_taken_and_only_the_rest_is_run(tmp_path, monkeypatch):
    asked = []

    class Recorded:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def run(self, jobs):
            asked.extend(jobs)
            return [finished(job, [0.2, 0.5]) for job in jobs]

    known = [row(arm, seed, [0.2, 0.4]) for arm in ("s2l_beside", "grpo_beside") for seed in (0, 1)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in known))
    facts = {"scale": "tiny", "steps": 4, "tuned": {"s2l": "2e-4"}, "search": {}, "models": {"kept": 1}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    monkeypatch.setattr("bench.paper.__main__.Runner", Recorded)
    monkeypatch.setattr("bench.paper.__main__.tiny", lambda work: plain_scale())
    monkeypatch.setattr("bench.paper.__main__.parameters_of", lambda scale, arm: {"learner": 100, "explorer": 10})
    monkeypatch.setattr("bench.paper.__main__.write_page", lambda out, rows, facts: out)
    assert main(["--recorded", "--only", "driver", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert [(job.arm, job.seed) for job in asked] == [
        (arm, seed) for seed in (0, 1) for arm in ("driver_ess", "driver_zero")
    ]
    assert all("learner.learning_rate=2e-4" in job.arguments for job in asked)
    assert json.loads((tmp_path / "facts.json").read_text())["models"] == {"kept": 1}
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert [one for one in rows if "driver" not in one["arm"]] == known


def row(arm, seed, accuracy, explorer_rows=0, other=None):
    return summarise(
        finished(Job(arm, seed, ("a.b=1",)), accuracy, explorer_rows), {"learner": 100, "explorer": 10}, other
    )


def test_a_row_counts_flops():
    found = row("s2l", 0, [0.2, 0.3, 0.5], explorer_rows=4)
    # Per step 40 explorer and 80 learner tokens.
    assert found["rollout_flops"] == 4 * (2 * 10 * 40 + 2 * 100 * 80)
    assert found["training_flops"] == 4 * 10 * 100 * 120
    assert found["spent"] == [0.0, 2 * (16_800 + 120_000), 4 * (16_800 + 120_000)]
    assert found["means"]["kl"] == 0.5


def test_statistics_of_runs_become_verdicts():
    rows = by_arm(
        [row("grpo", seed, [0.3, 0.4, 0.50 + seed / 1000]) for seed in range(4)]
        + [row("s2l", seed, [0.3, 0.35, 0.45 + seed / 500], 4) for seed in range(4)]
    )
    found = {(one.label, one.measured): one for one in results(find(["table1"])[0], rows)}
    main_one = found["S2L-PO − GRPO", "final pass@1"]
    assert main_one.verdict == "not reproduced"
    assert main_one.difference.mean == pytest.approx(-4.85)
    assert found["S2L-PO, other explorer size − GRPO", "final pass@1"].verdict == "undecided"
    assert verdict_of(list(found.values())) == "not reproduced"
    matched = compare(rows, find(["compute"])[0].comparisons[0])
    # S2L-PO's completions are shorter here: GRPO is read off its curve where S2L-PO's FLOPs end, below its last value.
    assert main_one.difference.mean < 0 < matched.mean


def size(name, self_bleu):
    names = ("edit_diversity", "unique_answer_ratio", "pass@64")
    gaps = {f"{metric} {kind}": [0.1, 0.01] for metric in names for kind in ("difference", "step")}
    base = {f"pass@{k}": 0.5 for k in KS} | {"edit_diversity": 0.3, "unique_answer_ratio": 0.8, "self_bleu": 0.6}
    return {
        "model": name,
        "parameters": 9,
        **base,
        **gaps,
        "self_bleu difference": [self_bleu, 0.01],
        "self_bleu step": [0, 0],
    }


def test_diversity_by_size_has_verdicts():
    found = size_results([size("learner", 0.0), size("explorer", -0.1), size("smaller explorer", 0.1)])
    assert [one.verdict for one in found[:4]] == ["reproduced"] * 4
    assert found[4].verdict == "not reproduced"
    assert [(one.label, one.rule) for one in found[8:]] == [("smaller explorer − explorer", None)] * 3


def test_out_of_domain_accuracy_at_the_floor_decides_nothing():
    def verdict(other):
        rows = by_arm([row(arm, seed, [0.3, 0.4, 0.5], other=other) for arm in ("grpo", "s2l") for seed in range(3)])
        return results(find(["table2"])[0], rows)[0].verdict

    assert (verdict(0.5), verdict(0.02)) == ("reproduced", "undecided")


def test_the_page_is_one_file_that_needs_nothing(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        row(arm, seed, [0.3, 0.4, 0.5 + generator.normal() / 50], 4 * (arm != "grpo"), other=0.2)
        for arm in ARMS
        for seed in range(3)
    ]
    hard = {"prompts": 9, "all_fail": 0.5, "learner pass@8": 0.5, "explorer pass@8": 0.6, "difference": [0.1, 0.02]}
    spread = {"edit_diversity": 0.3, "right": 0.3}
    models = {
        "sizes": [size("learner", 0.0), size("explorer", -0.1)],
        "filter": {"learner": spread, "explorer": spread, "filtered": spread},
        "hard": hard,
    }
    search = {"grpo": {"1e-4": [0.4, 0.5], "2e-4": [0.3, 0.2]}}
    facts = {"scale": "tiny", "steps": 4, "tuned": {"grpo": "1e-4"}, "search": search, "models": models}
    page = write_page(tmp_path, rows, facts).read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|\$[a-z]", page)
    assert all(f'id="{experiment.key}"' in page for experiment in EXPERIMENTS)
    pictures = sorted(tmp_path.glob("*.png"))
    assert page.count("data:image/png") == len(pictures) >= 14
    assert verdict_lines(rows, facts)[0].startswith("Table 1: S2L-PO against GRPO: ")
    assert write_page(tmp_path, [], facts | {"models": {}, "search": {}}).exists()


def test_filtering_reaches_the_learners_diversity():
    generator = np.random.default_rng(0)
    texts = [" ".join(map(str, generator.integers(0, 3, 6))) for _ in range(20)] + ["1 1 1 1 1 1"] * 4
    target = ["2 2 2 2 2 2"] * 7 + ["2 2 2 2 2 1"]
    chosen = choose_subset(texts, target, generator)
    assert len(set(chosen)) == 8
    assert len({texts[place] for place in chosen}) < len({texts[place] for place in range(8)})


def test_splits_share_no_problem(tmp_path):
    import pyarrow.parquet as pq

    texts = {name: pq.read_table(file)["prompt"].to_pylist() for name, file in write_splits(tmp_path).items()}
    assert {name: len(of) for name, of in texts.items()} == {
        "train": 1009, "validation": 256, "test": 480, "other": 234
    }  # fmt: skip
    known = {
        (tuple(sorted(text.split()[:4])), text.split()[5]) for name in ("train", "validation") for text in texts[name]
    }
    held = {(tuple(sorted(text.split()[:4])), text.split()[5]) for name in ("test", "other") for text in texts[name]}
    assert not known & held


def test_reward_is_countdowns():
    assert countdown(["8 5 9 7 = 15 :"] * 2, ["9 - 5 = 4", "8 + 9 = 17 , 17 - 7 = 10 , 10 + 5 = 15"]) == [0.0, 1.0]


@pytest.mark.slow
def test_one_real_arm(tmp_path):
    """Two steps of the abrupt switch, with models of a second's training and problems of a parquet file."""
    small = Shape(layers=1, hidden=32, heads=1, intermediate=32, init_std=0.1)
    recipe = Recipe(learner=small, explorer=small, learner_steps=2, explorer_steps=2, threads=1)
    make_family(tmp_path / "family", 0, recipe, lambda text, fraction: None)
    files = write_splits(tmp_path / "data")
    base = (
        "algorithm.steps=2", "algorithm.prompts_per_step=4", "algorithm.mini_batch_prompts=2", "algorithm.group_size=4",
        f"learner.model={tmp_path}/family/learner",
        f"explorer.model={tmp_path}/family/explorer", f"data.train={files['train']}", f"data.eval={files['test']}",
        "evaluation.problems=4", "evaluation.every=1", "reward.function=bench.paper_reward:countdown",
    )  # fmt: skip
    scale = plain_scale()._replace(base={"main": base}, values={"main": schedule(2, 4)})
    with Runner(tmp_path / "work", jobs=1, say=lambda line: None) as runner:
        run = runner.run([scale.job(ARMS["abrupt"], 0, {"s2l": "1e-3"})])[0]
    found = summarise(run, {"learner": 1000, "explorer": 500})
    assert [line["step"] for line in found["evaluations"]] == [0, 1, 2]
    assert found["produced"] == {"explorer": 16, "learner": 16}
    assert found["rollout_flops"] > 0
    assert (run.model / "config.json").exists()
    assert msgspec.json.decode((run.model.parent / "result.json").read_bytes())["arm"] == "abrupt"


def test_what_is_measured_before_training(tmp_path):
    config = LlamaRecipe(explorer=Shape(layers=1, hidden=32, heads=1, intermediate=16, init_std=0.1))
    model = build_llama(config.explorer, config)
    model.save_pretrained(tmp_path)
    assert count(tmp_path) == model.num_parameters()
    run = finished(Job("s2l", 0, ()), [0.3, 0.4])
    assert measure_other(paper_scale(), run) is None
    hard = premise(Drawn([], [], [0, 0, 32, 16], 0.0), Drawn([], [], [16, 0, 32, 16], 0.0))
    assert hard["prompts"] == 4
    assert hard["all_fail"] == pytest.approx(0.5, abs=0.01)
    assert hard["learner pass@8"] == pytest.approx(0.5, abs=0.01)
    assert hard["difference"][0] == pytest.approx(0.25, abs=0.01)
