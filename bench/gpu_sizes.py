"""Stages of `bench.gpu` at the size users train: Qwen3-1.7B and 4B shapes with random weights."""

import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench import engines, learner, measure
from bench.gpu_runs import Report, save

COLUMNS = ("case", "tokens_per_s", "mfu", "median_s", "min_s", "peak_mb", "why")
# Plain torch keeps 20 bytes a parameter: at 4B more than an 80 GiB GPU has. The goal's size first: time may run out.
TRAINED = {
    "4b": ("torch packed, selective", "torch packed"),
    "1.7b": (
        "torch packed, selective",
        "torch packed",
        "torch packed, prompts shared",
        "plain hugging face",
        "torch packed, LoRA",
    ),
}
ROWS, NEW_TOKENS = ("64", "256"), "256"


def train(out: Path, dry: bool) -> Report:
    """`bench.learner`: an update of rows packed to 16,384 tokens in bf16; `mfu` is the goal of 45 % at 4B."""
    report: Report = {"status": "ok", "tables": {}, "facts": {"liger_kernel": bool(_installed("liger_kernel"))}}
    report["facts"]["flash_attn"] = bool(_installed("flash_attn"))
    for shape, names in {"tiny": ("torch packed",)}.items() if dry else TRAINED.items():
        rows: list[dict[str, Any]] = []
        report["tables"][f"training, {shape}"] = rows
        for row in learner.measure_cases(shape, names, ranks=1, rounds=1 if dry else 3):
            rows.append({column: row.get(column) for column in COLUMNS})
            for part in ("phases", "kernels"):
                if row.get(part):
                    report["tables"][f"{part} of an update: {row['case']}, {shape}"] = row[part]
            save("train", out, report)
    return report


def generate(out: Path, dry: bool) -> Report:
    """`bench.engines`: tokens per second and the time of a weight update, vLLM and the embedded engine."""
    report: Report = {"status": "ok", "tables": {}, "facts": {}}
    if not _installed("vllm"):
        report["facts"]["missing: vllm"] = "not installed"
    with tempfile.TemporaryDirectory(dir=measure.scratch()) as folder:
        for shape in ("tiny",) if dry else ("1.7b", "4b"):
            model = Path(folder) / shape
            learner.make_model(model, shape)
            rows: list[dict[str, Any]] = []
            report["tables"][f"generation, {shape}"] = rows
            sizes = ("8",) if dry else ROWS
            arguments = ("--rows", *sizes, "--rounds", "1", "--new-tokens", "8" if dry else NEW_TOKENS)
            # In a dry run vLLM would take longer than all the rest; tests of its own run it.
            for engine in (["vllm"] if _installed("vllm") and not dry else []) + ["torch"]:
                try:
                    rows += engines.in_child(engine, model, *arguments)
                except subprocess.CalledProcessError as error:
                    rows.append({"engine": engine, "why": f"exit code {error.returncode}; see generate.log"})
                save("generate", out, report)
    return report


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
