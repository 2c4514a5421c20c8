"""The stages of `bench.gpu`: python -m bench.gpu_stages STAGE DIR [--dry] writes DIR/STAGE.json.

A stage's report: status ("ok", "missing" with "why"), facts (name: value) and tables (title: rows).
"""

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import gpu_runs, gpu_sizes, measure
from bench.contenders import contenders
from bench.gpu_runs import save
from bench.kernel_problem import Objective, Problem
from bench.kernels import BASE, DRY, OPTIONS, compare, tabulate
from kernels import ops
from trainer import attention
from trainer.line import lay_out

PACKAGES = ("vllm", "deepspeed", "flash_attn", "liger_kernel", "cut_cross_entropy", "verl", "trl", "quack", "cutlass")
SLOW = {"torch.compile", "Liger fused GRPO", "CCE filtered", "ours triton bf16 logits main_grad"}
"""What `options` leaves out: compiled for each table anew, slower than its TF32 variant, or beside another of its kind.
"""
Report = dict[str, Any]


def machine(out: Path, dry: bool) -> Report:
    """Device, versions, and the packages whose absence will show below."""
    facts: dict[str, Any] = measure.environment()
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        facts |= {"memory_gb": chip.total_memory / 2**30, "processors": chip.multi_processor_count}
        facts["capability"] = f"{chip.major}.{chip.minor}"
    elif not dry:
        return {"status": "missing", "why": "torch sees no CUDA device", "facts": facts}
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return {"status": "ok", "facts": {**facts, "not installed": ", ".join(absent) or "nothing"}}


def values(out: Path, dry: bool) -> Report:
    """Our kernels and eager PyTorch against float64, and what must hold exactly."""
    device, size = ("cpu", (2, 4, 16, 300)) if dry else ("cuda", (8, 512, 1024, 151_936))
    problem = Problem.make(*size, dtype=torch.float32 if dry else torch.bfloat16, device=device)
    mine = [c for c in contenders("cuda") if c.name.startswith("ours")]
    eager = [c for c in contenders(device) if c.name == "torch eager"]
    rows, absent = compare(problem, mine + eager, rounds=1, device="cuda")
    attended = attention_errors(device)
    checks = exact_checks(problem) | attention_check(attended)
    faults = [name for name, holds in checks.items() if not holds] + list(absent)
    report: Report = {"status": "failed" if faults else "ok", "facts": {**checks, **absent}}
    if faults:
        report["why"] = "does not hold: " + ", ".join(faults)
    tables = {"error against float64 (relative L2)": rows, "packed attention, the same": attended}
    return report | {"tables": tables}


def attention_errors(device: str) -> list[dict[str, Any]]:
    """Packed attention as the learner runs it here, and SDPA one segment at a time in the same dtype, against float64.

    Some rows of the line share their prompt.
    """
    heads, shared, size = (4, 2, 32) if device == "cpu" else (32, 8, 128)
    cases = [(5, (1, 9)), (1, (40,))] if device == "cpu" else [(300, (777, 1, 130)), (1, (4096,)), (64, (64, 900))]
    rows = [((slot,) * prompt, np.zeros(n, np.int32)) for slot, (prompt, sizes) in enumerate(cases) for n in sizes]
    inputs: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in lay_out(rows, share=True).inputs.items()
    }
    length = inputs.pop("input_ids").shape[1]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, h, length, size) for h in (heads, shared, shared, heads)]
    query, key, value, upstream = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)

    def run(attend: Callable[..., Any], kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in (query, key, value)]
        out = attend(*leaves)
        out.backward(upstream.to(kind).transpose(1, 2))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.packed_attention(torch.nn.Module(), q, k, v, None, **inputs)[0]

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pieces = []
        bounds = [list(pairwise(inputs[name].tolist())) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
        for (start, stop), (first, last) in zip(*bounds):
            places = inputs["key_index"][first:last]
            sees = torch.ones(stop - start, last - first, dtype=torch.bool, device=device).tril(
                last - first - stop + start
            )
            own = (q[:, :, start:stop], k[:, :, places], v[:, :, places])
            pieces.append(scaled_dot_product_attention(*own, attn_mask=sees, enable_gqa=True))
        return torch.cat(pieces, dim=2).transpose(1, 2)

    truth = run(one_by_one, torch.float64)
    names = ("out", "d_query", "d_key", "d_value")
    return [
        {"case": case, "dtype": str(dtype)[6:]}
        | {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, run(attend, dtype), truth)}
        for case, attend in (("packed", packed), ("SDPA row by row", one_by_one))
    ]


def attention_check(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Packing may not cost precision: at most 1.2 times SDPA's own error."""
    packed, single = rows
    return {
        f"packed attention: {name} as exact as SDPA": packed[name] <= 1.2 * single[name] + 1e-6
        for name in ("out", "d_query", "d_key", "d_value")
    }


def exact_checks(problem: Problem) -> dict[str, bool]:
    """Bit-for-bit promises: the on-policy ratio, equal runs, and the last rows of a batch beyond 2^31 logits."""
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    advantage, bounds = problem.rows().advantage, problem.rows().bounds
    checks = {}
    for fp32 in (True, False):
        kind = "float32 logits" if fp32 else "half logits"
        options: dict[str, Any] = {"impl": "triton", "fp32_logits": fp32}
        with torch.no_grad():
            anchor = ops.linear_logprob(hidden, weight, targets, **options).logprob
        for ratio in ("token", "sequence", "cispo"):
            leaf = hidden.detach().requires_grad_()
            runs = [
                ops.linear_policy_loss(
                    leaf, weight, targets, anchor, advantage, ratio=ratio, cu_seqlens=bounds, **options
                )
                for _ in range(2)
            ]
            checks[f"ratio is 1 on policy ({ratio}, {kind})"] = bool((runs[0][3]["ratio"] == 1).all())
            checks[f"two runs are equal ({ratio}, {kind})"] = bool((runs[0][0] == runs[1][0]).all())
    if hidden.is_cuda:
        many = 20_480
        states, labels = hidden.repeat(many // len(hidden), 1), targets.repeat(many // len(targets))
        last = ops.linear_logprob(
            states.requires_grad_(), weight, labels, impl="triton", fp32_logits=False, resident=True
        )
        wanted = ops.linear_logprob(hidden, weight, targets, impl="triton", fp32_logits=False).logprob
        checks["rows beyond 2^31 logits"] = bool(torch.equal(last.logprob[-len(hidden) :], wanted))
    return checks


def rows(out: Path, dry: bool) -> Report:
    """Time of the row kernel by block and warps, of each product by chunk, and of the whole by part."""
    return gpu_runs.parts(dry)


def table(out: Path, dry: bool) -> Report:
    """`bench.kernels` at 16,384 and 4,096 tokens; the big one first, in case time runs out."""
    return _tables("table", out, dry, [(count, False, BASE) for count in ((16,) if dry else (16, 4))], rounds=10)


def options(out: Path, dry: bool) -> Report:
    """`bench.kernels` with each option, packed at 8,192 tokens, else 4,096; the slowest contenders left out."""
    return _tables("options", out, dry, [(8 if packed else 4, packed, what) for packed, what in OPTIONS], rounds=5)


def _tables(stage: str, out: Path, dry: bool, cases: list[tuple[int, bool, Objective]], *, rounds: int) -> Report:
    """A table per case (sequences of 1,024 tokens, packed or not, objective), saved as it comes."""
    report: Report = {"status": "ok", "tables": {}, "facts": {}}
    dtype, device = (torch.float32, "cpu") if dry else (torch.bfloat16, "cuda")
    # Compiling takes longer than the rest of a dry run, and `bench.kernels` runs it on a CPU.
    left_out = {"torch.compile"} if dry else SLOW if stage == "options" else set()
    chosen = [rival for rival in contenders(device) if rival.name not in left_out]
    for sequences, packed, objective in cases:
        size = DRY if dry else (sequences, 1024, 4096, 151_936)
        problem = Problem.make(*size, dtype=dtype, device=device, packed=packed, objective=objective)
        title, found, absent = tabulate(problem, chosen, rounds=2 if dry else rounds, folder=None if dry else out)
        report["tables"][title] = found
        for name, reason in absent.items():
            known = report["facts"].setdefault(f"missing: {name}", reason)
            if reason not in known:
                report["facts"][f"missing: {name}"] = f"{known}; {reason}"
        save(stage, out, report)
    return report


STAGES: dict[str, Callable[[Path, bool], Report]] = {
    "machine": machine, "values": values, "rows": rows, "table": table, "options": options,
    "default": gpu_runs.embedded_default, "end_to_end": gpu_runs.end_to_end,
    "train": gpu_sizes.train, "generate": gpu_sizes.generate,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    name, out, dry = arguments[0], Path(arguments[1]), "--dry" in arguments
    if name != "machine" and not dry and not torch.cuda.is_available():
        save(name, out, {"status": "missing", "why": "torch sees no CUDA device"})
        return 0
    save(name, out, STAGES[name](out, dry))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
