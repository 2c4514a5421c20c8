"""Every fault of the plan against the real processes: python -m bench.faults [--only F5 …] [--seed N] [--quick].

Prints a table: fault, verdict, what happened, seconds until the run knew, completions lost and duplicated. Exit code 0
only if every row holds. Results go to bench/results/faults.jsonl.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.faults.lanes import run_beside, serve
from bench.faults.rows import LEFT_OUT, ROWS, NotHere, Row
from bench.faults.runs import end_runs

MODULES = (
    "workers", "frames", "peers", "scoring", "trainer", "stopping", "paused",
    "checkpoints", "disk", "nonfinite", "soak", "cost",
)  # fmt: skip
COLUMNS = ["row", "fault", "verdict", "what happened", "detection_s", "lost", "duplicated", "took_s"]
FEW = 5  # rows that are run one after the other, in this process


def load() -> list[Row]:
    """All rows, in the order of the plan."""
    for module in MODULES:
        importlib.import_module(f"bench.faults.{module}")
    return sorted(ROWS, key=lambda row: (int("".join(filter(str.isdigit, row.name)) or 99), row.name))


def run(row: Row, seed: int) -> dict[str, Any]:
    """One line of the table. `holds` is None where the machine lacks what the fault needs."""
    start = time.monotonic()
    line: dict[str, Any] = {"row": row.name, "fault": row.fault, "seed": seed, "holds": True}
    try:
        verdict = row.check(seed)
        counts = {"lost": verdict.lost, "duplicated": verdict.duplicated}
        line |= {
            "verdict": verdict.outcome,
            "what happened": verdict.what,
            "detection_s": verdict.detection_s,
            **counts,
        }
        if verdict.lost or verdict.duplicated:
            line |= {"verdict": "FAILED", "holds": False}
    except NotHere as missing:
        line |= {"verdict": "left out", "what happened": str(missing), "holds": None}
    except Exception as error:  # a row that does not hold must not keep the others from running
        said = " | ".join([f"{type(error).__name__}: {error}"[:600], *getattr(error, "__notes__", [])])
        line |= {"verdict": "FAILED", "what happened": said, "holds": False}
    finally:
        end_runs()
    return line | {"took_s": time.monotonic() - start}


def say(line: dict[str, Any]) -> None:
    """One line while the others run."""
    print(f"{line['row']} {line['verdict']} ({line['took_s']:.1f} s): {line['fault']}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m bench.faults`."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name; F5 stands for F5b, F5c too")
    parser.add_argument("--seed", type=int, default=0, help="of what is random in a fault (default: 0)")
    parser.add_argument("--quick", action="store_true", help="only rows without whole runs")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = [row for row in load() if row.quick or not options.quick]
    if options.only:
        rows = [row for row in rows if row.name in options.only or row.name.rstrip("bcd") in options.only]
        unknown = {name for name in options.only if not any(row.name.startswith(name) for row in rows)}
        if unknown:
            parser.error(f"no row {', '.join(sorted(unknown))}; see --list")
    if options.serve:
        serve(rows, lambda row: run(row, options.seed), sys.stdin, sys.stdout)
        return 0
    from bench import measure  # which imports torch: a lane needs none

    if options.list:
        listed = [{"row": row.name, "fault": row.fault, "quick": row.quick or None} for row in rows]
        print(measure.table(listed, ["row", "fault", "quick"]))
        return 0
    start = time.monotonic()
    if len(rows) > FEW:
        lines = run_beside(rows, options.seed, say)
    else:
        lines = []
        for row in rows:
            lines.append(run(row, options.seed))
            say(lines[-1])
    measure.record("faults", lines)
    print("\n" + (markdown(lines) if options.markdown else measure.table(lines, COLUMNS)))
    for name, why in LEFT_OUT.items():
        print(f"left out: {name}: {why}")
    failed = [line["row"] for line in lines if line["holds"] is False]
    took = f"{len(lines) - len(failed)} of {len(lines)} rows hold; {time.monotonic() - start:.0f} s"
    print(took + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for a page, without what happened."""
    text = ["| row | fault | verdict | detected after | lost | duplicated |", "|---|---|---|---:|---:|---:|"]
    for line in lines:
        seconds = line.get("detection_s")
        after = "" if seconds is None else "< 0.1 s" if seconds < 0.1 else f"{seconds:.1f} s"
        fault = line["fault"].replace("|", "\\|")
        cells = [line["row"], fault, line["verdict"], after, *(line.get(count, "") for count in ("lost", "duplicated"))]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
