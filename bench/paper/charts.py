"""The plots of the evidence page as PNG files: learning curves, paired differences, pass@k by size, compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.experiments import ARMS
from bench.paper.intervals import interval
from bench.paper.results import Result, Rows, curve

COLOURS = ("#2459c7", "#d2691e", "#17897a", "#8b5fbf", "#cf5548", "#68707a", "#3f9b5f", "#b08b2e")
METHODS = ("grpo", "s2l", "self")  # the first colours are theirs on every plot, dashed in another setting
VERDICT_COLOURS = {"reproduced": "#3f9b5f", "not reproduced": "#cf5548", "undecided": "#b08b2e", None: "#68707a"}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e1dc", "grid.linewidth": 0.6,
    "axes.edgecolor": "#b9bec6", "xtick.color": "#68707a", "ytick.color": "#68707a", "axes.labelcolor": "#1d2126",
    "legend.frameon": False, "figure.dpi": 110, "figure.facecolor": "#ffffff",
}  # fmt: skip


def learning_curves(file: Path, rows: Rows, arms: Sequence[str]) -> bool:
    """Mean pass@1 (per cent) over the steps, a band of its 95 % interval; False where no arm has a run."""
    known = [arm for arm in arms if rows.get(arm)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.6, 3.4)
        for arm, look in _looks(known).items():
            steps, points = _steps(rows[arm]), [curve(row) for row in rows[arm].values()]
            _band(axes, steps, points, look, f"{ARMS[arm].label} (n = {len(points)})")
        axes.set_xlabel("training step")
        axes.set_ylabel("pass@1 of test problems, per cent")
        return _save(figure, axes, file, bool(known))


def compute_curves(file: Path, rows: Rows, arms: Sequence[str]) -> bool:
    """Mean pass@1 against the FLOPs spent on rollouts and training."""
    known = [arm for arm in arms if rows.get(arm)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.6, 3.4)
        for arm, look in _looks(known).items():
            spent = np.mean([row["spent"] for row in rows[arm].values()], axis=0)
            points = [curve(row) for row in rows[arm].values()]
            _band(axes, spent, points, look, ARMS[arm].label)
        axes.set_xlabel("FLOPs of rollouts and training")
        axes.set_ylabel("pass@1 of test problems, per cent")
        return _save(figure, axes, file, bool(known))


def forest(file: Path, results: Sequence[Result]) -> bool:
    """Paired differences with their 95 % intervals, the first at the top; one seed is a hollow point."""
    known = [one for one in results if one.difference is not None]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.4, 0.7 + 0.32 * max(len(known), 1))
        for place, one in enumerate(reversed(known)):
            difference = one.difference
            assert difference is not None
            colour, alone = VERDICT_COLOURS[one.verdict], not np.isfinite(difference.half)
            axes.errorbar(
                difference.mean, place, xerr=0 if alone else difference.half, fmt="o", color=colour, capsize=3,
                markersize=5, markerfacecolor="#ffffff" if alone else colour, linewidth=1.4,
            )  # fmt: skip
        axes.axvline(0, color="#1d2126", linewidth=0.8)
        axes.set_yticks(range(len(known)), [f"{one.label} · {one.measured}" for one in reversed(known)])
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("points, with 95 % interval")
        return _save(figure, axes, file, bool(known), legend=False)


def pass_at_k_curves(file: Path, sizes: Sequence[Mapping[str, Any]]) -> bool:
    """Figure 2: pass@k of every model before training, over k."""
    ks = sorted(int(name[5:]) for name in (sizes[0] if sizes else {}) if name.startswith("pass@") and " " not in name)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.6, 3.4)
        for number, row in enumerate(sizes):
            label = f"{row['model']} ({row['parameters'] / 1e6:.2f}M)"
            values = [100 * row[f"pass@{k}"] for k in ks]
            axes.plot(ks, values, marker="o", markersize=3.5, color=COLOURS[number], label=label, linewidth=1.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set_xlabel("k")
        axes.set_ylabel("pass@k, per cent")
        return _save(figure, axes, file, bool(sizes))


def search_curves(file: Path, search: Mapping[str, Mapping[str, Sequence[float]]]) -> bool:
    """pass@1 on the validation problems by learning rate: every run of the search and their means."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.6, 3.0)
        for name, look in _looks(list(search)).items():
            rates = search[name]
            means = [100 * float(np.mean(values)) for values in rates.values()]
            axes.plot(list(rates), means, label=ARMS[name].label, linewidth=1.5, **look)
            for rate, values in rates.items():
                seen = [100 * one for one in values]
                axes.plot([rate] * len(values), seen, "o", color=look["color"], markersize=4)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("pass@1 of validation problems, per cent")
        return _save(figure, axes, file, bool(search))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _steps(runs: Mapping[int, Mapping[str, Any]]) -> list[int]:
    return [line["step"] for line in next(iter(runs.values()))["evaluations"]]


def _looks(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each arm of a plot."""
    looks: dict[str, dict[str, Any]] = {}
    others = 0
    for arm in arms:
        method, _, rest = arm.partition("_")
        if method in METHODS and rest in ("", "family2", "hard"):
            looks[arm] = {"color": COLOURS[METHODS.index(method)], "linestyle": "--" if rest == "family2" else "-"}
        else:
            rest_of = COLOURS[len(METHODS) :]
            looks[arm] = {"color": rest_of[others % len(rest_of)], "linestyle": "-"}
            others += 1
    return looks


def _band(axes: Axes, places: Any, points: Sequence[Sequence[float]], look: Mapping[str, Any], label: str) -> None:
    means = [interval([values[place] for values in points]) for place in range(len(points[0]))]
    axes.plot(places, [one.mean for one in means], label=label, marker="o", markersize=3.5, linewidth=1.6, **look)
    if len(points) > 2:
        low, high = [one.low for one in means], [one.high for one in means]
        axes.fill_between(places, low, high, color=look["color"], alpha=0.1, linewidth=0)


def _save(figure: Figure, axes: Axes, file: Path, anything: bool, *, legend: bool = True) -> bool:
    if anything:
        if legend:
            axes.legend(fontsize=8)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png", metadata={"Software": None})
    return anything
