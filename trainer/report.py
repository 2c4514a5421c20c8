"""report.html: one self-contained page about a run, made from its directory. `python -m trainer.report RUN_DIR`"""

import html
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import msgspec

from core.config import Config
from core.confighelp import explain
from core.metrics import is_evaluation, read_metrics
from core.whole_file import whole_file
from trainer.curves import curves_section, headline_chart, mixing_chart
from trainer.diagnosis import diagnosis
from trainer.samples import samples_section
from trainer.tables import configuration_table, evaluation_table, ledger_table, quota_table, tiles

FILE_NAME = "report.html"
# Of the time since it was last written; a page with charts takes about half a second, and longer after many steps.
SHARE, LEAST_COST_S = 0.02, 0.5
TEMPLATE = Path(__file__).with_name("report_template.html")


class Run(NamedTuple):
    """What a run directory says about a run, finished or not. `ledger` is empty where none was written yet.

    Example: Run(run_dir=Path("runs/tiny"), config=Config(), training=[...], evaluations=[...], ledger={...})
    """

    run_dir: Path
    config: Config
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    ledger: dict[str, Any]


def load_run(run_dir: Path) -> Run:
    """Read a run directory. Raises ValueError where it holds no run, or one of an incompatible version."""
    path = run_dir / "config.resolved.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no run (no {path.name}): give the run.dir of a run that was started")
    try:
        config = msgspec.json.decode(path.read_bytes(), type=Config)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} does not fit this version's settings: {error}") from error
    lines = read_metrics(run_dir)
    ledger = run_dir / "ledger.json"
    return Run(
        run_dir,
        config,
        [line for line in lines if not is_evaluation(line)],
        [line for line in lines if is_evaluation(line)],
        json.loads(ledger.read_bytes()) if ledger.is_file() else {},
    )


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html, whole or not at all; works on a run that is going on or was killed."""
    run = load_run(run_dir)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{run.run_dir.name}: S2L-PO run"),
        name=html.escape(run.run_dir.name),
        lead=_lead(run),
        tiles=tiles(run.config, run.training, run.evaluations, run.ledger),
        headline=headline_chart(run.training, run.evaluations),
        mixing=mixing_chart(run.training),
        evaluations=evaluation_table(run.evaluations),
        curves=curves_section(run.training),
        quotas=quota_table(run.config, run.training),
        ledger=ledger_table(run.ledger),
        samples=samples_section(run.run_dir, run.config),
        configuration=configuration_table(run.config),
    )
    path = run_dir / FILE_NAME
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


class LiveReport:
    """The report of a run that goes on, written anew where that takes a small share of the time since it last was.

    A page that cannot be written, as on a full disk, is a warning and never the end of the run.

    Example: report = LiveReport(Path("runs/tiny"), console.warn); report.refresh()
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self.path = run_dir / FILE_NAME
        self._warn, self._warned = warn, False
        self._cost_s, self._written_s = LEAST_COST_S, -math.inf

    def refresh(self) -> None:
        """Write it, unless it was written too lately."""
        if time.monotonic() - self._written_s >= self._cost_s / SHARE:
            self.write()

    def write(self) -> None:
        """Write it."""
        began_s = time.monotonic()
        try:
            write_report(self.path.parent)
        except Exception as error:
            if not self._warned:
                self._warn(f"no new {self.path.name} ({type(error).__name__}: {error}); the run goes on")
            self._warned = True
        self._written_s = time.monotonic()
        self._cost_s = max(self._cost_s, self._written_s - began_s)


def _lead(run: Run) -> str:
    """Each line with a capital and a full stop."""
    lines = [*explain(run.config), *diagnosis(run.training, run.config)]
    return "".join(f"<p>{html.escape(line[0].upper() + line[1:])}.</p>" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Exit status 2 for a directory that holds no run."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m trainer.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except ValueError as error:
        print(f"s2l-po: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
