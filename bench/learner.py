"""A training step of the learner, by backend, ZeRO stage and packing, beside a plain Hugging Face step as TRL takes it.

    python -m bench.learner [--shape tiny|small|states|1.7b|4b] [--ranks N] [--rounds N] [--only CASE ...] [--dry]

Every case is a run of its own (N ranks under torchrun) on the same random weights and ragged rows: one update, from
tokens to new weights. The plain step pads its rows to the longest of each micro-batch and materialises the logits.
Tokens per second count prompts and completions, never padding; `held_mb` is what rank 0 holds between two updates,
`peak_mb` what its start and updates took at most. Rows go to bench/results/learner.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import kernel_times, measure
from core.config import Algorithm, Config, Loss, Rollout
from core.config import Learner as LearnerSettings
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from trainer.backend import Backend
from trainer.batch import StepBatch, pack_step
from trainer.learner import Learner
from trainer.models import DTYPES, load_model
from trainer.world import World

COLUMNS = ["case", "ranks", "tokens_per_s", "ratio", "median_s", "peak_mb", "held_mb", "computed", "loss", "mfu"]
ROWS, GROUP = 32, 8
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, NVIDIA's data sheets
# hidden, layers, query heads, key-value heads, head size, intermediate, vocabulary, longest completion
SHAPES = {
    "tiny": (64, 2, 2, 1, 32, 128, 512, 24),
    "small": (256, 4, 4, 2, 64, 768, 8192, 384),
    "states": (512, 4, 8, 4, 64, 1536, 16384, 96),  # most of its memory is what ZeRO shards
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151_936, 4096),
    "4b": (2560, 36, 32, 8, 128, 9728, 151_936, 4096),
}
CASES: dict[str, dict[str, Any]] = {
    "plain hugging face": {},
    "torch padded": {"backend": "torch"},
    "torch packed": {"backend": "torch", "packed": True},
    "torch packed, prompts shared": {"backend": "torch", "packed": True, "share": True},
    "torch packed, lines shared by 2": {"backend": "torch", "packed": True, "sequence_parallel": 2},
    "torch packed, selective": {"backend": "torch", "packed": True, "recompute": "selective"},
    **{f"zero {stage} packed": {"backend": "deepspeed", "zero_stage": stage, "packed": True} for stage in range(4)},
    **{f"zero {stage} padded": {"backend": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "torch packed, LoRA": {"backend": "torch", "packed": True, "lora_rank": 32},
}


def make_model(directory: Path, shape: str) -> None:
    """Random weights of a Qwen3 of this shape."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, longest = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=2 * longest, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM(config).to(config.dtype).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(directory)


def make_groups(shape: str) -> list[Group]:
    """Rows whose completions have log-normal lengths, as those of reasoning models do, cut at the longest."""
    *_, vocabulary, longest = SHAPES[shape]
    rng = np.random.default_rng(0)
    groups = []
    for slot in range(ROWS // GROUP):
        prompt_ids = tuple(rng.integers(0, vocabulary, longest // 8).tolist())
        prompt = Prompt(uid=str(slot), token_ids=prompt_ids, text="", answer="")
        rows = []
        for sample in range(GROUP):
            length = int(np.clip(rng.lognormal(np.log(longest / 4), 0.8), 1, longest))
            completion = Completion(
                key=CompletionKey(source=Source.EXPLORER, step=1, slot=slot, sample=sample), prompt_uid=prompt.uid,
                token_bytes=pack_tokens(rng.integers(0, vocabulary, length)), finish="stop", version=0, worker="",
                logprob_bytes=pack_logprobs(np.full(length, -np.log(vocabulary))), started_s=0.0, finished_s=0.0,
            )  # fmt: skip
            rows.append(ScoredCompletion(completion=completion, reward=0.0, text=""))
        advantages = tuple(rng.normal(size=GROUP).tolist())
        groups.append(Group(prompt=prompt, step=1, slot=slot, rows=tuple(rows), advantages=advantages))
    return groups


def make_config(case: dict[str, Any], shape: str) -> Config:
    """Explorer rows with the sampler as anchor and no KL: an update needs no other forward pass."""
    longest, cuda, parts = SHAPES[shape][-1], torch.cuda.is_available(), case.get("sequence_parallel", 1)
    settings = LearnerSettings(
        backend=case.get("backend", "torch"), zero_stage=case.get("zero_stage", 0),
        learning_rate=1e-6, warmup_updates=0, lora_rank=case.get("lora_rank", 0),
        dtype="bfloat16" if cuda else "float32", micro_batch_rows=4, gradient_checkpointing=cuda,
        micro_batch_tokens=4 * longest // parts if case.get("packed") else 0, recompute=case.get("recompute", "full"),
        share_prompts=case.get("share", False), sequence_parallel=parts,
    )  # fmt: skip
    algorithm = Algorithm(group_size=GROUP, prompts_per_step=ROWS // GROUP, mini_batch_prompts=ROWS // GROUP)
    rollout = Rollout(max_prompt_tokens=longest // 8, max_response_tokens=longest)
    return Config(algorithm=algorithm, loss=Loss(kl_coef=0.0), learner=settings, rollout=rollout)


class Step(NamedTuple):
    """A case: `run` makes one update and returns its loss; `backend` is that of our learner."""

    run: Callable[[], float]
    backend: Backend | None = None


def learner_step(config: Config, directory: Path, batch: StepBatch, world: World) -> Step:
    """One update of our learner."""
    learner = Learner.load(config, model_dir=directory, explorer_dir=None, world=world)
    learner.begin_step(batch)
    return Step(lambda: learner.update(batch.mini_batches[0])["loss"], learner.backend)


def plain_step(config: Config, directory: Path, batch: StepBatch, world: World) -> Step:
    """Padded rows, logits, log-softmax, PPO's clipped loss, gradient clipping, AdamW: the steps that TRL takes."""
    model = load_model(directory, dtype=DTYPES[config.learner.dtype], device=world.device, key="--shape")
    if config.learner.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    micro_batches = [micro.to(world.device) for micro in batch.mini_batches[0].micro_batches]

    def step() -> float:
        total = 0.0
        for micro in micro_batches:
            ids = micro.inputs["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            selected = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            width = ids.shape[1]  # of padded states, less the last of each row
            logprob = selected.flatten()[micro.state_T - micro.state_T // width]
            ratio = (logprob.float() - micro.sampler_T).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * micro.advantage_T, clipped * micro.advantage_T)
            capped = torch.minimum(loss, -3.0 * micro.advantage_T)
            loss = (torch.where(micro.advantage_T < 0, capped, loss) * micro.token_weight_T).sum()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Step(step)


def measure_cases(shape: str, names: Sequence[str], *, ranks: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case, in processes of its own; one that failed (too little memory, say) has `why` instead."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "bench.learner", "--shape", shape, "--rounds", str(rounds), "--child"]
    with tempfile.TemporaryDirectory(dir=measure.scratch()) as directory:
        make_model(Path(directory), shape)
        for name in names:
            done = subprocess.run([*command, name, directory], capture_output=True, text=True, env=_environment())
            found = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
            errors = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit code {done.returncode}"]
            yield json.loads(found[0]) if found else {"case": name, "shape": shape, "why": errors[-1][:300]}


def run_case(name: str, shape: str, directory: Path, rounds: int) -> None:
    """In a process of its own, maybe as one of several ranks: rank 0 prints one JSON object."""
    torch.set_num_threads(1)
    config = make_config(CASES[name], shape)
    world = World.join(line_size=config.learner.sequence_parallel)
    batch = pack_step(make_groups(shape), config, rank=world.rank, world_size=world.size)
    held, losses, before = list[Step](), list[float](), measure.held_bytes()

    def build() -> None:
        held.append((learner_step if CASES[name] else plain_step)(config, directory, batch, world))
        losses.extend(held[0].run() for _ in range(2))  # the first makes the optimizer's state, after its own peak

    peak = max(measure.peak_bytes(build) or 0, 0)
    run, backend = held[0]
    seconds = measure.interleave({name: run}, rounds=rounds)[name]
    summary = measure.summary(seconds)
    rows = [len(g.prompt.token_ids) + len(r.completion.tokens) - 1 for g in make_groups(shape) for r in g.rows]
    slots = sum(micro.inputs["input_ids"].numel() for micro in batch.mini_batches[0].micro_batches) * world.size
    found: dict[str, Any] = {
        "case": name, "shape": shape, "ranks": world.size, "tokens": sum(rows), "loss": losses[0], **summary,
        "tokens_per_s": sum(rows) / summary["median_s"], "peak_mb": peak / 2**20, "computed": slots / sum(rows),
        "held_mb": (measure.held_bytes() - before) / 2**20,
        "mfu": _utilisation(shape, rows, summary["median_s"] * world.size, CASES[name]),
    }  # fmt: skip
    found["kernels"] = kernel_times.shares(run) if torch.cuda.is_available() else []
    found["phases"] = kernel_times.phases(run, backend) if backend is not None else []
    if world.is_main:
        print(json.dumps(found), flush=True)
    world.leave()


def _utilisation(shape: str, rows: list[int], gpu_seconds: float, case: dict[str, Any]) -> float | None:
    """6 N FLOPs a token (4 N of frozen weights, which have no gradient) and 6 layers·heads·size·L causal attention (12,
    halved), of the peak of a known GPU. Recomputed activations do not count; where prompts are computed once, the work
    is another."""
    if not torch.cuda.is_available() or "share" in case:
        return None
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in torch.cuda.get_device_name()), None)
    hidden, layers, heads, kv_heads, size, intermediate, vocabulary, _ = SHAPES[shape]
    per_layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * intermediate
    weights, each = layers * per_layer + hidden * vocabulary, 4 if "lora_rank" in case else 6
    work = sum(each * weights * n + 6 * layers * heads * size * n * n for n in rows)
    return work / gpu_seconds / peak if peak else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.learner", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7b" if torch.cuda.is_available() else "small")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=CASES, help="cases (all that the ranks allow)")
    parser.add_argument("--dry", action="store_true", help="tiny, two rounds, nothing recorded")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shape, options.rounds = ("tiny", 2) if options.dry else (options.shape, options.rounds)
    if options.child:
        run_case(options.child[0], options.shape, Path(options.child[1]), options.rounds)
        return 0
    rows = []
    names = options.only or [n for n in CASES if options.ranks % CASES[n].get("sequence_parallel", 1) == 0]
    for row in measure_cases(options.shape, names, ranks=options.ranks, rounds=options.rounds):
        rows.append(row)
        print(f"{row['case']}: {row.get('why') or format(row['tokens_per_s'], ',.0f') + ' tokens/s'}", flush=True)
    done = [row for row in rows if "why" not in row]
    for row in done:
        row["ratio"] = row["tokens_per_s"] / done[0]["tokens_per_s"]
    print(measure.table(rows, [*COLUMNS, *(["why"] if done != rows else [])]))
    if not options.dry:
        print(f"appended to {measure.record('learner', done)}")
    return 0 if done == rows else 1


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "PASSIVE"}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
