"""Tokens per second of both engines beside transformers' generate, and the bound that matrix products set.

The model has the tiny learner's shape and random weights. All cases answer the same prompts, eight samples a prompt, as
a group of GRPO does. `fixed` draws 24 tokens a row; `stop` ends rows at a stop token and counts the tokens up to it.
transformers gets its plainest settings: no truncation, and log-probs (which the engine always gives) only in the case
that says so. On CPU the seconds are CPU seconds.

Then, for `fixed`, each engine in a process of its own (bench.engines; vLLM where it is installed), with the time of a
weight update in the middle of a batch. `ratio` there is to `generate` of the same batch size.

    OMP_NUM_THREADS=1 python -m bench.rollout [--rows 64 256 1024] [--rounds 15]
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.engines import in_child
from bench.measure import interleave, record, table
from core.schema import Sampling
from rollout.engine import Request
from rollout.torch_engine import TorchEngine

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM = 59, 96, 256, 3, 4, 32
PROMPT_TOKENS, NEW_TOKENS, SAMPLES, STOP_TOKEN = 7, 24, 8, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def save_model(directory: Path) -> None:
    """Qwen3 of the tiny learner's shape, random weights wide enough that distributions are not flat."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)


class Cases:
    """The competitors on one batch; `drawn` notes the tokens of each call."""

    def __init__(self, directory: Path, rows: int, *, stop: bool) -> None:
        generator = np.random.default_rng(rows)
        prompts = generator.integers(2, VOCAB, (rows // SAMPLES, PROMPT_TOKENS))
        self.requests = [
            Request(tuple(prompt), seeds=tuple(SAMPLES * index + sample for sample in range(SAMPLES)))
            for index, prompt in enumerate(prompts.tolist())
        ]
        self.rows = rows
        self.sampling = Sampling(temperature=1.0, max_tokens=NEW_TOKENS, stop_token_ids=(STOP_TOKEN,) if stop else ())
        self.engine = TorchEngine(directory, device=DEVICE)
        self.model = transformers.Qwen3ForCausalLM.from_pretrained(directory).eval().to(DEVICE)
        self.input_ids = torch.from_numpy(prompts).repeat_interleave(SAMPLES, 0).to(DEVICE)
        self.terms = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=STOP_TOKEN if stop else None,
            pad_token_id=0,
        )
        self.drawn: dict[str, list[int]] = {}

    def ours(self) -> int:
        return sum(len(completion.token_ids) for completion in self.engine.generate(self.requests, self.sampling))

    @torch.inference_mode()
    def theirs(self, *, logprobs: bool = False) -> int:
        out = self.model.generate(
            self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            generation_config=self.terms,
            output_logits=logprobs,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[:, PROMPT_TOKENS:]
        if logprobs:
            torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
        # Everything before a row's first stop token, and that token.
        before = (tokens == STOP_TOKEN).int().cumsum(1) - (tokens == STOP_TOKEN).int()
        return int((before == 0).sum()) if self.sampling.stop_token_ids else tokens.numel()

    def noted(self, name: str, case: Callable[[], int]) -> Callable[[], None]:
        def run() -> None:
            self.drawn.setdefault(name, []).append(case())

        return run


@torch.inference_mode()
def products(rows: int) -> Callable[[], None]:
    """The matrix products of NEW_TOKENS decode steps: projections and head, without attention."""
    attention = HEADS * HEAD_DIM
    shapes = [(HIDDEN, 3 * attention), (attention, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    step = [
        (torch.randn(rows, inner, device=DEVICE), torch.randn(outer, inner, device=DEVICE).t())
        for inner, outer in [*LAYERS * shapes, (HIDDEN, VOCAB)]
    ]

    @torch.inference_mode()
    def run() -> None:
        for _ in range(NEW_TOKENS):
            for left, right in step:
                torch.mm(left, right)

    return run


def measure(directory: Path, rows: int, *, stop: bool, rounds: int) -> dict[str, Any]:
    cases = Cases(directory, rows, stop=stop)
    torch.manual_seed(0)
    names: dict[str, Callable[[], int]] = {
        "engine": cases.ours,
        "generate": cases.theirs,
        "generate_logprobs": lambda: cases.theirs(logprobs=True),
    }
    noted = {name: cases.noted(name, case) for name, case in names.items()}
    seconds = interleave({**noted, "products": products(rows)}, rounds=rounds, warmup=2)
    rate = {
        name: statistics.median(drawn / s for drawn, s in zip(cases.drawn[name][-rounds:], seconds[name]))
        for name in names
    }
    bound = rows * NEW_TOKENS / statistics.median(seconds["products"])
    return {
        "workload": "stop" if stop else "fixed",
        "rows": rows,
        "engine_tokens_s": rate["engine"],
        "generate_tokens_s": rate["generate"],
        "generate_logprobs_tokens_s": rate["generate_logprobs"],
        "ratio": rate["engine"] / rate["generate"],
        "ratio_logprobs": rate["engine"] / rate["generate_logprobs"],
        "products_tokens_s": bound,
        "share_of_bound": rate["engine"] / bound,
        "rounds": rounds,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def engines(directory: Path, generate: dict[int, float], rounds: int) -> list[dict[str, Any]]:
    """Both engines at the batch sizes of `generate` (tokens per second by rows)."""
    sizes = [str(rows) for rows in generate]
    found = []
    for name in ("torch", *(["vllm"] if importlib.util.find_spec("vllm") else [])):
        arguments = ("--rows", *sizes, "--rounds", str(rounds), "--new-tokens", str(NEW_TOKENS))
        found += in_child(name, directory, *arguments)
    for row in found:
        row |= {"workload": "fixed", "ratio": row["tokens_s"] / generate[row["rows"]]}
        row |= {"generate_tokens_s": generate[row["rows"]], "load": round(os.getloadavg()[0], 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024], help="batch sizes, multiples of 8")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory))
        results = [
            measure(Path(directory), rows, stop=stop, rounds=options.rounds)
            for stop in (False, True)
            for rows in options.rows
        ]
        beside = {row["rows"]: row["generate_tokens_s"] for row in results if row["workload"] == "fixed"}
        alone = engines(Path(directory), beside, max(1, options.rounds // 3))
    columns = [name for name in results[0] if name not in ("rounds", "transformers")]
    print(table(results, columns))
    print(f"medians of {options.rounds} interleaved rounds, {torch.get_num_threads()} thread(s)")
    print(table(alone, ["engine", "rows", "tokens_s", "generate_tokens_s", "ratio", "update_s", "load_s"]))
    print(f"recorded in {record('rollout', [*results, *alone])}")


if __name__ == "__main__":
    main()
