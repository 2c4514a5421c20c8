"""Stages of `bench.gpu` that take the system apart (`parts`) or run the whole trainer as its users do."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.kernel_problem import Problem
from bench.kernel_times import shares
from bench.rivals import ours
from kernels import products, row_triton
from kernels.arguments import LossRows, LossSettings
from kernels.rows import RowWeights

ROOT = Path(__file__).resolve().parents[1]
TILES = [(8, 2048), (8, 4096), (8, 8192), (16, 8192), (32, 16384)]
QWEN3 = {"vocab_size": 151_936, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "tie_word_embeddings": True}  # fmt: skip
LEARNER = {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144}
EXPLORER = {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072}
TOY = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
       "head_dim": 32, "tie_word_embeddings": True, "hidden_size": 64, "intermediate_size": 96}  # fmt: skip
TIMES = ("time/wait_for_batch", "time/score", "time/train", "time/publish")
Report = dict[str, Any]


def save(name: str, out: Path, report: Report) -> None:
    """Write what a stage has so far."""
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parts(dry: bool) -> Report:
    """Row kernel by block and warps, products by chunk, and the shares of a whole pass."""
    device = "cpu" if dry else "cuda"
    size = (2, 8, 16, 257) if dry else (8, 1024, 4096, 151_936)
    dtype = torch.float32 if dry else torch.bfloat16
    problem = Problem.make(*size, dtype=dtype, device=device)
    chunks = [16] if dry else [2048, 4096, 8192]
    tables = {
        "row kernel": [row for fp32 in (True, False) for row in _row_kernel(problem, chunks[0], fp32)],
        "products": [row for count in chunks for row in _products(problem, count)],
        "a whole pass": shares(ours("triton")(problem)),
    }
    return {"status": "ok", "tables": tables}


def _row_kernel(problem: Problem, count: int, fp32: bool) -> list[dict[str, Any]]:
    """Loss kernel over `count` rows; traffic is one read and one write, a second read comes from cache or shows."""
    width = problem.weight.shape[0]
    kind = torch.float32 if fp32 else problem.weight.dtype
    logits = torch.randn(count, width, device=problem.hidden.device).to(kind)
    zeros = torch.zeros(count, device=logits.device)
    rows, weights = LossRows(zeros, zeros + 1), RowWeights(zeros + 1, None)
    arguments = (logits, problem.targets[:count], zeros + 1, rows, weights, LossSettings(), problem.weight.dtype)
    before = row_triton.LINE_BYTES, row_triton.GRADIENT_BLOCK, dict(row_triton.ROW_OPTIONS)
    found = []
    for warps, block in TILES if logits.is_cuda else TILES[:1]:
        row_triton.LINE_BYTES, row_triton.GRADIENT_BLOCK = warps * 32 * 16, block
        row_triton.ROW_OPTIONS["num_warps"] = warps
        seconds = measure.interleave(
            {"k": lambda: row_triton.loss_and_gradient(*arguments)}, rounds=9 if logits.is_cuda else 1
        )["k"]
        moved = count * width * (kind.itemsize + problem.weight.dtype.itemsize)
        time_s = measure.summary(seconds)["median_s"]
        found.append({"logits": str(kind)[6:], "warps": warps, "block": block, "ms": time_s * 1e3,
                      "gb_per_s": moved / time_s / 1e9})  # fmt: skip
    row_triton.LINE_BYTES, row_triton.GRADIENT_BLOCK, row_triton.ROW_OPTIONS = before
    return found


def _products(problem: Problem, count: int) -> list[dict[str, Any]]:
    """Rate of each of the three products on a chunk of `count` rows."""
    hidden, weight = problem.hidden[:count], problem.weight
    narrow = torch.zeros(count, weight.shape[0], device=hidden.device, dtype=hidden.dtype)
    wide = torch.zeros(count, weight.shape[0], device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape, device=hidden.device)
    cases = {
        "logits, float32": lambda: products.logits(hidden, weight, wide),
        "logits, half": lambda: products.logits(hidden, weight, narrow),
        "d_hidden": lambda: products.hidden_gradient(narrow, weight, d_hidden),
        "d_hidden, rows two widths apart": lambda: products.hidden_gradient(
            wide.view(hidden.dtype)[:, : weight.shape[0]], weight, d_hidden
        ),
        "d_weight, first": lambda: products.weight_gradient(narrow, hidden, d_weight, first=True),
        "d_weight, added": lambda: products.weight_gradient(narrow, hidden, d_weight, first=False),
    }
    work = 2 * count * weight.numel()
    return [
        {"product": name, "rows": count, "ms": s["median_s"] * 1e3, "tflops": work / s["median_s"] / 1e12}
        for name, s in ((n, measure.summary(t)) for n, t in measure.interleave(cases, rounds=5).items())
    ]


def embedded_default(out: Path, dry: bool) -> Report:
    """The embedded default on the GPU: torchrun trainer/main.py with few steps."""
    settings = ["algorithm.steps=6", "algorithm.anneal_steps=4", "evaluation.problems=32"]
    return train(out / "default_run", settings, dry)


def end_to_end(out: Path, dry: bool) -> Report:
    """Learner of 1.7B and explorer of 0.6B parameters with random weights on one GPU, at lookahead 0 and 1."""
    report: Report = {"status": "ok", "tables": {}, "facts": {}}
    with tempfile.TemporaryDirectory(dir=measure.scratch()) as folder:
        models = {name: Path(folder) / name for name in ("learner", "explorer")}
        make_model(models["learner"], TOY if dry else LEARNER, dry)
        make_model(models["explorer"], TOY if dry else EXPLORER, dry)
        tokens = 24 if dry else 512
        settings = [
            *(f"{name}.model={path}" for name, path in models.items()), "learner.dtype=bfloat16",
            "learner.gradient_checkpointing=true", "learner.micro_batch_tokens=16384", "rollout.memory_share=0.4",
            f"rollout.max_response_tokens={tokens}", "algorithm.steps=4", "algorithm.anneal_steps=3",
            "algorithm.prompts_per_step=16", "algorithm.mini_batch_prompts=8", "data.eval=", "checkpoint.every=1000",
        ]  # fmt: skip
        for lookahead in (0, 1):
            run = Path(folder) / f"lookahead_{lookahead}"
            done = train(run, [*settings, f"algorithm.lookahead={lookahead}"], dry)
            if done["status"] != "ok":
                return report | done
            for kind in ("tables", "facts"):
                named = {f"lookahead {lookahead}: {name}": value for name, value in done.get(kind, {}).items()}
                report[kind] |= named
            save("end_to_end", out, report)
            for name in () if dry else ("metrics.jsonl", "trace.json"):
                shutil.copy(run / name, out / f"{run.name}_{name}")
            shutil.rmtree(run, ignore_errors=True)  # its checkpoint takes 24 GB
    return report


def make_model(folder: Path, shape: dict[str, Any], dry: bool) -> None:
    """A Qwen3 of the given shape with random weights and the tokenizer of the embedded task."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from core.countdown import EOS_ID, PAD_ID
    from trainer.pretrain import build_tokenizer

    config = Qwen3Config(
        **shape, max_position_embeddings=2048, eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if dry else "cuda"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the trainer, another process, needs the memory
    build_tokenizer(2048).save_pretrained(folder)


def train(run_dir: Path, settings: list[str], dry: bool) -> Report:
    """One run of the trainer as a user starts it, its own numbers, and the most GPU memory in use meanwhile."""
    device = "cpu" if dry else "cuda"
    launch = [] if dry else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    end = ["--dry-run"] if dry else ["--clean"]
    command = [
        sys.executable,
        *launch,
        "trainer/main.py",
        f"run.dir={run_dir}",
        f"run.device={device}",
        *settings,
        *end,
    ]
    with GpuMemory() as memory:
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"status": "failed", "why": f"the trainer ended with {done.returncode}", "log": done.stderr[-3000:]}
    if dry:
        return {"status": "ok", "facts": {"plan": done.stdout.splitlines()[0]}}
    return {"status": "ok", "facts": {"peak_gpu_memory_mb": memory.peak_mb}, **read_metrics(run_dir / "metrics.jsonl")}


def read_metrics(file: Path) -> Report:
    """Speed and shares of time per training step, the first step apart: it pays for start-up."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    rows = []
    for line in steps:
        row = {"step": line["step"], "tokens_per_second": line["tokens_per_second"], "step_s": line["step_time"]}
        rows.append(row | {key.removeprefix("time/") + "_share": line.get(key, 0) / line["step_time"] for key in TIMES})
    return {"tables": {"steps": rows}}


class GpuMemory:
    """The most memory in use on the first GPU while the block runs, by nvidia-smi, in MB; None without one."""

    def __init__(self) -> None:
        self.peak_mb: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "GpuMemory":
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not self._over.wait(0.5):
            said = subprocess.run(query, capture_output=True, text=True, check=False)
            if said.returncode == 0:
                self.peak_mb = max(self.peak_mb or 0, int(said.stdout.split()[0]))
