"""Held-out problems by name, and a model's scored answers to them without a run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from core.config import Config, Data, Rollout, Run
from core.rewards import RewardItem, resolve_reward
from core.schema import (
    Completion,
    CompletionKey,
    Prompt,
    Sampling,
    ScoredCompletion,
    Source,
    pack_logprobs,
    pack_tokens,
)
from core.seeds import completion_seed
from rollout.engine import Engine, Request, Sampled

ROWS_PER_BATCH = 1024


class Benchmark(NamedTuple):
    """Where the problems come from, how their answers are checked, and the longest of both in tokens.

    Example: BENCHMARKS["countdown"]
    """

    data: str  # a value of data.eval
    reward: str  # a value of reward.function
    max_prompt_tokens: int
    max_response_tokens: int

    def config(self, name: str, seed: int, data: Path | None) -> Config:
        """What loads the problems: `NAME.parquet` of a directory where one is given."""
        return Config(
            run=Run(seed=seed),
            data=Data(eval=str(data / f"{name}.parquet") if data else self.data),
            rollout=Rollout(max_prompt_tokens=self.max_prompt_tokens, max_response_tokens=self.max_response_tokens),
        )


BENCHMARKS = {"countdown": Benchmark("embedded:countdown", "countdown", max_prompt_tokens=16, max_response_tokens=24)}


def find_benchmark(name: str) -> Benchmark:
    """ValueError for an unknown name, with those that there are."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def answer_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    reward: str,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda prompts_done: None,
) -> list[list[ScoredCompletion]]:
    """`samples` scored completions of each prompt, in order; those for which there is no reward are left out.

    Their seeds are those of the evaluation that a run of this seed makes before it trains.
    """
    score = resolve_reward(reward)
    rows = []
    size = max(1, ROWS_PER_BATCH // samples)
    for first in range(0, len(prompts), size):
        chunk = prompts[first : first + size]
        keys = [
            [CompletionKey(source=Source.LEARNER, step=0, slot=first + i, sample=j) for j in range(samples)]
            for i in range(len(chunk))
        ]
        requests = [
            Request(prompt.token_ids, [completion_seed(seed, "eval", key) for key in of_prompt])
            for prompt, of_prompt in zip(chunk, keys)
        ]
        started_s = time.monotonic()
        drawn = sorted(engine.generate(requests, sampling), key=lambda one: (one.request, one.sample))
        answers: list[list[ScoredCompletion]] = [[] for _ in chunk]
        for one in drawn:
            prompt, text = chunk[one.request], decode(one.token_ids.tolist())
            completion = _completion(one, keys[one.request][one.sample], prompt, started_s)
            value = score(_item(prompt, completion, text))
            if value is not None:
                answers[one.request].append(ScoredCompletion(completion=completion, reward=value, text=text))
        rows += answers
        on_progress(len(rows))
    return rows


def _completion(drawn: Sampled, key: CompletionKey, prompt: Prompt, started_s: float) -> Completion:
    return Completion(
        key=key,
        prompt_uid=prompt.uid,
        token_bytes=pack_tokens(drawn.token_ids),
        logprob_bytes=pack_logprobs(drawn.logprobs),
        finish="stop" if drawn.finish == "stop" else "length",
        version=0,
        worker="evaluate",
        started_s=started_s,
        finished_s=time.monotonic(),
    )


def _item(prompt: Prompt, completion: Completion, text: str) -> RewardItem:
    return RewardItem(
        prompt=prompt.text,
        completion=text,
        completion_ids=tuple(completion.tokens.tolist()),
        answer=prompt.answer,
        columns=prompt.columns,
    )
