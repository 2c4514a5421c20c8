"""What a run is made of, before anything moves: models, tokenizer, prompts, and the demand for completions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from core.config import Config
from core.configcheck import EMBEDDED, explorer_needed
from core.prompts import PromptSchedule
from core.schema import Prompt, Source
from rollout.demand import Demand
from rollout.fingerprint import fingerprints
from rollout.prompting import held_out, load_prompts, stop_tokens
from rollout.roster import RoleTerms
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
    prompts, report = load_prompts(config, "train", tokenizer)
    eval_prompts: list[Prompt] = []
    if config.data.eval:
        eval_prompts, eval_report = load_prompts(config, "eval", tokenizer)
        eval_prompts = held_out(eval_prompts, config.evaluation.problems)
        report += eval_report
    schedule = PromptSchedule(prompts, seed=config.run.seed, per_step=config.algorithm.prompts_per_step)
    demand = Demand(config, schedule, stop_tokens(learner_dir, tokenizer))

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


def role_terms(materials: Materials) -> dict[Source, RoleTerms]:
    """What workers of each role must run; learner rollouts are sent their weights, so only their tokenizer is fixed."""
    directories = {Source.LEARNER: materials.learner_dir, Source.EXPLORER: materials.explorer_dir}
    return {
        source: RoleTerms(
            model_dir=directory,
            fingerprints=fingerprints(directory, weights=source is Source.EXPLORER),
            vocab_size=vocab_size(directory, key=f"{source}.model"),
        )
        for source, directory in directories.items()
        if directory is not None
    }
