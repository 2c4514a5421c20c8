"""The report's numbers: headline tiles, evaluations, quotas, ledger, configuration."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import msgspec

from core.anneal import quota_at
from core.config import Config
from core.configkeys import all_keys, section_of
from core.metrics import CORRECT_ABOVE
from trainer.wording import duration_text, failed_text, is_graded, number_text, pass_at_keys, percent_text

Lines = Sequence[Mapping[str, Any]]
SOURCES = ("explorer", "learner")
LEDGER_ROWS = ("produced", "inserted", "rejected", "in_flight", "trained", "dropped", "resident")


def tiles(config: Config, training: Lines, evaluations: Lines, ledger: Mapping[str, Any]) -> str:
    """The headline: from what to what, how long, at what cost."""
    shown = _evaluation_tiles([line for line in evaluations if pass_at_keys(line)])
    seconds = sum(line.get("step_time") or 0.0 for line in training)
    done = training[-1]["step"] if training else 0
    shown.append((f"{done} of {config.algorithm.steps}", f"steps, {duration_text(seconds)}"))
    if training:
        shown.append((_short(training[-1].get("num_tokens") or 0), "tokens trained"))
        rows = [sum(line.get(f"{source}/rows") or 0 for line in training) for source in SOURCES]
        if sum(rows):
            shown.append((f"{rows[0] / sum(rows):.0%}", "of rows from the explorer"))
    if ledger:
        fine = all(held for source in SOURCES for _, held in equations(ledger.get(source, {})))
        shown.append(("balanced" if fine else "NOT balanced", "ledger of completions"))
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in shown
    )


def _evaluation_tiles(evaluations: Lines) -> list[tuple[str, str]]:
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    shown, rule = [], ""
    if is_graded(evaluations):
        before, after = first.get("eval/reward"), last.get("eval/reward")
        shown.append((f"{number_text(before)} → {number_text(after)}", "mean held-out reward"))
        rule = f" (reward above {CORRECT_ABOVE:g})"
    for name, key in pass_at_keys(last):
        before, after = first.get(key), last[key]
        gain = "" if before is None or after is None else f", {100 * (after - before):+.1f} points"
        values = f"{percent_text(before)} → {percent_text(after)}"
        shown.append((values, f"{name}{rule}{gain}{failed_text(last)}"))
    return shown


def evaluation_table(evaluations: Lines) -> str:
    """One row per evaluation, one column per metric that any of them has."""
    keys = list(dict.fromkeys(key for line in evaluations for key in line if key.startswith("eval/")))
    if not keys:
        return ""
    rows = [[str(line["step"]), *(_cell(key, line.get(key)) for key in keys)] for line in evaluations]
    return _table(["step", *(key.removeprefix("eval/") for key in keys)], rows)


def quota_table(config: Config, training: Lines) -> str:
    """Per step: what the schedule demands of each source (under a driver, once it is known), and what trained. Steps
    that follow each other and do not differ share a row."""
    done = {line["step"]: line for line in training}

    def cells(step: int) -> list[str]:
        line = done.get(step, {})
        plan = quota_at(step, config.algorithm)._asdict() if config.algorithm.driver == "clock" else {}
        alpha = f"{line['mix/alpha']:.3f}" if "mix/alpha" in line else ""
        owed = [str(line.get(f"mix/{source}_quota", plan.get(source, ""))) for source in SOURCES]
        trained = [
            f"{line[f'{source}/rows']:,.0f}" if line.get(f"{source}/rows") is not None else "" for source in SOURCES
        ]
        return [alpha, *owed, *trained]

    rows = []
    for row, group in groupby(range(1, config.algorithm.steps + 1), key=cells):
        first, *others = group
        rows.append([f"{first} – {others[-1]}" if others else str(first), *row])
    return _table(
        ["step", "α", "explorer quota", "learner quota", "explorer rows trained", "learner rows trained"], rows
    )


def ledger_table(ledger: Mapping[str, Any]) -> str:
    """Where every completion went, by source, and whether the two equations of conservation hold."""
    if not ledger:
        return "<p class='none'>No ledger.json yet: it is written at checkpoints and at the end.</p>"
    rows = []
    for name in LEDGER_ROWS:
        counts = [_total(ledger.get(source, {}).get(name, 0)) for source in SOURCES]
        rows.append([name.replace("_", " "), *(f"{count:,}" for count in [*counts, sum(counts)])])
        reasons = [ledger.get(source, {}).get(name) for source in SOURCES]
        for reason in sorted({word for one in reasons if isinstance(one, dict) for word in one}):
            split = [one.get(reason, 0) if isinstance(one, dict) else 0 for one in reasons]
            rows.append([f"– {reason.replace('_', ' ')}", *(f"{count:,}" for count in [*split, sum(split)])])
    lines = [
        f'<li class="{"holds" if held else "broken"}"><b>{source}</b> {escape(text)}</li>'
        for source in SOURCES
        for text, held in equations(ledger.get(source, {}))
    ]
    return _table(["completions", *SOURCES, "both"], rows) + f'<ul class="equations">{"".join(lines)}</ul>'


def equations(account: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The two equations of conservation with one source's numbers, and whether each holds.

    produced = inserted + rejected + in flight;  inserted = trained + dropped + resident
    """
    count = {name: _total(account.get(name, 0)) for name in LEDGER_ROWS}
    found = []
    for whole, parts in (
        ("produced", ("inserted", "rejected", "in_flight")),
        ("inserted", ("trained", "dropped", "resident")),
    ):
        held = count[whole] == sum(count[part] for part in parts)
        right = " + ".join(f"{part.replace('_', ' ')} {count[part]:,}" for part in parts)
        found.append((f"{whole} {count[whole]:,} {'=' if held else '≠'} {right}", held))
    return found


def configuration_table(config: Config) -> str:
    """Every key; those that differ from the default stand out, with the default beside them."""
    tree = msgspec.to_builtins(config)
    sections = []
    for section, keys in groupby(all_keys().values(), key=lambda key: section_of(key.name)):
        rows = []
        for key in keys:
            value: Any = tree
            for part in key.name.split("."):
                value = value[part]
            default = msgspec.to_builtins(key.default)
            changed = f" <i>default {escape(_json(default))}</i>" if value != default else ""
            name = f'<td title="{escape(key.sentence)}">{key.name.rpartition(".")[2]}</td>'
            rows.append(f"<tr{' class=changed' if changed else ''}>{name}<td>{escape(_json(value))}{changed}</td></tr>")
        sections.append(f"<div><h3>{section}</h3><table>{''.join(rows)}</table></div>")
    return "".join(sections)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if "pass@" in key:
        return percent_text(value)
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def _total(count: int | Mapping[str, int]) -> int:
    return sum(count.values()) if isinstance(count, Mapping) else count


def _short(count: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
