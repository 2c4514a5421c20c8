"""Engines of known pace for the pipeline's benchmarks: no model, only waiting or repeating. Started inside workers."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from core.schema import Sampling
from rollout.engine import Request, Sampled

VOCAB = 1000
SPREAD = 0.6  # σ of log length
MEDIAN = 128  # tokens


def length(seed: int, max_tokens: int) -> int:
    """A log-normal length that depends on the seed alone."""
    return int(np.clip(np.random.default_rng(seed).lognormal(np.log(MEDIAN), SPREAD), 1, max_tokens))


class SleepingEngine:
    """Decodes a batch in lock step: SLEEP_TOKEN_S seconds a token, until the longest completion is finished."""

    vocab_size = VOCAB

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        token_s = float(os.environ["SLEEP_TOKEN_S"])
        names = sorted(
            (length(seed, sampling.max_tokens), number, sample)
            for number, request in enumerate(requests)
            for sample, seed in enumerate(request.seeds)
        )
        start_s = time.monotonic()
        for size, number, sample in names:
            time.sleep(max(0.0, start_s + size * token_s - time.monotonic()))
            if on_progress is not None:
                on_progress(1)
            yield Sampled(number, sample, np.ones(size, np.int32), np.zeros(size, np.float32), "stop")

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to free."""


class FloodEngine(SleepingEngine):
    """Answers at once, every completion at full length: what is measured is everything else."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        tokens = np.arange(sampling.max_tokens, dtype=np.int32) % VOCAB
        logprobs = np.linspace(-3.0, -0.1, sampling.max_tokens, dtype=np.float32)
        for number, request in enumerate(requests):
            for sample in range(len(request.seeds)):
                yield Sampled(number, sample, tokens, logprobs, "length")


def sleeping(model_dir: Path, *, device: str, dtype: str) -> SleepingEngine:
    """For rollout.worker --engine."""
    return SleepingEngine()


def flooding(model_dir: Path, *, device: str, dtype: str) -> FloodEngine:
    """For rollout.worker --engine."""
    return FloodEngine()


def reward(completions: list[str], **columns: object) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text) % 2) for text in completions]
