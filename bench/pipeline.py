"""What bounds a step, and what the stream carries: `python -m bench.pipeline [fakes|roles|wire|real …]`.

fakes   stages of known length (log-normal completions): step time over the slowest stage, by lookahead
roles   an annealed run of the same stages whose explorer stays idle in the end, or is handed over
wire    completions of 512 tokens a second over loopback, with and without CURVE, and memory
real    the embedded family, generation and training in processes of their own, lookahead 1 against 0

Every row has the machine's load average: where others use the processors, quote ratios of rows made side by side.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import pipeline_fakes, pipeline_wire
from bench.measure import record, table
from core.metrics import is_evaluation, read_metrics

PARTS = ("fakes", "roles", "wire", "real")
REPOSITORY = Path(__file__).resolve().parents[1]
WARM_STEPS = 3


def fakes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lookaheads and ratios; the speed-up is that over lookahead 0 of the same ratio."""
    rows = []
    for ratio in options.ratios:
        alone = 0.0
        for lookahead in (0, 1, 2):
            row = pipeline_fakes.measure(lookahead, ratio, steps=options.steps, train_s=options.train_s)
            alone = row["step_s"] if lookahead == 0 else alone
            rows.append(row | {"speed_up": alone / row["step_s"]})
    return rows


def roles(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same number of workers, dedicated and handed over."""
    return [
        pipeline_fakes.measure_roles("dedicated", steps=options.steps, train_s=options.train_s),
        pipeline_fakes.measure_roles("handover", steps=options.steps, train_s=options.train_s),
    ]


def wire(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Without and with CURVE."""
    return [
        pipeline_wire.measure(curve=curve, workers=options.workers, seconds=options.seconds, limit=1_000_000)
        for curve in (False, True)
    ]


def real(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The embedded run, lookahead 0 and 1 in turn; medians over the steps after the first ones."""
    rows = []
    for number in range(options.rounds):
        for lookahead in (0, 1):
            rows.append(_real(lookahead, number, options.real_steps))
    return rows


def _real(lookahead: int, number: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="s2l-") as folder:
        words = [f"run.dir={folder}/run", f"algorithm.lookahead={lookahead}", f"algorithm.steps={steps}"]
        words += [f"algorithm.anneal_steps={steps // 4}", f"checkpoint.every={steps}", "data.eval="]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, str(REPOSITORY / "trainer" / "main.py"), *words]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [line for line in read_metrics(Path(folder) / "run") if not is_evaluation(line)]
    steady, last = lines[WARM_STEPS:], lines[-max(steps // 5, 1) :]
    return {
        "case": "real", "lookahead": lookahead, "round": number, "steps": steps,
        "step_s": statistics.median(line["step_time"] for line in steady),
        "wait_s": statistics.median(line["time/wait_for_batch"] for line in steady),
        "tokens_per_s": statistics.median(line["tokens_per_second"] for line in steady),
        "mixed_versions": statistics.mean(line["off_policy/mixed_versions"] for line in steady),
        "last_reward": statistics.mean(line["reward"] for line in last), "loadavg": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", choices=(*PARTS, []), default=PARTS)
    add("--ratios", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of generation to training (fakes)")
    add("--steps", type=int, default=20, help="steady steps of each case (fakes)")
    add("--train-s", type=float, default=0.4, help="seconds of training (fakes)")
    add("--workers", type=int, default=1, help="explorer processes (wire)")
    add("--seconds", type=float, default=60.0, help="longest measurement (wire)")
    add("--rounds", type=int, default=3, help="repetitions (real)")
    add("--real-steps", type=int, default=20)
    options = parser.parse_args()
    for part in options.parts:
        rows = {"fakes": fakes, "roles": roles, "wire": wire, "real": real}[part](options)
        print(table(rows, [name for name in rows[0] if not isinstance(rows[0][name], list)]), flush=True)
        print(f"recorded in {record('pipeline', rows)}", flush=True)


if __name__ == "__main__":
    main()
