"""The nouns that flow: Prompt → Completion → ScoredCompletion → Group. Frozen, complete at birth, checked at the door.

Token ids travel, never text; masks come from lengths, never from token values.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

LOGPROB_FLOOR = -1e4
LOGPROB_CEILING = 1e-3  # an engine may round log 1 to a tiny positive number


class Source(StrEnum):
    """Who sampled a completion."""

    EXPLORER = "explorer"
    LEARNER = "learner"


class Noun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A frozen value; strict at every decode."""


class Sampling(Noun, frozen=True, kw_only=True):
    """How tokens were drawn, and so what their log-probs mean.

    `kind`: `processed` is log_softmax(logits / temperature), renormalised over the kept tokens under top_p or top_k;
    `raw` is log_softmax(logits). Log-probs of different kinds never meet in one ratio (design note: docs/ratios.md).

    Example: Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24, stop_token_ids=(1,))
    """

    temperature: Annotated[float, Meta(gt=0)]
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0  # 0: off
    max_tokens: Annotated[int, Meta(ge=1)]
    stop_token_ids: tuple[int, ...]
    kind: Literal["processed", "raw"] = "processed"


class Prompt(Noun, frozen=True, kw_only=True):
    """One question, rendered and tokenised.

    Example: Prompt(uid="7f3a", token_ids=(10, 7, 11, 9, 56, 17, 58), text="8 5 9 7 = 15 :", answer="15")
    """

    uid: str  # hash of the question's text; equal questions have equal uids
    token_ids: tuple[int, ...]
    text: str  # what the learner reads, as text (for rewards and reports)
    answer: str  # the gold answer, as the reward function wants it
    columns: dict[str, Any] = msgspec.field(default_factory=dict)  # other columns, for user rewards


class CompletionKey(Noun, frozen=True, kw_only=True, order=True):
    """Identity of a completion inside a run: it trains at most once.

    Example: CompletionKey(source=Source.EXPLORER, step=3, slot=17, sample=0)
    """

    source: Source
    step: Annotated[int, Meta(ge=0)]  # training step that will use it; evaluations use the step after which they run
    slot: Annotated[int, Meta(ge=0)]  # position of the prompt inside the step
    sample: Annotated[int, Meta(ge=0)]  # 0 … quota−1; replacements count on from there


class Completion(Noun, frozen=True, kw_only=True):
    """What a policy answered to one prompt. L tokens, the stop token included.

    `tokens` int32 [L] and `logprobs` float32 [L], little-endian, are views of the two byte fields.

    Example: Completion(key=CompletionKey(...), prompt_uid="7f3a", token_bytes=..., logprob_bytes=...,
                        finish="stop", version=2, worker="learner-0", started_s=12.5, finished_s=12.9)
    """

    key: CompletionKey
    prompt_uid: str
    token_bytes: bytes
    logprob_bytes: bytes  # log μ of each sampled token, of the lease's Sampling.kind
    finish: Literal["stop", "length"]
    version: Annotated[int, Meta(ge=0)]  # smallest number of training steps behind its weights; 0 for an explorer
    spans: tuple[tuple[int, int], ...] = ()  # (first token, version) of each stretch; () where `version` made them all
    worker: str
    started_s: float  # CLOCK_MONOTONIC of the worker's host, for the trace only
    finished_s: float

    @property
    def tokens(self) -> np.ndarray:
        """int32 [L]"""
        return np.frombuffer(self.token_bytes, dtype="<i4")

    @property
    def logprobs(self) -> np.ndarray:
        """float32 [L]"""
        return np.frombuffer(self.logprob_bytes, dtype="<f4")

    @property
    def num_tokens(self) -> int:
        """L"""
        return len(self.token_bytes) // 4

    @property
    def num_bytes(self) -> int:
        """Bytes the buffer counts for it."""
        return len(self.token_bytes) + len(self.logprob_bytes)


def check_completion(completion: Completion, *, vocab_size: int, max_tokens: int) -> None:
    """Raise ValueError unless the arrays agree, every id is in the vocabulary and every log-prob is a finite log-prob.

    An msgspec decode checks fields one by one; this checks what spans them (mismatched lengths, NaN, phantom ids).
    """
    size, logprob_size = len(completion.token_bytes), len(completion.logprob_bytes)
    if size == 0 or size % 4 or size != logprob_size:
        raise ValueError(f"token and log-prob arrays disagree: {size} and {logprob_size} bytes")
    if size > 4 * max_tokens:
        raise ValueError(f"{size // 4} tokens exceed the lease's limit of {max_tokens}")
    check_spans(completion)
    tokens, logprobs = completion.tokens, completion.logprobs
    if tokens.view("<u4").max() >= vocab_size:  # a negative id is a large unsigned one
        raise ValueError(f"token id outside 0 … {vocab_size - 1}: {tokens.min()} … {tokens.max()}")
    # NaN fails both comparisons, so it is refused too.
    if not (logprobs.min() >= LOGPROB_FLOOR and logprobs.max() <= LOGPROB_CEILING):
        raise ValueError(f"log-prob outside [{LOGPROB_FLOOR}, {LOGPROB_CEILING}]: {logprobs.min()} … {logprobs.max()}")


def check_spans(completion: Completion) -> None:
    """Raise ValueError unless the stretches start at token 0 with `version` and ascend within the completion."""
    spans = completion.spans
    if not spans:
        return
    starts, versions = zip(*spans)
    size = len(completion.token_bytes) // 4
    ascend = all(a < b for values in (starts, versions) for a, b in pairwise(values))
    if not (ascend and starts[0] == 0 and starts[-1] < size and versions[0] == completion.version):
        raise ValueError(f"spans {spans} of {size} tokens do not begin with version {completion.version} and ascend")


class ScoredCompletion(Noun, frozen=True, kw_only=True):
    """A completion and its reward.

    Example: ScoredCompletion(completion=..., reward=1.0, text="9 - 5 = 4 , ...")
    """

    completion: Completion
    reward: float
    text: str


class Group(Noun, frozen=True, kw_only=True):
    """All completions of one prompt at one step, with advantages: len(rows) == len(advantages).

    Rows stand explorer first, then learner, each by sample index, so that a group does not depend on who arrived first.

    Example: Group(prompt=..., step=3, slot=17, rows=(...), advantages=(0.9, -1.1, ...))
    """

    prompt: Prompt
    step: int
    slot: int
    rows: tuple[ScoredCompletion, ...]
    advantages: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.advantages) > 0


def pack_tokens(token_ids: object) -> bytes:
    """Any sequence of ids as little-endian int32 bytes."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def pack_logprobs(logprobs: object) -> bytes:
    """Any sequence of log-probs as little-endian float32 bytes."""
    return np.asarray(logprobs, dtype="<f4").tobytes()
