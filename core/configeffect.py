"""Settings that were chosen and cannot act: values away from their default that nothing reads under the others."""

import json
from collections.abc import Iterator
from functools import reduce

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
    for name, reason, remedy in (*_algorithm(config), *_learner(config), *_engine(config), *_bounds(config)):
        value = reduce(getattr, name.split("."), config)
        if value != keys[name].default:
            left = f"leave {name} at {keys[name].default}"
            yield f"{name} = {json.dumps(value)} has no effect with {reason}: use {remedy}, or {left}"


def _algorithm(config: Config) -> Iterator[tuple[str, str, str]]:
    """Keys that are not read, each with the setting that does not read it and one that does."""
    algorithm = config.algorithm
    if algorithm.mixing == "rescue":
        yield "algorithm.alpha", 'algorithm.mixing = "rescue", whose quota is fixed', "algorithm.rescue_quota"
    else:
        yield "algorithm.rescue_quota", f'algorithm.mixing = "{algorithm.mixing}"', "algorithm.mixing=rescue"
        if algorithm.schedule != "constant":
            reason = f'algorithm.schedule = "{algorithm.schedule}", which moves α by itself'
            yield "algorithm.alpha", reason, "algorithm.schedule=constant"
    if algorithm.driver == "clock":
        for end in ("driver_low", "driver_high"):
            yield f"algorithm.{end}", 'algorithm.driver = "clock"', "algorithm.driver=ess"


def _learner(config: Config) -> Iterator[tuple[str, str, str]]:
    learner = config.learner
    if config.loss.ratio == "cispo":
        yield "loss.dual_clip", 'loss.ratio = "cispo", whose ratio is clipped before it meets A', "loss.ratio=token"
    if learner.backend != "deepspeed":
        reason = f'learner.backend = "{learner.backend}", where every rank holds everything'
        yield "learner.zero_stage", reason, "learner.backend=deepspeed"
    if not learner.gradient_checkpointing:
        reason = "learner.gradient_checkpointing = false, which computes nothing twice"
        yield "learner.recompute", reason, "learner.gradient_checkpointing=true"
    if not learner.lora_rank:
        yield "learner.lora_alpha", "learner.lora_rank = 0, which adds no adapters", "learner.lora_rank=32"


def _engine(config: Config) -> Iterator[tuple[str, str, str]]:
    """An "auto" that is not decided yet may become vLLM."""
    if config.engine == "torch":
        reason = "the torch engine, which runs on one GPU"
        yield "rollout.tensor_parallel", reason, "rollout.engine=vllm, or more rollout.processes"


def _bounds(config: Config) -> Iterator[tuple[str, str, str]]:
    for source, correction in (("explorer", config.correction.explorer), ("learner", config.correction.learner)):
        section = f"correction.{source}"
        anchor = f"{section}.anchor=learner " if correction.anchor == "sampler" else ""  # else it would correct twice
        for bound, readers in READERS.items():
            if correction.weight not in readers:
                remedy = f"{anchor}{section}.weight={readers[0]}"
                yield f"{section}.{bound}", f'{section}.weight = "{correction.weight}"', remedy
