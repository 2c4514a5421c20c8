"""What bounds a step, and what the stream carries: `python -m bench.pipeline [fakes|roles|wire|real …]`.

fakes   stages of known length (log-normal completions): step time over the slowest stage, by lookahead, and without it
        in parts (algorithm.stream_mini_batches)
roles   an annealed run of the same stages whose processes keep their roles, or work where work is
wire    completions of 512 tokens a second over loopback, with and without CURVE, and memory
real    the embedded family, generation and training in processes of their own, lookahead 1 against 0

Every row has the machine's load average: where others use the processors, quote ratios of rows made side by side.
"""

import argparse
from typing import Any

from bench.measure import record, table
from bench.pipeline.fakes import Roles, measure, measure_roles
from bench.pipeline.real import measure as measure_real
from bench.pipeline.wire import measure as measure_wire

PARTS = ("fakes", "roles", "wire", "real")


def fakes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lookaheads and ratios; the speed-up is that over lookahead 0 of the same ratio, whole steps."""
    rows = []
    for ratio in options.ratios:
        alone = 0.0
        for lookahead, in_parts in ((0, False), (0, True), (1, False), (2, False)):
            row = measure(lookahead, ratio, steps=options.steps, train_s=options.train_s, in_parts=in_parts)
            alone = alone or row["step_s"]
            rows.append(row | {"speed_up": alone / row["step_s"]})
    return rows


def roles(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same number of workers: dedicated, handed over in the end, and exploring at the start as well."""
    cases: tuple[Roles, ...] = ("dedicated", "end only", "handover")
    return [measure_roles(case, steps=options.steps, train_s=options.train_s) for case in cases]


def wire(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Without and with CURVE."""
    return [
        measure_wire(curve=curve, workers=options.workers, seconds=options.seconds, limit=1_000_000)
        for curve in (False, True)
    ]


def real(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The embedded family, lookahead 0 and 1 in turn, by seed."""
    return measure_real(options.rounds, options.real_steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", choices=(*PARTS, []), default=PARTS)
    add("--ratios", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of generation to training (fakes)")
    add("--steps", type=int, default=20, help="steady steps of each case (fakes)")
    add("--train-s", type=float, default=0.4, help="seconds of training (fakes)")
    add("--workers", type=int, default=1, help="explorer processes (wire)")
    add("--seconds", type=float, default=60.0, help="longest measurement (wire)")
    add("--rounds", type=int, default=3, help="seeds (real)")
    add("--real-steps", type=int, default=40)
    options = parser.parse_args()
    for part in options.parts:
        rows = {"fakes": fakes, "roles": roles, "wire": wire, "real": real}[part](options)
        print(table(rows, [name for name in rows[0] if not isinstance(rows[0][name], list)]), flush=True)
        print(f"recorded in {record('pipeline', rows)}", flush=True)


if __name__ == "__main__":
    main()
