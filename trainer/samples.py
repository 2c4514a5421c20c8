"""The report's sample completions: whole groups from early, middle and late in a run."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from core.config import Config
from rollout.store import read_rollouts, stored_steps

COLUMNS = ("slot", "source", "sample", "prompt", "answer", "text", "reward", "advantage", "finish", "token_ids")
GROUPS_PER_STEP = 2
ROWS_PER_GROUP = 16
SHOWN_CHARACTERS = 4000

Row = Mapping[str, Any]


def samples_section(run_dir: Path, config: Config) -> str:
    """Groups with most to see, of the first and the last stored step and of one in the middle of the annealing."""
    steps = stored_steps(run_dir)
    if not steps:
        return "<p class='none'>No rollouts stored yet.</p>"
    middle = (config.algorithm.anneal_steps or config.algorithm.steps) // 2
    chosen = dict.fromkeys([steps[0], min(steps, key=lambda step: abs(step - middle)), steps[-1]])
    return "".join(_step(run_dir, step) for step in chosen)


def _step(run_dir: Path, step: int) -> str:
    rows = read_rollouts(run_dir, step, COLUMNS).to_pylist()
    groups = [list(members) for _, members in groupby(rows, key=lambda row: row["slot"])]
    groups.sort(key=_interest, reverse=True)
    cards = "".join(_group(group) for group in groups[:GROUPS_PER_STEP])
    return f"<h3>Step {step}</h3>{cards}"


def _interest(group: Sequence[Row]) -> tuple[int, int, float]:
    """Both sources before one, then different rewards before equal ones, then the most even split."""
    rewards = [row["reward"] for row in group]
    mean = sum(rewards) / len(rewards)
    spread = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return len({row["source"] for row in group}), len(set(rewards)), spread


def _group(group: Sequence[Row]) -> str:
    first = group[0]
    rows = "".join(_row(row) for row in group[:ROWS_PER_GROUP])
    more = len(group) - ROWS_PER_GROUP
    rest = f"<p class='none'>and {more} more</p>" if more > 0 else ""
    return (
        f'<div class="group"><div class="prompt"><pre>{_text(first["prompt"])}</pre>'
        f"<span>gold answer <code>{escape(first['answer'])}</code></span></div>{rows}{rest}</div>"
    )


def _row(row: Row) -> str:
    cut = " · cut" if row["finish"] == "length" else ""
    sign = "up" if row["advantage"] > 0 else "down" if row["advantage"] < 0 else "flat"
    return (
        f'<div class="row"><span class="chip {row["source"]}">{row["source"]}</span>'
        f'<span class="reward">{row["reward"]:g}</span><span class="advantage {sign}">{row["advantage"]:+.2f}</span>'
        f'<pre>{_text(row["text"])}</pre><span class="length">{len(row["token_ids"])} tokens{cut}</span></div>'
    )


def _text(text: str) -> str:
    """Escaped, and cut in the middle where it is very long: the answer stands at the end."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]}\n… {len(text) - SHOWN_CHARACTERS:,} characters left out …\n{text[-half:]}"
    return escape(text)
