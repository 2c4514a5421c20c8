"""Tables of the evidence page, as HTML."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.paper.experiments import ARMS
from bench.paper.results import Row, Rows, curve, mean_of, value

Pick = Callable[[Row], float | None]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of text; nothing where there are no lines."""
    if not lines:
        return ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>{rows}</table></div>'


def arms_table(rows: Rows, arms: Sequence[str]) -> str:
    """What every arm came to: means over seeds with their intervals, in per cent."""
    columns: dict[str, Pick] = {
        "before": lambda row: curve(row)[0],
        "after": lambda row: value(row, "final"),
        "over curve": lambda row: value(row, "curve"),
        "pass@8 after": lambda row: value(row, "pass8"),
        "dead groups": lambda row: _points(row["means"]["frac_reward_zero_std"]),
        "out of domain": lambda row: value(row, "ood"),
    }
    return _arm_lines(rows, arms, columns)


def corrections_table(rows: Rows, arms: Sequence[str]) -> str:
    """Accuracy, effective sample size, clip fraction and KL of explorer rows under each correction."""
    columns: dict[str, Pick] = {
        "pass@1 after": lambda row: value(row, "final"),
        "mean over curve": lambda row: value(row, "curve"),
        "ESS %": lambda row: _points(row["means"]["explorer/ess"]),
        "clipped %": lambda row: _points(row["means"]["explorer/clip_fraction"]),
        "masked %": lambda row: _points(row["means"]["explorer/masked_fraction"]),
        "mean weight %": lambda row: _points(row["means"]["explorer/weight_mean"]),
        "KL k1 ×100": lambda row: _points(row["means"]["explorer/kl_k1"]),
        "KL k3 ×100": lambda row: _points(row["means"]["explorer/kl_k3"]),
        "KL to reference ×100": lambda row: _points(row["means"]["kl"]),
    }
    return _arm_lines(rows, arms, columns)


def compute_table(rows: Rows) -> str:
    """FLOPs of rollouts and training, CPU seconds and seconds of the steps, per run."""
    columns: dict[str, Pick] = {
        "rollout GFLOPs": lambda row: row["rollout_flops"] / 1e9,
        "training GFLOPs": lambda row: row["training_flops"] / 1e9,
        "explorer completions": lambda row: float(row["produced"]["explorer"]),
        "learner completions": lambda row: float(row["produced"]["learner"]),
        "CPU seconds": lambda row: float(row["cpu_s"]),
        "seconds of all steps": lambda row: float(row["seconds"]),
        "pass@1 after": lambda row: value(row, "final"),
    }
    return _arm_lines(rows, ("grpo", "s2l", "s2l_other", "self", "grpo_hot", "rescue", "grpo_more"), columns)


def search_table(facts: Mapping[str, Any]) -> str:
    """The search: pass@1 on the validation problems by learning rate, the chosen one marked."""
    lines = []
    for name, rates in facts["search"].items():
        cells = [
            f"{rate}: {' / '.join(f'{100 * one:.1f}' for one in values)}{' ←' if rate == facts['tuned'][name] else ''}"
            for rate, values in rates.items()
        ]
        lines.append([ARMS[name].label, *cells])
    return table(["search", *("" for _ in lines[0][1:])] if lines else [], lines)


def sizes_table(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Table 3 and Figure 2 in numbers."""
    names = ["self_bleu", "edit_diversity", "unique_answer_ratio"]
    ks = [name for name in (sizes[0] if sizes else {}) if name.startswith("pass@") and " " not in name]
    lines = [
        [row["model"], f"{row['parameters']:,}", *(f"{row[name]:.3f}" for name in names)]
        + [f"{100 * row[k]:.1f}" for k in ks]
        for row in sizes
    ]
    return table(["model", "parameters", *(name.replace("_", " ") for name in names), *ks], lines)


def facts_table(models: Mapping[str, Any], name: str) -> str:
    """What the filter of Table 4 did, or what the hard prompts are, before any training."""
    found = models.get(name)
    if not found:
        return ""
    if name == "filter":
        columns = list(found["learner"])
        lines = [[source, *(f"{values[column]:.3f}" for column in columns)] for source, values in found.items()]
        return table(["completions", *(column.replace("_", " ") for column in columns)], lines)
    mean, stderr = found["difference"]
    lines = [
        ["hard training prompts", f"{found['prompts']:,}"],
        ["groups of the learner that fail whole", f"{100 * found['all_fail']:.1f} %"],
        ["learner's pass@8", f"{100 * found['learner pass@8']:.1f} %"],
        ["explorer's pass@8", f"{100 * found['explorer pass@8']:.1f} %"],
        ["explorer − learner", f"{100 * mean:+.1f} ± {196 * stderr:.1f} points"],
    ]
    return table(["before training", ""], lines)


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _arm_lines(rows: Rows, arms: Sequence[str], columns: Mapping[str, Pick]) -> str:
    lines = []
    used = {name: pick for name, pick in columns.items() if any(mean_of(rows, arm, pick) for arm in arms)}
    for arm in arms:
        if rows.get(arm):
            found = [mean_of(rows, arm, pick) for pick in used.values()]
            lines.append([ARMS[arm].label, str(len(rows[arm])), *(str(one) if one else "-" for one in found)])
    return table(["arm", "seeds", *used], lines)
