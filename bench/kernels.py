"""Ours against everybody else's fused head and GRPO loss, interleaved on the same inputs: time, memory, error,
equality.

    python -m bench.kernels [--sequences S] [--length L] [--hidden H] [--vocabulary V] [--rounds N] [--only NAME ...]
        [--packed] [--temperature T] [--kl-coef B] [--entropy-coef C] [--ratio token|sequence]
        [--mode train|frozen|score] [--dry]
    python -m bench.kernels --options   # the base case, packed, packed with every term, each option alone

Hidden states to loss and both gradients ("frozen": no gradient of the weight; "score": log-probs without grad). On a
CPU the base case takes about two minutes at V = 151,936; on CUDA it is 16,384 tokens and H = 4096 in bfloat16. Rows go
to bench/results/kernels.jsonl, what is missing is printed with the reason.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.contenders import contenders
from bench.kernel_problem import Mode, Objective, Problem
from bench.rivals import Case, Rival, ours

ERRORS: dict[Mode, tuple[str, ...]] = {
    "train": ("loss_error", "d_hidden_error", "d_weight_error"),
    "frozen": ("loss_error", "d_hidden_error"),
    "score": ("logprob_error",),
}
COLUMNS = ["case", "head_rows", "median_ms", "ratio", "extra_mb", "beyond_dw_mb"]
SIZES = {"cpu": (4, 128, 128), "cuda": (16, 1024, 4096)}
"""Sequences, tokens of each, hidden size."""
DRY = (2, 8, 16, 257)
BASE = Objective()
OPTIONS = (
    (True, BASE),
    (True, Objective(temperature=0.7, kl_coef=0.04, entropy_coef=0.001)),
    (False, Objective(ratio="sequence")),
    (False, Objective(mode="frozen")),
    (False, Objective(mode="score")),
    (False, Objective(temperature=0.7)),
    (False, Objective(kl_coef=0.04)),
    (False, Objective(entropy_coef=0.001)),
)
"""What `--options` runs after the base case: packed or not, objective."""


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
        reason = rival.missing(device, problem.objective)
        if reason is None:
            try:
                case = rival.make(problem)
                row = {"case": rival.name, "head_rows": rival.head_rows(problem)}
                rows[rival.name] = row | _quality(case, truth, problem, rival.same_loss)
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
        named = zip(ERRORS[problem.objective.mode], first, truth, strict=True)
        row |= {name: _relative(value, exact) for name, value, exact in named}
    del first, second
    extra = measure.peak_bytes(case)
    if extra is not None:
        row["extra_mb"] = extra / 2**20
        if problem.objective.mode == "train":
            # The weight's gradient leaves every path in the weight's dtype; what else was live at the peak is the cost.
            row["beyond_dw_mb"] = (extra - problem.weight.numel() * problem.weight.element_size()) / 2**20
    return row


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _exact(problem: Problem) -> Problem:
    names = ("hidden", "weight", "anchor", "reference", "advantage")
    return replace(problem, **{name: getattr(problem, name).double() for name in names})


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


def tabulate(
    problem: Problem, rivals: list[Rival], *, rounds: int, folder: Path | None
) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """What is compared in words, and what `compare` gives; with a `folder` the rows are appended to kernels.jsonl."""
    torch.compiler.reset()  # or what was compiled for the table before is specialised to its shapes
    rows, absent = compare(problem, rivals, rounds=rounds)
    shape = {
        "tokens": problem.tokens, "hidden": problem.hidden.shape[1], "vocabulary": problem.weight.shape[0],
        "dtype": str(problem.hidden.dtype)[6:], "options": options_of(problem),
    }  # fmt: skip
    if folder is not None:
        measure.record("kernels", [{**row, **shape} for row in rows], folder)
    return f"{shape}", rows, absent


def options_of(problem: Problem) -> str:
    """What differs from the base case, in words."""
    words = [*([] if problem.uniform else ["packed"]), *problem.objective.options.values()]
    return ", ".join(words) or "none"


def main(arguments: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options, cases = _parse(arguments, device)
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    size = DRY if options.dry else (options.sequences, options.length, options.hidden, options.vocabulary)
    everyone = contenders(device)
    chosen = [r for r in everyone if options.only is None or r.name in options.only or r.name.startswith("ours")]
    print(measure.environment()["device"])
    for packed, objective in cases:
        problem = Problem.make(*size, dtype=dtype, device=device, packed=packed, objective=objective)
        title, rows, absent = tabulate(
            problem,
            chosen,
            rounds=2 if options.dry else options.rounds,
            folder=None if options.dry else measure.RESULTS,
        )
        print(f"\n{title}\n{measure.table(rows, [*COLUMNS, *ERRORS[objective.mode], 'repeats'])}")
        if not options.dry and options_of(problem) == "none":
            print("\n".join(verdict(rows)))
        for name, reason in absent.items():
            print(f"missing: {name}: {reason}")
    print("ratio: median over rounds of time / time of the first row; head_rows: rows of logits that a case forms")
    return 0


def _parse(arguments: list[str], device: str) -> tuple[argparse.Namespace, list[tuple[bool, Objective]]]:
    """The command line, and the cases it asks for: packed or not, objective."""
    sequences, length, width = SIZES[device]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=sequences)
    parser.add_argument("--length", type=int, default=length, help="tokens of each sequence; of packed ones the mean")
    parser.add_argument("--hidden", type=int, default=width)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5 if device == "cpu" else 20)
    parser.add_argument("--only", nargs="*", help="names of cases; ours always runs")
    parser.add_argument("--packed", action="store_true", help="log-normal lengths, three rows in ten are prompts")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kl-coef", type=float, default=0.0, help="factor of the k3 penalty")
    parser.add_argument("--entropy-coef", type=float, default=0.0, help="factor of the entropy bonus")
    parser.add_argument("--ratio", choices=("token", "sequence"), default="token")
    parser.add_argument("--mode", choices=tuple(ERRORS), default="train")
    parser.add_argument("--options", action="store_true", help="the base case, then OPTIONS, one table each")
    parser.add_argument("--dry", action="store_true", help="a tiny problem, two rounds, nothing recorded")
    options = parser.parse_args(arguments)
    try:
        objective = Objective(options.temperature, options.kl_coef, options.entropy_coef, options.ratio, options.mode)
    except ValueError as error:
        parser.error(str(error))
    if options.options:
        if options.packed or objective != BASE:
            parser.error("--options chooses the options itself")
        return options, [(False, BASE), *OPTIONS]
    return options, [(options.packed, objective)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
