"""Curves as inline SVG whose colours are CSS variables of the page, so that they follow its light or dark theme."""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.thinning import columns, outline, turns

# matplotlib wants colours and the page wants variables: each variable is drawn in a colour of its own, then renamed.
COLOURS = {
    name: f"#0a00{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "explorer", "learner", "good", "bad", "third", "fourth", "rest"), start=1
    )
}
NARROW, WIDE = (4.1, 2.35), (5.4, 2.7)  # inches
STYLE = {"svg.fonttype": "none", "font.size": 8.5, "axes.linewidth": 0.6, "font.family": "DejaVu Sans"}


PERCENT = FuncFormatter(lambda share, _position: f"{100 * share:.3g} %")


class Series(NamedTuple):
    """One curve; None is a gap. `colour` is a name of COLOURS.

    Example: Series("explorer", (1, 2), (0.3, None), "explorer")
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    colour: str
    dashed: bool = False
    markers: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    share: Sequence[tuple[int, float]] = (),
    percent: bool = False,
    log: bool = False,
    wide: bool = False,
) -> str:
    """Curves over steps, before a shade of the explorer's share α (`share`: step and α, drawn from 0 to 1)."""
    figure, axes = _axes(wide)
    _shade(axes, share, labelled=wide)
    for one in series:
        values = [float("nan") if value is None or (log and value <= 0) else value for value in one.values]
        shown = outline(values)
        axes.plot(
            [one.steps[place] for place in shown],
            [values[place] for place in shown],
            color=COLOURS[one.colour],
            linestyle="--" if one.dashed else "-",
            linewidth=1.4,
            marker="o" if one.markers or len(one.steps) == 1 else None,
            markersize=3,
            solid_capstyle="round",
        )
    if log and any(value and value > 0 for one in series for value in one.values):
        axes.set_yscale("log")
    elif percent:
        axes.yaxis.set_major_formatter(PERCENT)
    return _svg(figure, title)


def stack_chart(title: str, series: Sequence[Series], *, percent: bool = False, wide: bool = False) -> str:
    """Values of the same steps on top of one another; None counts as 0. One column per step, or where there are more
    steps than can be seen, the mean of several."""
    figure, axes = _axes(wide)
    heights = [columns([value or 0.0 for value in one.values]) for one in series]
    middles = columns(series[0].steps)
    colours = [COLOURS[one.colour] for one in series]
    # A first and a last half column: "mid" steps end at the first and the last value.
    steps = [series[0].steps[0] - 0.5, *middles, series[0].steps[-1] + 0.5]
    heights = [[values[0], *values, values[-1]] for values in heights]
    axes.stackplot(steps, heights, colors=colours, step="mid", linewidth=0)
    axes.margins(x=0.01)
    axes.set_ylim(0, 1 if percent else None)
    if percent:
        axes.yaxis.set_major_formatter(PERCENT)
    return _svg(figure, title)


def _axes(wide: bool) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        width, height = WIDE if wide else NARROW
        figure = Figure(figsize=(width, height))
        # Margins in inches, by hand: a layout engine draws every chart twice.
        edges = {"left": 0.48 / width, "right": 1 - (0.42 if wide else 0.06) / width}
        figure.subplots_adjust(bottom=0.24 / height, top=1 - 0.08 / height, **edges)
        axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])
    axes.tick_params(which="minor", length=0)
    axes.tick_params(color=COLOURS["line"], labelcolor=COLOURS["muted"], length=2.5)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    return figure, axes


def _tick(value: float, _position: int) -> str:
    """`12k` for 12,000; otherwise as short as it can be."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _shade(axes: Axes, share: Sequence[tuple[int, float]], labelled: bool) -> None:
    if not any(alpha for _, alpha in share):
        return
    right = axes.twinx()
    right.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    corners = [share[place] for place in turns([alpha for _, alpha in share])]
    steps, alphas = zip(*(corners[place] for place in outline([alpha for _, alpha in corners])), strict=True)
    right.fill_between(steps, alphas, step="mid", color=COLOURS["explorer"], alpha=0.13, linewidth=0)
    right.set_ylim(0, 1)
    right.spines[:].set_visible(False)
    right.tick_params(length=0, labelsize=STYLE["font.size"], labelcolor=COLOURS["explorer"], labelright=labelled)
    right.yaxis.set_major_formatter(PERCENT)


def _svg(figure: Figure, title: str) -> str:
    """The figure's <svg>, without the XML header, with ids that no other chart of the page has."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # A hundredth of a point is finer than any screen.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    label = html.escape(title, quote=True)
    return text.replace("'DejaVu Sans'", "inherit").replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
