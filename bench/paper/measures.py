"""What is measured of models without training them: diversity and pass@k by size, hard prompts, out of domain."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from bench.choose_explorer import Drawn
from bench.explorer_choice import Counts, difference, fail_share, pass_difference
from bench.paper.data import data_folder, read_prompts, sample
from bench.paper.experiments import Arm
from bench.paper.models import embedded, llama_family, smaller_explorer
from bench.paper.runs import Finished
from bench.paper.scale import Scale
from core.configfile import parse_command
from core.diversity import Sample, group_diversity, pass_at_k
from rollout.torch_weights import weight_files

PROBLEMS, SAMPLES, OTHER_SAMPLES = 256, 64, 8
ROWS, HARD_SAMPLES, GROUP = 16, 32, 8
KS = tuple(2**power for power in range(7))
METRICS = ("self_bleu", "edit_diversity", "unique_answer_ratio")


def parameters_of(scale: Scale, arm: Arm) -> dict[str, int]:
    """Parameters of learner and explorer in an arm's setting."""
    config = parse_command(scale.base[arm.setting]).config
    return {"learner": count(Path(config.learner.model)), "explorer": count(Path(config.explorer.model))}


def count(model_dir: Path) -> int:
    """Parameters in the safetensors files of a model."""
    total = 0
    for file in weight_files(model_dir):
        with safe_open(file, framework="np") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total


def measure_other(scale: Scale, run: Finished) -> float | None:
    """pass@1 of a finished run's model on the problems out of domain; None where the scale has none."""
    file = run.model.parent / "other.json"
    if scale.name != "tiny":
        return None
    if not file.exists():
        config = parse_command(run.job.arguments).config
        prompts = read_prompts(Path(config.data.eval).with_name("other.parquet"), run.model)
        drawn = sample(run.model, prompts, OTHER_SAMPLES, first=run.job.seed * OTHER_SAMPLES)
        file.write_text(json.dumps({"pass@1": sum(drawn.right) / (OTHER_SAMPLES * len(prompts))}))
    return float(json.loads(file.read_text())["pass@1"])


def measure_models(scale: Scale, work: Path) -> dict[str, Any]:
    """Table 3, Figure 2, the filter of Table 4 and the premise on hard prompts, for the tiny scale; kept in `work`."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # what is measured may change
    file = data_folder(work) / f"models-{code}.json"
    if not file.exists():
        family, second = embedded(), llama_family(work.resolve() / "models")
        places = {
            "learner": family.learner,
            "explorer": family.explorer,
            "smaller explorer": smaller_explorer(work.resolve() / "models"),
            "learner, second family": second.learner,
            "explorer, second family": second.explorer,
        }
        prompts = read_prompts(data_folder(work) / "test.parquet", family.learner)[:PROBLEMS]
        sizes = by_size(places, {name: sample(place, prompts, SAMPLES) for name, place in places.items()})
        other = _other(work)
        hard = read_prompts(data_folder(work) / "hard_train.parquet", family.learner)
        drawn = [sample(place, hard, HARD_SAMPLES, first=20_000) for place in family]
        found = {
            "sizes": sizes,
            "filter": json.loads((Path(scale.values["main"]["filtered"]) / "filter.json").read_text()),
            "hard": premise(drawn[0], drawn[1]),
            "base_other": sum(sample(family.learner, other, OTHER_SAMPLES).right) / (len(other) * OTHER_SAMPLES),
        }
        file.write_text(json.dumps(found))
    return dict(json.loads(file.read_text()))


def _other(work: Path) -> Any:
    return read_prompts(data_folder(work) / "other.parquet", embedded().learner)


def by_size(places: dict[str, Path], drawn: dict[str, Drawn]) -> list[dict[str, Any]]:
    """One row a model: parameters, pass@k and diversity, with the difference to its family's learner and, as `step`, to
    the model before it; standard errors are over problems (the same for all)."""
    spread = {name: _spread(one) for name, one in drawn.items()}
    rows = []
    before = dict(zip([*drawn][1:], drawn))
    for name, one in drawn.items():
        own = "learner, second family" if name.endswith("second family") else "learner"
        row: dict[str, Any] = {"model": name, "parameters": count(places[name])}
        row |= {f"pass@{k}": float(np.mean([pass_at_k(SAMPLES, right, k) for right in one.right])) for k in KS}
        for metric in METRICS:
            gap = difference([x - y for x, y in zip(spread[name][metric], spread[own][metric])])
            row[metric] = float(np.mean(spread[name][metric]))
            row[f"{metric} difference"] = list(gap)
            last = spread[before.get(name, name)][metric]
            row[f"{metric} step"] = list(difference([x - y for x, y in zip(spread[name][metric], last)]))
        for k in KS:
            gap = pass_difference(Counts(SAMPLES, drawn[own].right, one.right), k)
            row[f"pass@{k} difference"] = list(gap)
        rows.append(row)
    return rows


def _spread(drawn: Drawn) -> dict[str, list[float]]:
    """Each diversity metric of each problem's first `ROWS` completions."""
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for row, texts in zip(drawn.rows, drawn.texts):
        group = [Sample(text, one.token_ids.tolist()) for one, text in zip(row, texts)]
        for metric, value in group_diversity([group], rows=ROWS, whole_texts=True).items():
            found[metric].append(value)
    return found


def premise(own: Drawn, other: Drawn) -> dict[str, Any]:
    """Of hard prompts, on samples that did not choose them: share of the learner's groups that fail whole, and pass@8
    of learner and explorer, over all of them and over those where the learner's first group fails."""
    n = HARD_SAMPLES
    gap = pass_difference(Counts(n, own.right, other.right), GROUP)
    found: dict[str, Any] = {
        "prompts": len(own.right),
        "all_fail": fail_share(n, own.right, GROUP),
        "learner pass@8": _pass(n, own.right),
        "explorer pass@8": _pass(n, other.right),
        "difference": list(gap),
    }
    return found


def _pass(n: int, right: Sequence[int]) -> float:
    return float(np.mean([pass_at_k(n, one, GROUP) for one in right]))
