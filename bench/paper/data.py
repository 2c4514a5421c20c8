"""Problems and recorded completions of the tiny scale: splits that no choice was made on, hard prompts, and explorer
completions filtered to the learner's diversity (Table 4). Made once, in a directory of `python -m bench.paper`.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.choose_explorer import Drawn, draw
from bench.paper.models import FAMILY_SEED
from core.config import Config, Data
from core.configfile import parse_command
from core.countdown import NUMBERS_PER_PROBLEM, Problem, problems, solutions, verify
from core.diversity import Sample, group_diversity
from core.prompts import PromptSchedule
from core.schema import Prompt, Source
from rollout.completion_store import CompletionStore, Recorded
from rollout.demand import Demand
from rollout.fingerprint import fingerprints
from rollout.prompting import load_prompts, stop_tokens
from rollout.reuse import Reuse, store_identity
from trainer.models import load_tokenizer

TEST_PROBLEMS, OTHER_PROBLEMS = 480, 256
HARD_SAMPLES, HARD_RIGHT = 16, 2  # a prompt is hard where the learner has at most 2 of 16 right
POOL, KEPT, TRIES = 24, 8, 96
OTHER_TARGETS = range(21, 29)
SPLITS = ("train", "validation", "test", "other")


def data_folder(work: Path) -> Path:
    """Where problems and recorded completions of these sizes lie."""
    sizes = (FAMILY_SEED, TEST_PROBLEMS, OTHER_PROBLEMS, HARD_SAMPLES, HARD_RIGHT, POOL, KEPT, TRIES)
    return work / f"data-{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]}"


def write_splits(folder: Path) -> dict[str, Path]:
    """Parquet files of the problems, which share no (numbers, target).

    `train`; `validation`, the embedded held-out problems, on which the defaults and the learning rates were chosen;
    `test`, taken out of the embedded training problems: nothing was chosen on it; `other`, out of domain: targets of 21
    to 28, where all other problems have 1 to 20.
    """
    own, held = problems("train", FAMILY_SEED), problems("eval", FAMILY_SEED)
    sets = {
        "train": own[:-TEST_PROBLEMS],
        "validation": held,
        "test": own[-TEST_PROBLEMS:],
        "other": _other_problems(),
    }
    return {name: _write(folder / f"{name}.parquet", [p.prompt for p in sets[name]]) for name in SPLITS}


def _other_problems() -> list[Problem]:
    rng = np.random.Generator(np.random.Philox([FAMILY_SEED, 2]))
    sets = combinations_with_replacement(range(1, 10), NUMBERS_PER_PROBLEM)
    pairs = [(numbers, target) for numbers in sets for target in OTHER_TARGETS]
    found = [pair for pair in pairs if next(solutions(*pair), None) is not None]
    chosen = [found[index] for index in rng.permutation(len(found))[:OTHER_PROBLEMS].tolist()]
    return [Problem(tuple(rng.permutation(numbers).tolist()), target) for numbers, target in chosen]


def _write(file: Path, texts: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    answers = [text.split()[-2] for text in texts]
    pq.write_table(pa.table({"prompt": list(texts), "answer": answers}), file)
    return file


def read_prompts(file: Path, model_dir: Path) -> list[Prompt]:
    """The prompts of a parquet file, tokenised for a model."""
    return load_prompts(Config(data=Data(train=str(file))), "train", load_tokenizer(model_dir, key="MODEL"))[0]


def sample(model_dir: Path, prompts: Sequence[Prompt], samples: int, *, first: int = 0) -> Drawn:
    """`samples` scored completions of every prompt from number `first` on, at temperature 1."""
    options = argparse.Namespace(
        samples=samples, engine="torch", max_tokens=24, device="cpu", dtype="float32", reward="countdown"
    )
    return draw(model_dir, prompts, options, first=first)


def hard_problems(folder: Path, files: dict[str, Path], learner_dir: Path) -> dict[str, Path]:
    """`hard_train` and `hard_test`: the problems of `train` and `test` that the learner seldom solves.

    Chosen by samples that are drawn for this only: what is measured of them later is measured on others.
    """
    found = {f"hard_{split}": folder / f"hard_{split}.parquet" for split in ("train", "test")}
    for split in () if all(file.exists() for file in found.values()) else ("train", "test"):
        prompts = read_prompts(files[split], learner_dir)
        drawn = sample(learner_dir, prompts, HARD_SAMPLES, first=10_000)
        hard = [prompt.text for prompt, right in zip(prompts, drawn.right) if right <= HARD_RIGHT]
        _write(found[f"hard_{split}"], hard)
    return found


def filtered_store(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Fill the directory `folder` with explorer completions as diverse as the learner's; returns what that did.

    Of `POOL` completions of each prompt those `KEPT` are chosen whose mean pairwise edit distance and share of distinct
    texts are nearest to those of the learner's own completions of the prompt. `arguments` are those of a run that will
    read the store.
    """
    done = folder / "filter.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    config = parse_command([*arguments, f"explorer.store={folder}"]).config
    learner_dir, explorer_dir = Path(config.learner.model), Path(config.explorer.model)
    tokenizer = load_tokenizer(learner_dir, key="learner.model")
    prompts, _ = load_prompts(config, "train", tokenizer)
    schedule = PromptSchedule(prompts, seed=config.run.seed, per_step=config.algorithm.prompts_per_step)
    demand = Demand(config, schedule, stop_tokens(learner_dir, tokenizer))
    store = CompletionStore(folder, store_identity(config, demand, fingerprints(explorer_dir, weights=True)))
    pool, own = sample(explorer_dir, prompts, POOL), sample(learner_dir, prompts, KEPT)
    rng = np.random.Generator(np.random.Philox([FAMILY_SEED, 3]))
    chosen = [choose_subset(texts, target, rng) for texts, target in zip(pool.texts, own.texts)]
    rows = [
        Recorded(prompt.uid, number, one.token_ids, one.logprobs, one.finish)
        for prompt, row, picked in zip(prompts, pool.rows, chosen)
        for number, one in enumerate(row[place] for place in picked)
    ]
    store.add(sorted(rows, key=lambda row: (row.number, row.prompt_uid)))
    _require_complete(config, demand, folder)
    texts = [[texts[place] for place in picked] for texts, picked in zip(pool.texts, chosen)]
    right = [sum(verify(prompt.text, text)[0] for text in row) for prompt, row in zip(prompts, texts)]
    kept = Drawn([[row[place] for place in picked] for row, picked in zip(pool.rows, chosen)], texts, right, 0.0)
    effect = {"learner": diversity(own), "explorer": diversity(pool), "filtered": diversity(kept)}
    done.write_text(json.dumps(effect))
    return effect


def choose_subset(texts: Sequence[str], target: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Places of the `KEPT` texts whose diversity is nearest to that of `target`, of random subsets and of the
    neighbourhoods of every text, in random order."""
    distance = _distances(texts)
    wanted = np.array(_spread(_distances(target), target, range(len(target))))
    size = min(KEPT, len(texts))
    tries = [rng.permutation(len(texts))[:size] for _ in range(TRIES)]
    tries += [np.argsort(row, kind="stable")[:size] for row in distance]
    gaps = [float(np.abs(np.array(_spread(distance, texts, one)) - wanted).sum()) for one in tries]
    return [int(place) for place in rng.permutation(tries[int(np.argmin(gaps))])]


def _distances(texts: Sequence[str]) -> np.ndarray:
    """Levenshtein distance over longer length of every pair, on words (one token each)."""
    from rapidfuzz.distance import Levenshtein

    words = [text.split() for text in texts]
    return np.array([[Levenshtein.normalized_distance(one, other) for other in words] for one in words])


def _spread(distance: np.ndarray, texts: Sequence[str], chosen: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Mean pairwise distance and share of distinct texts."""
    places = np.asarray(list(chosen))
    size = len(places)
    total = distance[np.ix_(places, places)].sum() / (size * (size - 1))
    return float(total), len({texts[place] for place in places.tolist()}) / size


def diversity(drawn: Drawn) -> dict[str, float]:
    """Table 3's metrics over the first `KEPT` completions, and the share that is right."""
    groups = [
        [Sample(text, one.token_ids.tolist()) for one, text in zip(row, texts)]
        for row, texts in zip(drawn.rows, drawn.texts)
    ]
    found = group_diversity(groups, rows=KEPT, self_bleu_limit=128, whole_texts=True)
    return found | {"right": float(np.mean(drawn.right)) / len(drawn.rows[0])}


def _require_complete(config: Config, demand: Demand, folder: Path) -> None:
    """A run that lacked a completion would generate it, unfiltered."""
    marks = fingerprints(Path(config.explorer.model), weights=True)
    reuse = Reuse(CompletionStore(folder, store_identity(config, demand, marks)), demand, on_missing=lambda: None)
    steps = [step for step in range(1, config.algorithm.steps + 1) if demand.count(Source.EXPLORER, step)]
    if not reuse.complete(steps):
        raise ValueError(
            f"{folder}: the schedule wants explorer completions of second visits; use more training prompts or a "
            "shorter T_mix"
        )
