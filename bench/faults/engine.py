"""An engine without torch: completions are a hash of their seed. Its pace and its faults come from the environment."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from core.schema import Sampling
from rollout.engine import Request, Sampled

VOCAB = 100


def expected(seed: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What every worker must answer for this seed."""
    generator = np.random.default_rng(seed)
    length = 1 + seed % max_tokens
    return (
        generator.integers(0, VOCAB, length).astype("<i4"),
        -generator.random(length).astype("<f4"),
    )


class QuickEngine:
    vocab_size = VOCAB

    def __init__(self, model_dir: Path, *, device: str, dtype: str) -> None:
        if os.environ.get("QUICK_FAIL") == "load":
            raise RuntimeError("the accelerator is on fire")
        self.loaded: list[Path] = []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        pace_s = float(os.environ.get("QUICK_PACE_S", "0"))
        fault = os.environ.get("QUICK_FAIL", "")
        for number, request in enumerate(requests):
            for sample, seed in enumerate(request.seeds):
                if pace_s:
                    time.sleep(pace_s)
                if fault == "hang":
                    time.sleep(3600)
                if fault == "hang with the interpreter":
                    ctypes.PyDLL(None).sleep(3600)  # as a C extension that never lets another thread run
                if fault == "crash":
                    raise RuntimeError("illegal memory access")
                if on_progress is not None:
                    on_progress(1)
                tokens, logprobs = expected(seed, sampling.max_tokens)
                if fault == "nan":
                    logprobs = logprobs * np.float32("nan")
                if fault == "phantom":
                    tokens = tokens + VOCAB
                yield Sampled(
                    number, sample, tokens, logprobs, "stop" if len(tokens) < sampling.max_tokens else "length"
                )

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        self.loaded.append(file)

    def close(self) -> None:
        self.loaded.clear()


def make(model_dir: Path, *, device: str, dtype: str) -> QuickEngine:
    return QuickEngine(model_dir, device=device, dtype=dtype)
