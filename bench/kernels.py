"""Ours against everybody else's fused head and GRPO loss, interleaved on the same inputs: time, memory, error,
equality.

    python -m bench.kernels [--tokens T] [--hidden H] [--vocabulary V] [--rounds N] [--only NAME ...] [--dry]

Hidden states to loss and both gradients. On a CPU the defaults take about two minutes at V = 151,936; on CUDA they
are 16,384 tokens and H = 4096 in bfloat16. Rows go to bench/results/kernels.jsonl, what is missing is printed with
the reason.
"""

import argparse
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.contenders import contenders
from bench.rivals import Case, Problem, Rival, ours

COLUMNS = [
    "case", "median_ms", "ratio", "extra_mb", "beyond_dw_mb", "d_hidden_error", "d_weight_error", "loss_error",
    "repeats",
]  # fmt: skip
SIZES = {"cpu": (4, 128, 128), "cuda": (16, 1024, 4096)}
"""Sequences, tokens of each, hidden size."""


def compare(
    problem: Problem, rivals: list[Rival], *, rounds: int, device: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per case that ran, and the reason for each that did not; `device` for kernels that are interpreted."""
    device = device or problem.hidden.device.type
    truth = ours("torch")(_exact(problem))()
    cases: dict[str, Case] = {}
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for rival in rivals:
        reason = rival.missing(device)
        if reason is None:
            try:
                case = rival.make(problem)
                rows[rival.name] = {"case": rival.name, **_quality(case, truth, problem, rival.same_loss)}
                cases[rival.name] = case
            except Exception as error:  # a rival may fail in any way on a shape or chip it does not know
                reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is not None:
            absent[rival.name] = reason
    seconds = measure.interleave(cases, rounds=rounds, warmup=0)  # _quality ran each three times
    first = next(iter(seconds))
    for name, row in rows.items():
        pairs = [theirs / own for theirs, own in zip(seconds[name], seconds[first])]
        summary = measure.summary(seconds[name])
        row |= {**summary, "median_ms": summary["median_s"] * 1e3, "ratio": statistics.median(pairs)}
    return list(rows.values()), absent


def _quality(case: Case, truth: tuple[Tensor, ...], problem: Problem, same_loss: bool) -> dict[str, Any]:
    """Errors against float64 (relative L2), whether two runs are equal, and the peak memory of a third."""
    first = tuple(t.clone() for t in case())  # main_grad is the same tensor in every run
    second = case()
    row: dict[str, Any] = {"repeats": all(torch.equal(a, b) for a, b in zip(first, second))}
    if same_loss:
        names = ("loss_error", "d_hidden_error", "d_weight_error")
        row |= {name: _relative(value, exact) for name, value, exact in zip(names, first, truth)}
    del first, second
    extra = measure.peak_bytes(case)
    if extra is not None:
        # The weight's gradient leaves every path in the weight's dtype; what else was live at the peak is the cost.
        result = problem.weight.numel() * problem.weight.element_size()
        row |= {"extra_mb": extra / 2**20, "beyond_dw_mb": (extra - result) / 2**20}
    return row


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _exact(problem: Problem) -> Problem:
    return Problem(
        problem.hidden.double(), problem.weight.double(), problem.targets, problem.anchor.double(),
        problem.advantage.double(), problem.sequences,
    )  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The CPU goals in words: at least 0.9 of eager's speed, at most a quarter of its memory beyond the weight
    gradient."""
    named = {row["case"]: row for row in rows}
    if not {"ours torch", "torch eager"} <= named.keys():
        return []
    mine, eager = named["ours torch"], named["torch eager"]
    said = [f"speed of eager autograd: {eager['ratio']:.2f}x (goal: at least 0.9x)"]
    if mine.get("beyond_dw_mb") is not None:
        share = mine["beyond_dw_mb"] / eager["beyond_dw_mb"]
        said.append(f"memory beyond the weight gradient: {share:.2f} of eager's (goal: at most 0.25)")
    return said


def main(arguments: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences, length, width = SIZES[device]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=sequences)
    parser.add_argument("--length", type=int, default=length, help="tokens of each sequence")
    parser.add_argument("--hidden", type=int, default=width)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5 if device == "cpu" else 20)
    parser.add_argument("--only", nargs="*", help="names of cases; ours always runs")
    parser.add_argument("--dry", action="store_true", help="a tiny problem, two rounds, nothing recorded")
    options = parser.parse_args(arguments)
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    size = (2, 8, 16, 257) if options.dry else (options.sequences, options.length, options.hidden, options.vocabulary)
    problem = Problem.make(*size, dtype=dtype, device=device)
    everyone = contenders(device)
    chosen = [r for r in everyone if options.only is None or r.name in options.only or r.name.startswith("ours")]
    rows, absent = compare(problem, chosen, rounds=2 if options.dry else options.rounds)
    shape = {"tokens": problem.tokens, "hidden": size[2], "vocabulary": size[3], "dtype": str(dtype)[6:]}
    print(f"{measure.environment()['device']}: {shape}")
    print(measure.table(rows, COLUMNS))
    print("ratio: median over rounds of time / time of the first row")
    if not options.dry:
        print("\n".join(verdict(rows)))
    for name, reason in absent.items():
        print(f"missing: {name}: {reason}")
    if not options.dry:
        print(f"appended to {measure.record('kernels', [{**row, **shape} for row in rows])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
