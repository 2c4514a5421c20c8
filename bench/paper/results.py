"""From finished runs to the numbers of the page: one row per run, statistics of arms, paired differences, verdicts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.paper.experiments import ARMS, STATISTICS, Comparison, Experiment, Statistic
from bench.paper.intervals import Interval, Rule, Verdict, at_compute, combine, interval, judge, paired
from bench.paper.runs import Finished

# Means over the training lines of a run that have them: those of the explorer's rows over the steps with some.
MEANS = (
    "groups/all_fail", "groups/all_pass", "frac_reward_zero_std", "explorer/reward", "explorer/ess",
    "explorer/clip_fraction", "explorer/kl_k1", "explorer/kl_k3", "explorer/ratio_max", "explorer/masked_fraction",
    "explorer/weight_mean", "learner/clip_fraction", "kl", "entropy", "grad_norm",
)  # fmt: skip

FLOOR = 5.0  # a control below it has nothing to lose, which decides nothing

Row = dict[str, Any]
Rows = Mapping[str, Mapping[int, Row]]  # by arm and seed


class Result(NamedTuple):
    """A difference, measured; None where no seed has both arms. `verdict` is None for a control.

    Example: Result("S2L-PO − GRPO", "pass@1 after the last step", Interval(-1.2, 1.9, 8), "greater", "not reproduced")
    """

    label: str
    measured: str
    difference: Interval | None
    rule: Rule | None
    verdict: Verdict | None


def summarise(run: Finished, parameters: Mapping[str, int], other: float | None = None) -> Row:
    """What the page needs of one run. `parameters`: of learner and explorer; `other`: its pass@1 out of domain.

    FLOPs: 2 per parameter and generated token, also of completions that did not train (rescue's); training 10 per
    parameter and token (forward and backward 6, π_old and the reference 2 each), for explorer rows as well, so that it
    is an upper bound there. `spent` is their running sum at each evaluation.
    """
    rollout, training, spent = 0.0, 0.0, {0: 0.0}
    trained = {source: sum(line[f"{source}/rows"] for line in run.training) for source in parameters}
    made = {source: run.produced[source] / max(trained[source], 1) for source in parameters}
    for line in run.training:
        tokens = {source: line[f"{source}/rows"] * line.get(f"{source}/length", 0.0) for source in parameters}
        rollout += sum(2.0 * parameters[source] * made[source] * tokens[source] for source in parameters)
        training += 10.0 * parameters["learner"] * sum(tokens.values())
        spent[line["step"]] = rollout + training
    evaluations = [
        {"step": line["step"], **{name: line[name] for name in line if name.startswith("eval/pass@")}}
        for line in run.evaluations
    ]
    row: Row = {
        "arm": run.job.arm,
        "seed": run.job.seed,
        "key": run.key,
        "commit": run.commit,
        "arguments": [word for word in run.job.arguments if "=" in word and "/" not in word],
        "evaluations": evaluations,
        "spent": [spent[line["step"]] for line in evaluations],
        "rollout_flops": rollout,
        "training_flops": training,
        "produced": run.produced,
        "cpu_s": round(run.cpu_s, 1),
        "seconds": round(sum(line["step_time"] for line in run.training), 1),
        "means": {name: _mean(run.training, name) for name in MEANS},
        "fail_first": _mean(run.training[: max(1, len(run.training) // 8)], "groups/all_fail"),
    }
    return row if other is None else row | {"ood": other}


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return round(float(np.mean(values)), 5) if values else None


def curve(row: Row, name: str = "eval/pass@1") -> list[float]:
    """The evaluations of a run, in points."""
    return [100 * line[name] for line in row["evaluations"]]


def value(row: Row, statistic: Statistic) -> float | None:
    """A statistic of one run, in points; None where it was not measured."""
    points = curve(row)
    match statistic:
        case "final":
            return points[-1]
        case "early":
            return points[1]
        case "curve":
            return float(np.mean(points))
        case "regress":
            return points[-1] - max(points[:-1])
        case "pass8":
            return 100 * row["evaluations"][-1]["eval/pass@8"] if "eval/pass@8" in row["evaluations"][-1] else None
        case "ood":
            return 100 * row["ood"] if "ood" in row else None
        case "matched":
            raise ValueError("matched compute compares two runs")


def compare(rows: Rows, comparison: Comparison) -> Interval | None:
    """The paired difference of a comparison."""
    arm, control, statistic = rows.get(comparison.arm, {}), rows.get(comparison.control, {}), comparison.statistic
    if statistic == "matched":
        pairs = {seed: _matched(arm[seed], control[seed]) for seed in arm.keys() & control.keys()}
        return paired({seed: pair[0] for seed, pair in pairs.items()}, {seed: pair[1] for seed, pair in pairs.items()})

    def values(of: Mapping[int, Row]) -> dict[int, float]:
        found = {seed: value(row, statistic) for seed, row in of.items()}
        return {seed: one for seed, one in found.items() if one is not None}

    return paired(values(arm), values(control))


def _matched(one: Row, other: Row) -> tuple[float, float]:
    """pass@1 of both where the cheaper of the two has spent all its FLOPs."""
    budget = min(one["spent"][-1], other["spent"][-1])
    return at_compute(one["spent"], curve(one), budget), at_compute(other["spent"], curve(other), budget)


def results(experiment: Experiment, rows: Rows) -> list[Result]:
    """Every comparison of an experiment."""
    found = []
    for one in experiment.comparisons:
        difference = compare(rows, one)
        verdict = None if one.rule is None else judge(difference, one.rule)
        floor = mean_of(rows, one.control, lambda row: value(row, "ood")) if one.statistic == "ood" else None
        if verdict and floor and floor.mean < FLOOR:
            verdict = "undecided"
        label = f"{ARMS[one.arm].label} − {ARMS[one.control].label}"
        found.append(Result(label, STATISTICS[one.statistic], difference, one.rule, verdict))
    return found


def size_results(sizes: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Table 3 and Figure 2: each explorer less its family's learner, and the smaller explorer less the other; the
    interval is over problems, in points."""
    rules: dict[str, Rule] = {
        "self_bleu": "less", "edit_diversity": "greater", "unique_answer_ratio": "greater", "pass@64": "not_less"
    }  # fmt: skip
    found = []
    for row in sizes:
        explorer, smaller = row["model"], row["model"].startswith("smaller")
        for name, rule in {} if explorer.startswith("learner") else rules.items():
            gap = _gap(row[f"{name} difference"])
            label = f"{explorer} − its learner"
            found.append(Result(label, name.replace("_", " "), gap, rule, judge(gap, rule)))
        for name in ("self_bleu", "edit_diversity", "unique_answer_ratio") if smaller else ():
            label, gap = f"{explorer} − explorer", _gap(row[f"{name} step"])
            found.append(Result(label, name.replace("_", " "), gap, None, None))
    return found


def _gap(difference: Sequence[float]) -> Interval:
    mean, stderr = difference
    return Interval(100 * mean, 196 * stderr, 256)


def verdict_of(measured: Sequence[Result]) -> Verdict:
    """Of a whole experiment, from its comparisons that have a rule."""
    return combine([one.verdict for one in measured if one.verdict is not None])


def mean_of(rows: Rows, arm: str, pick: Callable[[Row], float | None]) -> Interval | None:
    """Mean and interval of an arm over its seeds."""
    values = [one for one in map(pick, rows.get(arm, {}).values()) if one is not None]
    return interval(values) if values else None


def by_arm(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Rows by arm and seed, seeds in order."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault(row["arm"], {})[row["seed"]] = row
    return found
