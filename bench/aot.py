"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 with no GPU: registers, spills and shared memory of each.

python -m bench.aot            table, and a row per kernel and chip in bench/results/aot.jsonl
python -m bench.aot --json     the same rows as one JSON array on stdout, recorded nowhere
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
VOCABULARY = 151_936
REGISTERS_PER_SM = 65536
SHARED_PER_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Largest shared memory of one thread block, bytes (CUDA programming guide, compute capabilities)."""

FLOATS = ("low", "high", "dual_clip", "kl_coef", "eps", "fill")
INTEGERS = ("row_stride", "out_stride", "columns", "tokens_count", "width")
OPTIONAL = ("is_weight", "ref", "kl_weight", "mask", "grad_entropy")
LONGS = ("targets", "offsets", "kept", "index", "positions", "rows", "owner", "prompt_lengths", "answer_offsets")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: argument types that differ from the rule, constants, arguments left out."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    absent: tuple[str, ...] = ()
    warps: int = 4
    options: tuple[tuple[str, Any], ...] = ()


def variants() -> list[Variant]:
    """Every kernel, in the dtypes and options that training uses."""
    from kernels import linear_logprob as head
    from kernels import policy_loss, ragged
    from kernels.ragged_triton import TOKEN_BLOCK
    from kernels.row_triton import GRADIENT_BLOCK, RATIOS, ROW_OPTIONS, SCALE_BLOCK
    from kernels.row_triton import tile as row_tile

    found, width = [], (ROW_OPTIONS["num_warps"], tuple(ROW_OPTIONS.items()))
    asked = ("", (), ("token", "cispo")), (", no options", OPTIONAL, ("token",))
    for logits, out in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
        types = {"logits": f"*{logits}", "out": f"*{out}"}
        name = f"{logits} to {out}"
        tile = row_tile(4 if logits == "fp32" else 2, VOCABULARY)
        block = {"BLOCK": GRADIENT_BLOCK}
        if logits != out or logits == "bf16":
            found.append(Variant(f"statistics {logits}", head.statistics_kernel, tile, types, (), *width))
        for suffix, absent, ratios in asked:
            label = name + suffix
            found.append(Variant(f"gradient {label}", head.gradient_kernel, block, types, absent, *width))
            for ratio in ratios:
                constants = {**tile, **block, "RATIO": RATIOS[ratio]}
                found.append(Variant(f"{ratio} loss {label}", head.loss_kernel, constants, types, absent, *width))
    for out in ("bf16", "fp32"):
        types = {"source": "*fp32", "factor": "*fp32", "out": f"*{out}", "size": "i64"}
        found.append(Variant(f"scale to {out}", head.scale_kernel, {"BLOCK": SCALE_BLOCK}, types))
    for ratio, number in RATIOS.items():
        constants = {"BLOCK": TOKEN_BLOCK, "RATIO": number}
        found.append(Variant(f"policy loss {ratio}", policy_loss.policy_loss_kernel, constants, {"tokens": "i32"}))
    block = {"BLOCK": TOKEN_BLOCK}
    found.append(Variant("mean log-ratio", ragged.mean_log_ratio_kernel, block, {"share": "*fp32"}))
    found.append(Variant("segment sum", ragged.segment_sum_kernel, block, {}, ("spread",)))
    found.append(Variant("segment total", ragged.segment_sum_kernel, block, {}, ("out",)))
    found.append(Variant("group advantage", ragged.group_advantage_kernel, {**block, "DIVIDE": True}, {}))
    found.append(Variant("keep list", ragged.keep_list_kernel, block, {}))
    found.append(Variant("pack", ragged.pack_kernel, block, {"tokens": "*i64"}))
    found.append(Variant("unpack", ragged.unpack_kernel, block, {}))
    return found


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Registers per thread, spilled bytes and shared memory per block of one kernel on one chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for place, name in enumerate(variant.kernel.arg_names):
        if name in variant.absent or name in variant.constants:
            signature[name], constants[(place,)] = "constexpr", variant.constants.get(name)
            continue
        signature[name] = variant.types.get(name) or _type(name)
        if signature[name].startswith("*") or name in INTEGERS:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": variant.warps, **dict(variant.options)}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = assemble(built.asm["ptx"], capability)
    return {
        "kernel": variant.label,
        "function": variant.kernel.__name__,
        "chip": CHIPS[capability],
        "warps": variant.warps,
        "shared_bytes": built.metadata.shared,
        **report,
        "reductions": reductions(built.asm["ttgir"]),
    }


def reductions(ttgir: str) -> list[str]:
    """What each reduction of a kernel runs over: shape and, in full, which thread holds which element.

    Kernels that must round alike have equal lists: a compiler that spreads a row over threads in another way adds it
    up in another order.
    """
    layouts = dict(re.findall(r"^(#blocked\d*) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r"^\s*}\) : \((tensor<.*?>)\) -> ", ttgir, re.MULTILINE)
    return [re.sub(r"#blocked\d*", lambda name: layouts[name[0]], operand) for operand in operands]


def assemble(ptx: str, capability: int) -> dict[str, int]:
    """What ptxas says of a kernel's PTX."""
    import triton

    nvidia = triton.knobs.nvidia
    tool = (getattr(nvidia, "ptxas_blackwell", nvidia.ptxas) if capability >= 100 else nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kernel.ptx"
        place.write_text(ptx, encoding="utf-8")
        command = [tool, "-v", f"--gpu-name={CHIPS[capability]}", str(place), "-o", str(place.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": _number(r"Used (\d+) registers", said),
        "spill_stores": _number(r"(\d+) bytes spill stores", said),
        "spill_loads": _number(r"(\d+) bytes spill loads", said),
        "stack_bytes": _number(r"(\d+) bytes stack frame", said),
    }


def problems(row: dict[str, Any]) -> list[str]:
    """What would make the kernel slow or refuse to launch: spills, or more than the chip has."""
    capability = next(number for number, name in CHIPS.items() if name == row["chip"])
    found = [f"{row[key]} bytes of {key}" for key in ("spill_stores", "spill_loads", "stack_bytes") if row[key]]
    if row["registers"] * row["warps"] * 32 > REGISTERS_PER_SM:
        found.append(f"{row['registers']} registers × {row['warps'] * 32} threads exceed {REGISTERS_PER_SM}")
    if row["shared_bytes"] > SHARED_PER_BLOCK[capability]:
        found.append(f"{row['shared_bytes']} bytes of shared memory exceed {SHARED_PER_BLOCK[capability]}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and record nothing")
    options = parser.parse_args(arguments)
    # The interpreter replaces the compiler when this is set before the kernels' modules load.
    os.environ.pop("TRITON_INTERPRET", None)
    rows = [compile_variant(variant, capability) for variant in variants() for capability in CHIPS]
    faults = [f"{row['kernel']} on {row['chip']}: {fault}" for row in rows for fault in problems(row)]
    if options.json:
        print(json.dumps(rows))
    else:
        from bench import measure

        for row in rows:
            del row["reductions"]
        print(measure.table(rows, ["kernel", "chip", "warps", "registers", "spill_stores", "shared_bytes"]))
        print(f"appended to {measure.record('aot', rows)}")
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def _type(name: str) -> str:
    if name in FLOATS:
        return "fp32"
    if name in INTEGERS:
        return "i32"
    if name == "mask":
        return "*i1"
    return "*i64" if name in LONGS else "*fp32"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"ptxas printed nothing like {pattern!r}: {text[:500]!r}")
    return int(found.group(1))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
