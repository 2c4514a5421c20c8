"""What can stop a run, looked for before a model is read, a process is started or a file is written.

A run and a dry run go through the same list, `check_start`, so that one accepts what the other does.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from core.anneal import explorer_needed
from core.batchcheck import position_problems
from core.config import Config
from core.configcheck import EMBEDDED, check_config, check_paths
from core.configkeys import ConfigError
from core.datasets import column_names
from core.rewards import BUILT_IN, require_columns
from core.scoring import RewardPool
from rollout.engine import engine_kind
from rollout.torch_weights import read_shape
from trainer.attention import use_packed_attention
from trainer.backend import require_backend
from trainer.correction import needs_explorer_scores
from trainer.lora import require_peft
from trainer.model_files import check_model_files, read_config
from trainer.pretrain import Recipe, build_model
from trainer.published import memory_is_shared
from trainer.sequence_parallel import check_heads
from trainer.trackers import require_trackers


class Place(NamedTuple):
    """Where a run starts: this rank among `size`, its device, whether it generates (a replay does not), and whether it
    goes on from a checkpoint.

    Example: Place(rank=0, size=1, device=torch.device("cpu"))
    """

    rank: int
    size: int
    device: torch.device
    generates: bool = True
    resumes: bool = False


def check_start(config: Config, place: Place) -> None:
    """Raise ConfigError, one line per problem, for what the run would be refused for later on.

    Reads files of models and data, and imports a reward function in a process of its own (rank 0); changes nothing.
    """
    check_config(config, place.size, from_first_step=place.generates and not place.resumes)
    check_paths(config)
    models = _models(config)
    checks: list[Callable[[], None]] = [
        partial(_check_libraries, config, place),
        partial(_check_weights, config, place),
    ]
    checks += [partial(check_model_files, Path(name), key) for key, name in models if not name.startswith(EMBEDDED)]
    _raise_all(checks)
    configs = {key: _model_config(name, key) for key, name in models}
    scored = configs if needs_explorer_scores(config.correction) else ("learner.model",)
    checks = [partial(_check_architecture, config, configs[key], key, place) for key in scored]
    if place.generates:
        checks += [partial(_check_engine, name, key) for key, name in _generating(config, place)]
        checks += [partial(_check_reward, config)] if place.rank == 0 else []
    _raise_all([*checks, partial(_check_positions, config, configs, place)])


def _raise_all(checks: list[Callable[[], None]]) -> None:
    problems = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _models(config: Config) -> list[tuple[str, str]]:
    """Keys and names of the models that the run reads."""
    explores = explorer_needed(config) or needs_explorer_scores(config.correction)
    return [("learner.model", config.learner.model), *([("explorer.model", config.explorer.model)] * explores)]


def _model_config(name: str, key: str) -> PretrainedConfig:
    """Of a directory, or of an embedded model, which need not be made yet."""
    if not name.startswith(EMBEDDED):
        return read_config(Path(name), key)
    recipe = Recipe()
    with torch.device("meta"):
        return build_model(getattr(recipe, name.removeprefix(EMBEDDED)), recipe).config


def _engine(config: Config, place: Place) -> str:
    return engine_kind(config.engine, place.device.type)


def _generating(config: Config, place: Place) -> Iterator[tuple[str, str]]:
    """Models that torch engines of this run must know; explorers started by hand may have another engine."""
    if _engine(config, place) == "torch":
        for key, name in _models(config):
            here = key == "learner.model" or (explorer_needed(config) and config.explorer.processes > 0)
            if here and not name.startswith(EMBEDDED):
                yield key, name


def _check_libraries(config: Config, place: Place) -> None:
    require_backend(config.learner)
    if config.learner.lora_rank:
        require_peft()
    if place.rank == 0:
        require_trackers(config.run.log_to)
    if place.generates and _engine(config, place) == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError('rollout.engine = "vllm" and vLLM is not installed: docs/install.md, or rollout.engine=torch')
    # Triton's interpreter is for tests; it reads the variable where a kernel is decorated.
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if config.learner.kernels == "triton" and place.device.type == "cpu" and not interpreted:
        raise ValueError(
            'learner.kernels = "triton" needs a GPU and the learner trains on the CPU: use learner.kernels=auto, '
            "which is torch there"
        )


def _check_weights(config: Config, place: Place) -> None:
    if place.generates and config.rollout.weights == "device" and not memory_is_shared():
        raise ValueError(
            'rollout.weights = "device" needs memory files and /proc (Linux), which this system lacks: use '
            "rollout.weights=files"
        )


def _check_architecture(config: Config, found: PretrainedConfig, key: str, place: Place) -> None:
    """A model that trains or scores: made without numbers, with the attention that its rows need."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, attn_implementation="sdpa")
        if config.learner.micro_batch_tokens:
            use_packed_attention(model)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if config.learner.sequence_parallel > 1:
        check_heads(found.get_text_config(), config.learner.sequence_parallel, place.size, key)


def _check_engine(name: str, key: str) -> None:
    try:
        read_shape(Path(name))
    except ValueError as error:
        raise ValueError(f"{key}: {error}: use rollout.engine=vllm (docs/install.md)") from error


def _check_positions(config: Config, configs: dict[str, PretrainedConfig], place: Place) -> None:
    text_configs = {key: found.get_text_config() for key, found in configs.items()}
    limits = {key: getattr(found, "max_position_embeddings", None) for key, found in text_configs.items()}
    known = {key: limit for key, limit in limits.items() if isinstance(limit, int)}
    vllm = place.generates and _engine(config, place) == "vllm"
    if problems := list(position_problems(config, known, vllm=vllm)):
        raise ValueError("\n".join(problems))


def _check_reward(config: Config) -> None:
    """Import a user's function as the run will: in a scoring process, whose module this process never sees. All data
    must have the columns that it requires."""
    function = config.reward.function
    if function in BUILT_IN:
        return
    with RewardPool(function, workers=1, timeout_s=1.0, on_score=lambda ticket, outcome: None) as pool:
        needs = pool.needs
    sets: list[Literal["train", "eval"]] = ["train", "eval"] if config.data.eval else ["train"]

    def check_columns(which: Literal["train", "eval"]) -> None:
        require_columns(function, needs, column_names(config.data, which), f"data.{which}")

    if needs:
        _raise_all([partial(check_columns, which) for which in sets])
