"""What a run is made of, before anything moves: models, tokenizer, prompts, and the demand for completions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from core.anneal import explorer_needed
from core.config import Config
from core.configcheck import EMBEDDED
from core.prompts import PromptSchedule
from core.schema import Prompt, Source
from rollout.demand import Demand
from rollout.fingerprint import fingerprints
from rollout.prompting import held_out, load_prompts, stop_tokens
from rollout.roster import RoleTerms
from rollout.shared_ids import UNKNOWN_TOKEN, id_bounds
from trainer.console import Console
from trainer.family import Family, default_cache_root, embedded_family
from trainer.models import load_tokenizer, require_same_tokenizer, vocab_size
from trainer.world import World


class Materials(NamedTuple):
    """Read-only inputs of a run, the same on every rank."""

    learner_dir: Path
    explorer_dir: Path | None  # None where the schedule never asks for an explorer
    demand: Demand
    eval_prompts: list[Prompt]
    decode: Callable[[Sequence[int]], str]
    report: list[str]  # what was read, mapped, removed and filtered


def load_materials(config: Config, world: World, console: Console) -> Materials:
    """Make or find the models, check that they fit together, and lay out the prompts of every step."""
    learner_dir, explorer_dir = model_directories(config, world, console)
    if explorer_dir is not None:
        require_same_tokenizer(learner_dir, explorer_dir)
    tokenizer = load_tokenizer(learner_dir, key="learner.model")
    sizes = vocab_sizes(learner_dir, explorer_dir)
    prompts, report = load_prompts(config, "train", tokenizer)
    eval_prompts: list[Prompt] = []
    if config.data.eval:
        eval_prompts, eval_report = load_prompts(config, "eval", tokenizer)
        eval_prompts = held_out(eval_prompts, config.evaluation.problems)
        report += eval_report
    stops = stop_tokens(learner_dir, tokenizer)
    if len(tokenizer) > min(sizes.values()):
        _check_ids(sizes, max(max(prompt.token_ids) for prompt in [*prompts, *eval_prompts]), max(stops))
    report += _sizes_line(config, sizes)
    schedule = PromptSchedule(prompts, seed=config.run.seed, per_step=config.algorithm.prompts_per_step)
    demand = Demand(config, schedule, stops)

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return Materials(learner_dir, explorer_dir, demand, eval_prompts, decode, report)


def model_directories(config: Config, world: World, console: Console) -> tuple[Path, Path | None]:
    """Where π_θ and π_ω lie. Rank 0 makes the embedded family first if one of them is of it and it is not cached."""
    names = [config.learner.model]
    if explorer_needed(config) or config.correction.learner.weight == "mixture":
        names.append(config.explorer.model)
    directories = [Path(name) for name in names]
    if any(name.startswith(EMBEDDED) for name in names):
        family = shared_family(config.run.seed, world, console)
        directories = [
            Path(getattr(family, name.removeprefix(EMBEDDED))) if name.startswith(EMBEDDED) else Path(name)
            for name in names
        ]
    return directories[0], directories[1] if len(directories) > 1 else None


def shared_family(seed: int, world: World, console: Console) -> Family:
    """The embedded models, made by rank 0 while the others wait."""

    def show(text: str, fraction: float) -> None:
        console.progress(text, round(100 * fraction), 100)

    if world.is_main:
        embedded_family(default_cache_root(), seed, on_progress=show)
    # Making it may take longer than a collective waits on a busy machine.
    world.barrier("the embedded models", timeout_s=1800.0)
    return embedded_family(default_cache_root(), seed)


def vocab_sizes(learner_dir: Path, explorer_dir: Path | None) -> dict[Source, int]:
    """Rows of the output head of each model that takes part."""
    sizes = {Source.LEARNER: vocab_size(learner_dir, key="learner.model")}
    if explorer_dir is not None:
        sizes[Source.EXPLORER] = vocab_size(explorer_dir, key="explorer.model")
    return sizes


def _sizes_line(config: Config, sizes: dict[Source, int]) -> list[str]:
    """What is done where the models of one tokenizer have heads of different sizes; nothing where they are equal."""
    if len(set(sizes.values())) == 1:
        return []
    bounds = id_bounds(config, sizes)
    said = " and ".join(f"{source}.model has {size:,} token ids" for source, size in sizes.items())
    larger = max(sizes, key=lambda source: sizes[source])
    if bounds[larger] == sizes[larger]:
        return [f"{said}: no row has an id that is unknown to a model that scores it"]
    last = bounds[larger] - 1
    return [f"{said}: {larger} rows with an id above {last:,} are dropped ({UNKNOWN_TOKEN}) and replaced"]


def _check_ids(sizes: dict[Source, int], prompt: int, stop: int) -> None:
    """ValueError where a prompt or the end of a sequence has an id that a model lacks."""
    for source, size in sizes.items():
        for what, highest in (("the prompts need", prompt), ("a stop token has", stop)):
            if highest >= size:
                raise ValueError(
                    f"{what} token id {highest}, and {source}.model has ids 0 … {size - 1} only (its config.json's "
                    "vocab_size): give it as many embeddings as its tokenizer has tokens"
                )


def role_terms(materials: Materials) -> dict[Source, RoleTerms]:
    """What workers of each role must run; learner rollouts are sent their weights, so only their tokenizer is fixed."""
    directories = {Source.LEARNER: materials.learner_dir, Source.EXPLORER: materials.explorer_dir}
    sizes = vocab_sizes(materials.learner_dir, materials.explorer_dir)
    return {
        source: RoleTerms(
            model_dir=directory,
            fingerprints=fingerprints(directory, weights=source is Source.EXPLORER),
            vocab_size=sizes[source],
        )
        for source, directory in directories.items()
        if directory is not None
    }
