"""One generation engine in a process of its own, which vLLM needs: tokens per second, and what new weights cost.

    python -m bench.engines ENGINE MODEL [--rows 64 256] [--rounds 3] [--new-tokens 24] [--dtype float32]

ENGINE is torch or vllm. A line of JSON per batch size: `tokens_s`, requests to last completion; `update_s`, from
the moment generation stops for new weights of the whole batch to its first new token with them; `load_s`, of which the
part within `load_weights`. On CPU seconds are CPU seconds of this process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.schema import Sampling
from rollout.engine import Request

PROMPT_TOKENS, SAMPLES = 7, 8
CUDA = torch.cuda.is_available()
clock: Callable[[], float] = time.perf_counter if CUDA else time.process_time


def make_engine(name: str, directory: Path, dtype: str, rows: int) -> Any:
    """As a worker starts it, with room for the largest batch."""
    device = "cuda" if CUDA else "cpu"
    if name == "vllm":
        from rollout.vllm_engine import VllmEngine

        return VllmEngine(directory, device=device, dtype=dtype, max_rows=min(rows, 1024))
    from rollout.torch_engine import TorchEngine

    return TorchEngine(directory, device=device, dtype=dtype)


def make_requests(rows: int, vocabulary: int) -> list[Request]:
    """Eight samples a prompt, as a group of GRPO has; no id below 2, which are the tiny model's special tokens."""
    prompts = np.random.default_rng(rows).integers(2, vocabulary, (rows // SAMPLES, PROMPT_TOKENS)).tolist()
    return [
        Request(tuple(prompt), seeds=tuple(SAMPLES * index + sample for sample in range(SAMPLES)))
        for index, prompt in enumerate(prompts)
    ]


def rate(engine: Any, requests: list[Request], sampling: Sampling) -> float:
    """Tokens per second of one batch."""
    start = clock()
    tokens = sum(len(row.token_ids) for row in engine.generate(requests, sampling))
    return tokens / (clock() - start)


def update(engine: Any, requests: list[Request], sampling: Sampling, file: Path) -> tuple[float, float]:
    """New weights in the middle of a batch: seconds to its next token, and those of loading alone."""
    moments: list[float] = []
    steps = 0

    def on_progress(tokens: int) -> None:
        nonlocal steps
        steps += bool(tokens)
        if moments and len(moments) == 2 and tokens:
            moments.append(clock())
        elif not moments and steps == sampling.max_tokens // 2:
            moments.append(clock())
            engine.load_weights(file)
            moments.append(clock())

    for _ in engine.generate(requests, sampling, on_progress=on_progress):
        pass
    asked, loaded, drawn = moments
    return drawn - asked, loaded - asked


def measure(engine: Any, file: Path, rows: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over `rounds`, after one of warm-up."""
    requests = make_requests(rows, engine.vocab_size)
    sampling = Sampling(temperature=1.0, max_tokens=new_tokens, stop_token_ids=())
    rates = [rate(engine, requests, sampling) for _ in range(rounds + 1)][1:]
    updates = [update(engine, requests, sampling, file) for _ in range(rounds + 1)][1:]
    whole, load = (statistics.median(times) for times in zip(*updates))
    return {"rows": rows, "tokens_s": statistics.median(rates), "update_s": whole, "load_s": load, "rounds": rounds}


def in_child(engine: str, directory: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of this module's command, run in a process of its own."""
    command = [sys.executable, "-m", "bench.engines", engine, str(directory), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("torch", "vllm"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="batch sizes, multiples of 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32")
    options = parser.parse_args(arguments)
    engine = make_engine(options.engine, options.model, options.dtype, max(options.rows))
    file = options.model / "model.safetensors"
    for rows in options.rows:
        found = measure(engine, file, rows, options.new_tokens, options.rounds)
        print(json.dumps({"engine": options.engine, **found}), flush=True)
    engine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
