"""The models that the tiny scale adds to the embedded family: a second, smaller explorer and a family of another kind.

Both are trained as the embedded family is (trainer/pretrain.py): the learner on few fixed traces, explorers distilled
from it. Each is made once, in a directory named by what decides its bytes.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from trainer.family import Family, default_cache_root, embedded_family
from trainer.models import save_model
from trainer.pretrain import Recipe, Shape, build_model, build_tokenizer, read_traces, response_logprobs, train

FAMILY_SEED = 0
SMALLER = Shape(layers=2, hidden=48, heads=2, intermediate=128, init_std=0.08)


class LlamaRecipe(Recipe, frozen=True, kw_only=True):
    """The second family, whose queries and keys are not normalised: lower rates, more steps."""

    learner: Shape = Shape(layers=3, hidden=96, heads=4, intermediate=256, init_std=0.08)
    learner_steps: int = 500
    learner_rate: float = 3e-3
    explorer_rate: float = 5e-3


def embedded() -> Family:
    """Learner and explorer of the embedded family."""
    return embedded_family(default_cache_root(), FAMILY_SEED)


def smaller_explorer(folder: Path) -> Path:
    """An explorer of 0.07M parameters, distilled from the embedded learner."""
    recipe = Recipe(explorer=SMALLER)

    def make(place: Path) -> None:
        teacher = AutoModelForCausalLM.from_pretrained(embedded().learner, local_files_only=True)
        _explorer(place, build_model(recipe.explorer, recipe), teacher, recipe)

    return _once(folder, "smaller-explorer", recipe, make)


def llama_family(folder: Path) -> Family:
    """A learner and an explorer of Llama's architecture (no query-key norms), of the embedded family's sizes."""
    recipe = LlamaRecipe()

    def make(place: Path) -> None:
        learner, traces = build_llama(recipe.learner, recipe), read_traces(FAMILY_SEED)
        train(learner, traces, recipe, steps=recipe.learner_steps, rate=recipe.learner_rate, on_step=_quiet)
        save_model(learner, build_tokenizer(recipe.max_positions), place / "learner")
        _explorer(place / "explorer", build_llama(recipe.explorer, recipe), learner, recipe)

    made = _once(folder, "llama-family", recipe, make)
    return Family(made / "learner", made / "explorer")


def build_llama(shape: Shape, recipe: Recipe) -> PreTrainedModel:
    """A freshly initialised model in float32 on CPU."""
    return build_model(shape, recipe, LlamaForCausalLM)


def _explorer(place: Path, explorer: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
    traces = read_traces(FAMILY_SEED)
    soft = response_logprobs(teacher, traces)
    train(
        explorer, traces, recipe, steps=recipe.explorer_steps, rate=recipe.explorer_rate, on_step=_quiet, teacher=soft
    )
    save_model(explorer, build_tokenizer(recipe.max_positions), place)


def _once(folder: Path, name: str, recipe: Recipe, make: Callable[[Path], None]) -> Path:
    marks = msgspec.json.encode([FAMILY_SEED, recipe, str(torch.__version__)])
    place = folder / f"{name}-{hashlib.sha256(marks).hexdigest()[:12]}"
    if not place.exists():
        print(f"making {place.name}", flush=True)
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FAMILY_SEED)
            make(partial)
        partial.rename(place)
    return place


def _quiet(step: int, loss: float) -> None:
    return None
