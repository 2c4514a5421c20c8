"""The report's charts: which metrics stand together, and what to look for in each."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from core.metrics import CORRECT_ABOVE
from trainer.charts import Series, line_chart, stack_chart
from trainer.wording import is_graded

Lines = Sequence[Mapping[str, Any]]
SOURCES = ("explorer", "learner")


class Chart(NamedTuple):
    """Curves over the steps. A `metric` that begins with `S/` has a curve per source; `whole` is that of all rows.

    Example: Chart("Reward", "Mean reward of the rows that trained.", "S/reward", whole="reward")
    """

    title: str
    caption: str
    metric: str
    whole: str = ""
    percent: bool = False
    log: bool = False


REWARD = Chart("Reward", "Mean reward of the rows that trained.", "S/reward", whole="reward")
CHARTS = (
    Chart("KL to the reference", "k3 estimate, on the rows that loss.kl_rows names.", "kl"),
    Chart("Entropy", "Of the learner's next-token distribution, in nats.", "entropy"),
    Chart("Ratio, mean", "π_θ over the anchor's probability; 1 is on-policy.", "S/ratio_mean"),
    Chart("Ratio, largest", "How far the worst token is off, on a log scale.", "S/ratio_max", log=True),
    Chart("Clipped tokens", "Tokens whose gradient the PPO clip stops.", "S/clip_fraction", percent=True),
    Chart("Effective sample size", "Of the importance weights, per token; 100 % is on-policy.", "S/ess", percent=True),
    Chart("Length", "Mean tokens of a completion.", "S/length"),
    Chart("Truncated", "Completions cut by the length limit.", "S/truncated", percent=True),
    Chart("Gradient norm", "Before clipping.", "grad_norm"),
    Chart("Tokens per second", "Trained tokens over the time of the step.", "tokens_per_second"),
    Chart("Buffer", "Completions that wait in the replay buffer.", "buffer/resident"),
)
FLAT = {"all fail": ("groups/all_fail", "bad"), "all pass": ("groups/all_pass", "good")}
STAGES = {
    "wait for completions": ("time/wait_for_batch", "rest"),
    "score": ("time/score", "third"),
    "train": ("time/train", "learner"),
    "publish weights": ("time/publish", "fourth"),
}


def headline_chart(training: Lines, evaluations: Lines) -> str:
    """Held-out pass@k over the run, before the explorer's share; with graded rewards, their mean first."""
    keys = sorted({key for line in evaluations for key in line if key.startswith("eval/pass@")}, key=_k)
    if not keys:
        return "<p class='none'>No evaluation yet.</p>"
    chosen = list(dict.fromkeys([keys[0], keys[len(keys) // 2], keys[-1]]))
    colours = ("learner", "third", "muted")
    steps = [line["step"] for line in evaluations]
    series = [
        Series(
            f"pass@{_k(key)}", steps, [line.get(key) for line in evaluations], colour, dashed=place > 0, markers=True
        )
        for place, (key, colour) in enumerate(zip(chosen, colours, strict=False))
    ]
    shade = "Shaded: the explorer's share α of each group."
    chart = line_chart("Held-out accuracy", series, share=_share(training), percent=True, wide=True)
    if not is_graded(evaluations):
        return _figure("Held-out accuracy", shade, series, chart)
    rewards = [Series("reward", steps, [line.get("eval/reward") for line in evaluations], "learner", markers=True)]
    first = line_chart("Held-out reward", rewards, share=_share(training), wide=True)
    rule = f"Completions with a reward above {CORRECT_ABOVE:g}."
    return _figure("Held-out reward", f"Mean over completions. {shade}", rewards, first) + _figure(
        "Held-out accuracy", rule, series, chart
    )


def mixing_chart(training: Lines) -> str:
    """Rows of each source that trained, per step."""
    series = [_one(training, f"{source}/rows", source, source) for source in SOURCES]
    shown = [one for one in series if any(one.values)]
    if not shown:
        return "<p class='none'>No training step yet.</p>"
    chart = stack_chart("Rows by source", shown, wide=True)
    return _figure("Who made the rows", "Completions that trained at each step, by source.", shown, chart)


def curves_section(training: Lines) -> str:
    """Every chart for which the run has values."""
    if not training:
        return "<p class='none'>No training step yet.</p>"
    flat = [_one(training, key, name, colour) for name, (key, colour) in FLAT.items()]
    figures = [
        _lines(REWARD, training),
        _stack("Groups without a signal", "Groups whose rewards are all equal teach nothing.", flat, percent=True),
        *(_lines(chart, training) for chart in CHARTS),
        _stack("Seconds per step", "Where the time of a step goes.", _stages(training)),
    ]
    return "".join(figures)


def legend(series: Sequence[Series]) -> str:
    """Colour keys, as HTML so that they wrap."""
    keys = [
        f'<span class="key{" dashed" if one.dashed else ""}" style="--c:var(--{one.colour})">{escape(one.name)}</span>'
        for one in series
    ]
    return f'<div class="keys">{"".join(keys)}</div>'


def _lines(chart: Chart, training: Lines) -> str:
    if chart.metric.startswith("S/"):
        series = _sources(training, chart.metric.removeprefix("S/"))
        series += [_one(training, chart.whole, "all", "ink")._replace(dashed=True)] if chart.whole else []
    else:
        series = [_one(training, chart.metric, chart.metric, "ink")]
    shown = [one for one in series if _has_values(one)]
    if not shown:
        return ""
    drawing = line_chart(chart.title, shown, share=_share(training), percent=chart.percent, log=chart.log)
    return _figure(chart.title, chart.caption, shown, drawing)


def _stack(title: str, caption: str, series: list[Series], *, percent: bool = False) -> str:
    shown = [one for one in series if _has_values(one)]
    if not shown:
        return ""
    return _figure(title, caption, shown, stack_chart(title, shown, percent=percent))


def _figure(title: str, caption: str, series: Sequence[Series], chart: str) -> str:
    keys = legend(series) if len(series) > 1 else ""
    head = f"<figcaption><h3>{escape(title)}</h3><p>{escape(caption)}</p></figcaption>"
    return f"<figure>{head}{keys}{chart}</figure>"


def _has_values(series: Series) -> bool:
    return any(value is not None for value in series.values)


def _one(training: Lines, key: str, name: str, colour: str) -> Series:
    return Series(name, [line["step"] for line in training], [line.get(key) for line in training], colour)


def _sources(training: Lines, metric: str) -> list[Series]:
    """A curve per source, with a gap where the source had no rows."""
    return [
        Series(
            source,
            [line["step"] for line in training],
            [line.get(f"{source}/{metric}") if line.get(f"{source}/rows") else None for line in training],
            source,
        )
        for source in SOURCES
    ]


def _stages(training: Lines) -> list[Series]:
    """Measured stages, and the rest of the step."""
    series = [_one(training, key, name, colour) for name, (key, colour) in STAGES.items()]
    measured = [sum(line.get(key) or 0.0 for key, _ in STAGES.values()) for line in training]
    rest = [max((line.get("step_time") or 0.0) - known, 0.0) for line, known in zip(training, measured, strict=True)]
    return [*series, Series("other", [line["step"] for line in training], rest, "line")]


def _share(training: Lines) -> list[tuple[int, float]]:
    return [(line["step"], line["mix/alpha"]) for line in training]


def _k(key: str) -> int:
    return int(key.rpartition("@")[2])
