"""Settings that were chosen and cannot act: values away from their default that nothing reads under the others."""

import json
from collections.abc import Iterator
from functools import reduce

from core.anneal import explorer_needed
from core.config import Config
from core.configkeys import all_keys

READERS = {  # bound of a correction → weights that read it
    "cap": ("token_tis", "sequence_tis", "mixture"),
    "low": ("icepop", "geometric_mask"),
    "high": ("icepop", "geometric_mask"),
}


def effect_problems(config: Config) -> Iterator[str]:
    """A line for each value that has no effect: the value, why, and what gives it one."""
    keys = all_keys()
    unread = (_algorithm, _steps, _learner, _engine, _bounds)
    for name, reason, remedy in (line for check in unread for line in check(config)):
        value = reduce(getattr, name.split("."), config)
        if value != keys[name].default:
            default = keys[name].default
            left = f"leave {name} at {str(default).lower() if isinstance(default, bool) else default}"
            yield f"{name} = {json.dumps(value)} has no effect with {reason}: use {remedy}, or {left}"


def _algorithm(config: Config) -> Iterator[tuple[str, str, str]]:
    """Keys that are not read, each with the setting that does not read it and one that does."""
    algorithm = config.algorithm
    if algorithm.mixing == "rescue":
        reason = 'algorithm.mixing = "rescue", whose quota is fixed'
        yield "algorithm.alpha", reason, "algorithm.rescue_quota"
        yield "algorithm.schedule", reason, "algorithm.mixing=in_group"
    else:
        yield "algorithm.rescue_quota", f'algorithm.mixing = "{algorithm.mixing}"', "algorithm.mixing=rescue"
        if algorithm.schedule != "constant":
            reason = f'algorithm.schedule = "{algorithm.schedule}", which moves α by itself'
            yield "algorithm.alpha", reason, "algorithm.schedule=constant"
    if algorithm.driver == "clock":
        for end in ("driver_low", "driver_high"):
            yield f"algorithm.{end}", 'algorithm.driver = "clock"', "algorithm.driver=ess"
    if not explorer_needed(config):
        reason, remedy = "a schedule that never asks the explorer", "a larger algorithm.anneal_steps or algorithm.alpha"
        yield "correction.explorer_negatives", reason, remedy


def _steps(config: Config) -> Iterator[tuple[str, str, str]]:
    """Of how the rows of a step are grouped and when they train."""
    algorithm, streamed = config.algorithm, "algorithm.stream_mini_batches"
    if algorithm.mixing == "authors_code":
        named = 'algorithm.mixing = "authors_code"'
        yield "algorithm.baseline", f"{named}, whose groups are of one source each", "algorithm.mixing=in_group"
        yield streamed, f"{named}, which waits for the whole step", "algorithm.mixing=in_group"
    elif algorithm.mini_batch_prompts >= algorithm.prompts_per_step:
        reason = f"algorithm.mini_batch_prompts = {algorithm.mini_batch_prompts}, which is the whole step"
        yield streamed, reason, "a smaller algorithm.mini_batch_prompts"
    if not algorithm.lookahead:
        reason = "algorithm.lookahead = 0, where no weights come while a lease is in work"
        yield "rollout.update_in_flight", reason, "algorithm.lookahead=1"


def _learner(config: Config) -> Iterator[tuple[str, str, str]]:
    learner = config.learner
    if config.loss.ratio == "cispo":
        yield "loss.dual_clip", 'loss.ratio = "cispo", whose ratio is clipped before it meets A', "loss.ratio=token"
    if learner.micro_batch_tokens:
        reason = f"learner.micro_batch_tokens = {learner.micro_batch_tokens}, which packs rows by their tokens"
        yield "learner.micro_batch_rows", reason, "learner.micro_batch_tokens=0"
    if learner.backend != "deepspeed":
        reason = f'learner.backend = "{learner.backend}", where every rank holds everything'
        yield "learner.zero_stage", reason, "learner.backend=deepspeed"
    if not learner.gradient_checkpointing:
        reason = "learner.gradient_checkpointing = false, which computes nothing twice"
        yield "learner.recompute", reason, "learner.gradient_checkpointing=true"
    if not learner.micro_batch_tokens:
        reason = "learner.micro_batch_tokens = 0, which pads every row"
        yield "learner.share_prompts", reason, "learner.micro_batch_tokens=8192"
    if not learner.lora_rank:
        yield "learner.lora_alpha", "learner.lora_rank = 0, which adds no adapters", "learner.lora_rank=32"


def _engine(config: Config) -> Iterator[tuple[str, str, str]]:
    """An "auto" that is not decided yet may become vLLM."""
    if config.engine == "torch":
        reason = "the torch engine, which runs on one GPU"
        yield "rollout.tensor_parallel", reason, "rollout.engine=vllm, or more rollout.processes"
        reason = "the torch engine, which takes what a lease needs"
        yield "rollout.memory_share", reason, "rollout.engine=vllm, or a smaller rollout.lease_prompts"


def _bounds(config: Config) -> Iterator[tuple[str, str, str]]:
    for source, correction in (("explorer", config.correction.explorer), ("learner", config.correction.learner)):
        section = f"correction.{source}"
        anchor = f"{section}.anchor=learner " if correction.anchor == "sampler" else ""  # else it would correct twice
        for bound, readers in READERS.items():
            if correction.weight not in readers:
                remedy = f"{anchor}{section}.weight={readers[0]}"
                yield f"{section}.{bound}", f'{section}.weight = "{correction.weight}"', remedy
