"""Everything that needs a GPU, offline, each call under nine minutes; says what is missing instead of failing.

    python -m bench.gpu --out DIR [--dry] [--only STAGE ...]
    python -m bench.gpu --out DIR --only options               # each option of the kernels: another minute
    python -m bench.gpu --out DIR --only train generate        # Qwen3-1.7B and 4B: another nine minutes

Each stage is a process of its own, so that a crashed context or a hang ends that stage only. DIR gets report.md,
report.json, one JSON file and one log per stage. --dry runs every stage at toy sizes without a GPU: kernels in Triton's
interpreter, the trainer up to its own --dry-run; it is a test of this file, its numbers mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import measure

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 530.0
LIMITS_S = {"machine": 30.0, "values": 60.0, "rows": 40.0, "table": 150.0, "default": 150.0, "end_to_end": 240.0,
            "options": 70.0, "train": 290.0, "generate": 230.0}  # fmt: skip
"""Longest time of each stage, in order of running; what one leaves over goes to nobody."""
LEAST_S = 30.0
"""A stage that has less is not begun."""


def main(arguments: list[str]) -> int:
    """Runs the stages; exit code 0 if all that could run did, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="toy sizes, no GPU")
    parser.add_argument("--only", nargs="*", choices=LIMITS_S, help="stages to run; default all")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage's processes end with this one
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + BUDGET_S
    reports = {}
    for name, limit in LIMITS_S.items():
        if options.only is None or name in options.only:
            left = min(limit, deadline - time.monotonic())
            if left < min(limit, LEAST_S):
                reports[name] = {
                    "status": "missing",
                    "why": f"no time left: call again with --only {name}",
                    "seconds": 0,
                }
            else:
                reports[name] = run_stage(name, options.out, dry=options.dry, limit_s=left)
            print(f"{name}: {reports[name]['status']} in {reports[name]['seconds']:.0f} s", flush=True)
    (options.out / "report.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    text = render(reports, dry=options.dry)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(report["status"] in ("ok", "missing") for report in reports.values()) else 1


def run_stage(name: str, out: Path, *, dry: bool, limit_s: float) -> dict[str, Any]:
    """One stage in its own process: its report, or why there is none."""
    started = time.monotonic()
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu_stages", name, str(out), *(["--dry"] if dry else [])]
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(dry=dry), stdout=file, stderr=file)
        try:
            code: int | None = child.wait(timeout=max(limit_s, 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            measure.end_tree(child)
    # A stage writes its report as it goes, so that one cut short still tells what it had.
    report: dict[str, Any] = {"status": "failed"}
    if result.exists():
        report = json.loads(result.read_text(encoding="utf-8"))
    if code != 0:
        why = f"no result within {limit_s:.0f} s" if code is None else f"exit code {code}"
        report |= {"status": "failed", "why": f"{why}; see {log.name}", "log": _tail(log)}
    return report | {"seconds": time.monotonic() - started}


def environment(*, dry: bool) -> dict[str, str]:
    """The stage's environment: no network, and the interpreter in a dry run."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    chosen = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    if dry:
        return chosen | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    chosen.pop("TRITON_INTERPRET", None)
    return chosen


def render(reports: dict[str, dict[str, Any]], *, dry: bool) -> str:
    """The report as Markdown: a section per stage, tables where a stage gives rows."""
    parts = ["# GPU report" + (" (dry run: these numbers mean nothing)" if dry else "")]
    for name, report in reports.items():
        parts.append(f"\n## {name}: {report['status']} ({report['seconds']:.0f} s)\n")
        if "why" in report:
            parts.append(report["why"])
        for title, rows in report.get("tables", {}).items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            parts.append(f"{title}\n\n```\n{measure.table(rows, columns)}\n```")
        parts += [f"- {key}: {value}" for key, value in report.get("facts", {}).items()]
        if "log" in report:
            parts.append(f"```\n{report['log']}\n```")
    return "\n".join(parts) + "\n"


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
