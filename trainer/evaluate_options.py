"""The command line of `python -m trainer.evaluate`."""

import argparse
from pathlib import Path

import torch

from rollout.torch_engine import DTYPES
from trainer.benchmarks import BENCHMARKS, MODES, find_benchmark


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for an option out of its bounds; fills in the k."""
    for name in options.benchmarks:
        find_benchmark(name)
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples} must be at least 1")
    # Powers of two up to the number of samples, unless asked for others.
    options.k = options.k or [2**power for power in range(options.samples.bit_length())]
    for k in options.k:
        if not 1 <= k <= options.samples:
            raise ValueError(f"--k {k}: each k must be between 1 and --samples {options.samples}")
    if options.temperature is not None and not options.temperature > 0:
        raise ValueError(f"--temperature {options.temperature}: sampling needs a temperature above 0, such as 1.0")
    for name in ("problems", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 0")
    for name in ("max_tokens", "batch_rows", "workers", "tensor_parallel"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if not options.score_timeout > 0:
        raise ValueError(f"--score-timeout {options.score_timeout} must be above 0 seconds")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description="Measure pass@k of a model.")
    add = parser.add_argument
    add("model", help="Hugging Face directory, embedded:learner or embedded:explorer")
    add("--benchmarks", nargs="+", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--data", type=Path, help="directory with NAME.parquet, NAME.jsonl or a folder NAME of each benchmark")
    add("--out", type=Path, help="directory to write and to continue (runs/evaluations/MODEL-FINGERPRINT/MODE)")
    add("--samples", type=int, default=16, help="completions per problem, n of pass@k (16)")
    add("--k", type=int, nargs="+", help="the k of pass@k (powers of two up to --samples)")
    add("--mode", choices=list(MODES), default="nothink", help="the published settings of Qwen3's modes (nothink)")
    add("--temperature", type=float, help="instead of the mode's (countdown: 1.0)")
    add("--max-tokens", type=int, help="longest completion (the benchmark's, or what fits the model)")
    add("--problems", type=int, default=0, help="only the first so many; 0 is all (0)")
    add("--seed", type=int, default=0, help="of sampling, embedded problems and embedded models (0)")
    add(
        "--engine", choices=["auto", "torch", "vllm"], default="auto", help="vLLM on a GPU where it is installed (auto)"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=sorted(DTYPES), help="working precision (bfloat16 on cuda, float32 on cpu)")
    add("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads over (1)")
    add("--batch-rows", type=int, help="completions generated at once (1024 with torch, all with vLLM)")
    add("--workers", type=int, default=1, help="scoring processes (1)")
    add("--score-timeout", type=float, default=20.0, help="seconds for the strict check of one completion (20)")
    return parser
