"""Which model to take as the explorer of a learner, for how long, and why: measured before any training.

Each model draws --samples completions of the same prompts at temperature 1 with the same engine. Measured are pass@k
and where its curves cross, diversity, seconds per completion, effective sample size and KL of the candidate's tokens
under the learner, and what decides: how many more groups have both right and wrong completions (a gradient), and how
many of the prompts that the learner's whole group fails at the candidate solves, less what as many further samples of
the learner would. The learner may be a candidate too: the control, with samples of its own.

    python -m bench.choose_explorer embedded:learner embedded:explorer --prompts embedded:countdown
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.explorer_choice import (
    Counts,
    crossover,
    fail_share,
    mixed_gain,
    mixed_share,
    pass_difference,
    recommend,
    rescue_gain,
)
from bench.measure import RESULTS, elapsed, record, table
from bench.off_policyness import off_policyness
from core.config import Config, Data, Rollout, Run
from core.diversity import Sample, group_diversity, without_answers
from core.schema import Prompt, Sampling
from core.seeds import recorded_seed
from rollout.engine import Request, Sampled
from rollout.prompting import load_prompts, stop_tokens
from rollout.worker import load_engine
from trainer.evaluate import model_directory, pass_at
from trainer.generations import Generation
from trainer.models import DTYPES, load_tokenizer, require_same_tokenizer
from trainer.verdicts import judge

EMBEDDED = "embedded:"
DIVERSITY_ROWS = 4


class Drawn(NamedTuple):
    """What one model answered: per prompt its completions, texts and which are right; seconds for all of it."""

    rows: list[list[Sampled]]
    texts: list[list[str]]
    right: list[int]
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        compare(options)
    except (ValueError, OSError) as error:
        print(f"choose_explorer: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Measure, print, recommend and record."""
    learner_dir = model_directory(options.learner, options.seed)
    places = {
        f"{name} (again)" if name == options.learner else name: model_directory(name, options.seed)
        for name in options.candidates
    }
    for place in places.values():
        require_same_tokenizer(learner_dir, place)
    prompts = _prompts(options, learner_dir)
    own = draw(learner_dir, prompts, options, first=0)
    learner = _row(options.learner, own, own, options)
    candidates = {}
    for number, name in enumerate(places, start=1):
        drawn = draw(places[name], prompts, options, first=number * options.samples)
        far = off_policyness(learner_dir, prompts, drawn.rows, device=options.device, dtype=options.dtype)
        candidates[name] = _row(name, drawn, own, options) | far | _gains(drawn, own, options)
    rows = [learner, *candidates.values()]
    print(table(rows, ["model", *(f"pass@{k}" for k in _ks(options)), "crosses_at", "surely_at", "all_fail"]))
    print(table(rows, ["model", "self_bleu", "edit_diversity", "unique_answer_ratio", "length"]))
    print(table(rows, ["model", "seconds_per_completion", "cost_ratio", "ess", "kl_k1", "kl_k3"]))
    print(table(rows, ["model", "mixed_share", "mixed_gain", "rescue_gain"]))
    settings, reasons = recommend(candidates, options.steps)
    print("recommended: " + ", ".join(f"{key} = {value!r}" for key, value in settings.items()))
    print("\n".join(f"  because {reason}" for reason in reasons))
    print("  This is what the models show before training; only training (python -m bench.paper) shows what it does.")
    plain = {key: getattr(options, key) for key in ("prompts", "problems", "samples", "group_size", "steps", "seed")}
    kept = [{**_flat(row), **plain, "recommended": settings, "reasons": reasons} for row in rows]
    print(f"recorded in {record('choose_explorer', kept, options.results)}")


def draw(model_dir: Path, prompts: Sequence[Prompt], options: argparse.Namespace, *, first: int) -> Drawn:
    """Completions number `first` and on of every prompt, scored; one untimed batch of a few before."""
    tokenizer = load_tokenizer(model_dir, key="MODEL")
    sampling = Sampling(
        temperature=1.0, max_tokens=options.max_tokens, stop_token_ids=stop_tokens(model_dir, tokenizer)
    )
    engine = load_engine(options.engine, model_dir, device=options.device, dtype=options.dtype)
    numbers = range(first, first + options.samples)
    requests = [
        Request(prompt.token_ids, [recorded_seed(prompt.uid, number) for number in numbers]) for prompt in prompts
    ]
    list(engine.generate(requests[:2], sampling))
    found: list[Sampled] = []
    seconds = elapsed(lambda: found.extend(engine.generate(requests, sampling)))
    engine.close()
    rows: list[list[Sampled]] = [[] for _ in prompts]
    for one in sorted(found, key=lambda one: (one.request, one.sample)):
        rows[one.request].append(one)
    texts = [[str(tokenizer.decode(one.token_ids.tolist(), skip_special_tokens=True)) for one in row] for row in rows]
    said = [
        [Generation(prompt.uid, one.sample, text, one.token_ids.tolist(), one.finish) for one, text in zip(row, of)]
        for prompt, row, of in zip(prompts, rows, texts)
    ]
    verdicts = judge(prompts, said, reward=options.reward, workers=1, timeout_s=20.0)
    return Drawn(rows, texts, [sum(one.strict > 0.5 for one in row) for row in verdicts], seconds)


def _row(name: str, drawn: Drawn, own: Drawn, options: argparse.Namespace) -> dict[str, Any]:
    """What the tables show of any model."""
    found: dict[str, Any] = {"model": name}
    for k in _ks(options):
        estimate = pass_at([options.samples] * len(drawn.right), drawn.right, k)
        assert estimate is not None
        found[f"pass@{k}"] = estimate.mean
    samples = [
        [Sample(text, one.token_ids.tolist()) for one, text in zip(row, texts)]
        for row, texts in zip(drawn.rows, drawn.texts)
    ]
    whole = without_answers(text for texts in drawn.texts for text in texts)
    return {
        **found,
        **group_diversity(samples, rows=DIVERSITY_ROWS, limit=128, self_bleu_limit=128, whole_texts=whole),
        "all_fail": fail_share(options.samples, drawn.right, options.group_size),
        "seconds_per_completion": drawn.seconds / (len(drawn.rows) * options.samples),
        "cost_ratio": drawn.seconds / own.seconds,
        "length": float(np.mean([len(one.token_ids) for row in drawn.rows for one in row])),
    }


def _gains(drawn: Drawn, own: Drawn, options: argparse.Namespace) -> dict[str, Any]:
    """What a candidate is beside the learner."""
    counts, size = Counts(options.samples, own.right, drawn.right), options.group_size
    return {
        **{f"pass@{k}_difference": pass_difference(counts, k) for k in _ks(options)},
        "crosses_at": crossover(counts, _ks(options)),
        "surely_at": crossover(counts, _ks(options), surely=True),
        "mixed_share": mixed_share(counts, size // 2, size),
        "mixed_gain": mixed_gain(counts, size),
        "rescue_gain": rescue_gain(counts, size, options.rescue_quota),
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in row.items()}


def _ks(options: argparse.Namespace) -> list[int]:
    return [2**power for power in range(options.samples.bit_length())]


def _prompts(options: argparse.Namespace, learner_dir: Path) -> list[Prompt]:
    embedded = options.prompts.startswith(EMBEDDED)
    options.reward = options.reward or ("countdown" if embedded else "math")
    options.max_tokens = options.max_tokens or (24 if embedded else 4096)
    config = Config(
        run=Run(seed=options.seed),
        data=Data(train=options.prompts, template="plain" if embedded else "chat"),
        rollout=Rollout(max_prompt_tokens=options.max_prompt_tokens),
    )
    prompts, report = load_prompts(config, "train", load_tokenizer(learner_dir, key="LEARNER"))
    print("\n".join(report))
    return prompts[: options.problems]


def _check(options: argparse.Namespace) -> None:
    needed = options.group_size + options.rescue_quota
    if options.samples < max(needed, DIVERSITY_ROWS):
        raise ValueError(
            f"--samples {options.samples}: groups of {options.group_size} and {options.rescue_quota} more completions "
            f"to rescue them need at least {needed}"
        )
    for name in ("problems", "group_size", "rescue_quota", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.choose_explorer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("learner", help="Hugging Face directory, or embedded:learner")
    add("candidates", nargs="+", metavar="candidate", help="models of the learner's family, such as embedded:explorer")
    add("--prompts", default="embedded:countdown", help="parquet file as data.train takes it (embedded:countdown)")
    add("--problems", type=int, default=128, help="prompts, the first ones (128)")
    add("--samples", type=int, default=32, help="completions per prompt and model (32)")
    add("--group-size", type=int, default=8, help="G of the training planned (8)")
    add("--rescue-quota", type=int, default=4, help="algorithm.rescue_quota (4)")
    add("--steps", type=int, default=16, help="training steps planned, for T_mix (16)")
    add("--max-tokens", type=int, help="longest completion (24 embedded, else 4096)")
    add("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out (1024)")
    add("--reward", help="countdown, math or module:function (countdown embedded, else math)")
    add("--engine", choices=["auto", "torch", "vllm"], default="auto")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16" if cuda else "float32")
    add("--seed", type=int, default=0, help="of the embedded problems and models (0)")
    add("--results", type=Path, default=RESULTS, help="folder of the record (bench/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
