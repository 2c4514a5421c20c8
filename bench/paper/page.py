"""The evidence page: one self-contained HTML file with every plot inside, and the PNG files beside it."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bench.paper import charts
from bench.paper.experiments import EXPERIMENTS, Experiment
from bench.paper.intervals import Interval, Verdict
from bench.paper.results import Result, Row, Rows, by_arm, results, size_results, verdict_of
from bench.paper.tables import arms_table, compute_table, corrections_table, facts_table, search_table, sizes_table

TEMPLATE = Path(__file__).with_name("template.html")
PAGE = "index.html"


def write_page(out: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> Path:
    """Write `out`/index.html and its plots from the rows of all runs; the page needs no other file."""
    known = by_arm(rows)
    measured = {one.key: _measured(one, known, facts) for one in EXPERIMENTS}
    sections = [_section(one, measured[one.key], known, facts, out) for one in EXPERIMENTS]
    seeds = sorted(len(of) for of in known.values())
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        scale=html.escape(str(facts["scale"])),
        runs=f"{len(rows):,}",
        steps=facts["steps"],
        most=seeds[-1] if seeds else 0,
        least=seeds[0] if seeds else 0,
        commits=html.escape(", ".join(sorted({row["commit"] for row in rows}))),
        verdicts=_verdict_table(measured),
        search=search_table(facts) + _plot(out, "search", lambda file: charts.search_curves(file, facts["search"])),
        sections="".join(sections) + _theory(out),
    )
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE
    page.write_text(text, encoding="utf-8")
    return page


def verdict_lines(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    """`title: verdict` and every difference, for the console."""
    known, lines = by_arm(rows), []
    for one in EXPERIMENTS:
        found = _measured(one, known, facts)
        lines.append(f"{one.title}: {_said(found)}")
        lines += [f"    {_difference(result)}" for result in found if result.difference is not None]
    return lines


def _measured(experiment: Experiment, rows: Rows, facts: Mapping[str, Any]) -> list[Result]:
    if experiment.key == "table3":
        return size_results(facts["models"].get("sizes", []))
    return results(experiment, rows)


def _said(measured: Sequence[Result]) -> str:
    if not any(one.rule for one in measured):
        return "no claim of the paper"
    return verdict_of(measured)


def _verdict_table(measured: Mapping[str, Sequence[Result]]) -> str:
    """Paper says / here."""
    lines = []
    for experiment in EXPERIMENTS:
        found = measured[experiment.key]
        here = "".join(f"<li>{html.escape(_difference(one))}</li>" for one in found if one.rule)
        verdict = _said(found)
        lines.append(
            f'<tr><td><a href="#{experiment.key}">{html.escape(experiment.title)}</a></td>'
            f"<td>{html.escape(experiment.paper)}</td><td><ul>{here or '<li>see below</li>'}</ul></td>"
            f"<td>{_chip(verdict)}</td></tr>"
        )
    head = "<tr><th>experiment</th><th>paper says</th><th>here</th><th>verdict</th></tr>"
    return f'<table class="verdicts">{head}{"".join(lines)}</table>'


def _difference(one: Result) -> str:
    return f"{one.label}, {one.measured}: {_interval(one.difference)}"


def _interval(difference: Interval | None) -> str:
    return "no run" if difference is None else f"{difference.signed()} (n = {difference.n})"


def _chip(verdict: Verdict | str) -> str:
    return f'<span class="chip {verdict.split()[0]}">{html.escape(verdict)}</span>'


def _section(
    experiment: Experiment, measured: Sequence[Result], rows: Rows, facts: Mapping[str, Any], out: Path
) -> str:
    key, arms = experiment.key, experiment.arms
    extra = ""
    if key == "table3":
        sizes = facts["models"].get("sizes", [])
        extra = _plot(out, "fig2", lambda file: charts.pass_at_k_curves(file, sizes)) + sizes_table(sizes)
    elif key == "compute":
        extra = _plot(out, key, lambda file: charts.compute_curves(file, rows, arms)) + compute_table(rows)
    elif key == "corrections":
        extra = corrections_table(rows, arms)
    elif key == "table2":
        extra = arms_table(rows, arms)
    else:
        extra = _plot(out, key, lambda file: charts.learning_curves(file, rows, arms)) + arms_table(rows, arms)
    if key in ("table4", "regime"):
        extra += facts_table(facts["models"], "filter" if key == "table4" else "hard")
    forest = _plot(out, f"{key}_differences", lambda file: charts.forest(file, measured))
    return (
        f'<section id="{key}"><h2>{html.escape(experiment.title)} {_chip(_said(measured))}</h2>'
        f'<p class="claim"><b>The paper:</b> {html.escape(experiment.paper)}</p>{forest}{extra}'
        f"{_differences_table(measured)}</section>"
    )


def _theory(out: Path) -> str:
    """What `python -m bench.theory` left in the same folder, if it ran."""
    found, picture = out / "theory.json", out / "theory.png"
    if not found.exists() or not picture.exists():
        return ""
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in json.loads(found.read_text())["answer"])
    return f'<section id="theory"><h2>Theory: section 3.1 and Appendix E</h2>{_image(picture)}{lines}</section>'


def _differences_table(measured: Sequence[Result]) -> str:
    names = ("difference", "of", "mean ± 95 %", "seeds", "paper expects", "verdict")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    lines = []
    for one in measured:
        number = "-" if one.difference is None else one.difference.signed()
        count = 0 if one.difference is None else one.difference.n
        cells = [one.label, one.measured, number, str(count), (one.rule or "control").replace("_", " ")]
        chip = _chip(one.verdict) if one.verdict else ""
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>{chip}</td></tr>")
    return f'<details><summary>Every difference</summary><div class="scroll"><table class="numbers">{head}' + (
        "".join(lines) + "</table></div></details>"
    )


def _plot(out: Path, name: str, draw: Callable[[Path], bool]) -> str:
    """Draw a PNG and put it into the page; nothing where there is nothing to draw."""
    file = out / f"{name}.png"
    return _image(file) if draw(file) else ""


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<figure><img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}"></figure>'
