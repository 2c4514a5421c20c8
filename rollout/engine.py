"""What a generation engine is: one protocol for explorers and learner rollouts, for vLLM and for our own engine."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from core.schema import Sampling


class Request(NamedTuple):
    """One prompt and a seed per wanted completion. A completion is a function of (weights, prompt, sampling, seed).

    Example: Request(prompt_ids=(10, 7, 11, 9, 56, 17, 58), seeds=(11, 12, 13))
    """

    prompt_ids: Sequence[int]
    seeds: Sequence[int]  # 64-bit, unsigned


class Sampled(NamedTuple):
    """One finished completion: `requests[request]`'s sample number `sample`."""

    request: int
    sample: int
    token_ids: np.ndarray  # int32 [L], the stop token included
    logprobs: np.ndarray  # float32 [L], of the Sampling's kind
    finish: str  # "stop" or "length"
    versions: tuple[tuple[int, int], ...] = ()  # (first token, weights version) of each stretch of tokens, ascending


class Engine(Protocol):
    """Draws completions from one set of weights."""

    vocab_size: int

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        """Yield every completion of every request, each as soon as it is finished.

        `on_progress(tokens)` is called after every decode step with the number of tokens drawn: it feeds the heartbeat,
        so that an engine that hangs is noticed.
        """
        ...

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        """Replace all weights by those of a safetensors file of the same names and shapes.

        May be called from `on_progress`: completions in work keep their tokens, and their keys and values are computed
        again. `version` labels the tokens drawn from now on (default: one more than the last).
        """
        ...

    def load_shared(self, file: Path, *, version: int, digest: str) -> None:
        """The same from a buffer in the memory of the trainer's device, which `file` describes.

        Overwritten (rollout.shared_weights) where the trainer wrote a later version meanwhile: the engine then holds
        parts of two, and must be given the later one before it generates. RuntimeError where the buffer cannot be read.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory."""
        ...


def engine_kind(name: str, device: str) -> Literal["torch", "vllm"]:
    """What rollout.engine means on cpu or cuda: `auto` is vLLM on a GPU where it is installed, torch otherwise."""
    if name not in ("auto", "torch", "vllm"):
        raise ValueError(f"engine {name!r} is not one of auto, torch, vllm")
    vllm = name == "vllm" or (name == "auto" and device == "cuda" and importlib.util.find_spec("vllm") is not None)
    return "vllm" if vllm else "torch"
