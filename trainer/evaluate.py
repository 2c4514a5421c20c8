"""Pass@k with its uncertainty; `python -m trainer.evaluate MODEL --benchmarks …` measures it without a run."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from core.config import Evaluation
from core.schema import Sampling, ScoredCompletion
from rollout.prompting import held_out, load_prompts, stop_tokens
from rollout.torch_engine import DTYPES, TorchEngine
from trainer.benchmarks import BENCHMARKS, answer_prompts, find_benchmark
from trainer.command import BAD_INPUT, OK, complain
from trainer.family import default_cache_root, embedded_family
from trainer.models import load_tokenizer

# Rewards are 0 and 1, or −1 and 1 in some users' functions.
CORRECT_ABOVE = 0.5


class Estimate(NamedTuple):
    """A mean over problems and its standard error.

    Example: Estimate(mean=0.41, stderr=0.02)
    """

    mean: float
    stderr: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % normal confidence interval, cut to [0, 1]."""
        margin = 1.96 * self.stderr
        return max(0.0, self.mean - margin), min(1.0, self.mean + margin)


def pass_at(samples: Sequence[int], correct: Sequence[int], k: int) -> Estimate | None:
    """Mean over problems of the unbiased pass@k of each, from n samples of which c are correct.

        pass@k = 1 − C(n−c, k) / C(n, k);   pass@1 = c/n, the mean over samples

    (arXiv:2107.03374, equation 1.) The standard error is over problems, so it holds the noise of the samples as well.
    Problems with fewer than k samples are left out; None where that leaves none. One problem has standard error 0.
    """
    if len(samples) != len(correct) or not all(0 <= c <= n for n, c in zip(samples, correct)) or k < 1:
        raise ValueError(
            f"pass@k needs k >= 1 and 0 <= correct <= samples per problem: k = {k}, {samples=}, {correct=}"
        )
    values = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(samples, correct) if n >= k]
    if not values:
        return None
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(np.mean(values)), stderr)


def summarise(rows: Sequence[Sequence[ScoredCompletion]], settings: Evaluation) -> dict[str, float]:
    """The evaluation line of metrics.jsonl, from the scored completions of each held-out problem.

    `eval/pass@k` and `eval/stderr/pass@k` (a completion is correct with a reward above 0.5), `eval/reward`,
    `eval/mean_length` (tokens, the stop token included), `eval/truncated_ratio`, `eval/unique_trace_ratio` (distinct
    texts over samples, mean over problems), `eval/problems`, `eval/completions`. Completions whose reward failed are
    not among the rows; problems without any are left out.
    """
    answered = [row for row in rows if row]
    scored = [one for row in answered for one in row]
    metrics = {"eval/problems": float(len(answered)), "eval/completions": float(len(scored))}
    if not scored:
        return metrics
    samples, correct = [len(row) for row in answered], [count_correct(row) for row in answered]
    for k in settings.k:
        estimate = pass_at(samples, correct, k)
        if estimate is not None:
            metrics[f"eval/pass@{k}"], metrics[f"eval/stderr/pass@{k}"] = estimate
    metrics["eval/reward"] = float(np.mean([one.reward for one in scored]))
    metrics["eval/mean_length"] = float(np.mean([len(one.completion.tokens) for one in scored]))
    metrics["eval/truncated_ratio"] = float(np.mean([one.completion.finish == "length" for one in scored]))
    metrics["eval/unique_trace_ratio"] = float(np.mean([len({one.text for one in row}) / len(row) for row in answered]))
    return metrics


def count_correct(row: Sequence[ScoredCompletion]) -> int:
    """Completions of one problem with a reward above 0.5."""
    return sum(one.reward > CORRECT_ABOVE for one in row)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        model_dir = _model_dir(options.model, options.seed)
        engine = TorchEngine(model_dir, device=options.device, dtype=options.dtype)
        results = {name: measure(name, engine, model_dir, options) for name in options.benchmarks}
        print(table(results, options.k))
        if options.out:
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
            report = msgspec.json.encode({"settings": settings, "benchmarks": results})
            options.out.write_bytes(msgspec.json.format(report, indent=2) + b"\n")
    except (ValueError, OSError) as error:
        return complain(str(error), BAD_INPUT)
    return OK


def measure(name: str, engine: TorchEngine, model_dir: Path, options: argparse.Namespace) -> dict[str, object]:
    """The metrics of one benchmark (as `summarise` names them, without `eval/`), and `counts`: uid to [n, c]."""
    benchmark = find_benchmark(name)
    config = benchmark.config(name, options.seed, options.data)
    tokenizer = load_tokenizer(model_dir, key="MODEL")
    loaded, report = load_prompts(config, "eval", tokenizer)
    print("\n".join(report))
    prompts = held_out(loaded, options.problems)
    sampling = Sampling(
        temperature=options.temperature,
        max_tokens=benchmark.max_response_tokens,
        stop_token_ids=stop_tokens(model_dir, tokenizer),
    )
    rows = answer_prompts(
        engine,
        prompts,
        sampling,
        samples=options.samples,
        seed=options.seed,
        reward=benchmark.reward,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        on_progress=lambda done: show_progress(f"{name}: {done} of {len(prompts)} problems", done / len(prompts)),
    )
    metrics = summarise(rows, Evaluation(samples=options.samples, k=tuple(options.k)))
    counts = {prompt.uid: [len(row), count_correct(row)] for prompt, row in zip(prompts, rows)}
    return {**{key.removeprefix("eval/"): value for key, value in metrics.items()}, "counts": counts}


def table(results: Mapping[str, Mapping[str, object]], ks: Sequence[int]) -> str:
    """One line per benchmark: problems, and each pass@k in per cent with half its 95 % interval."""
    lines = [f"{'benchmark':<14} {'problems':>8} " + " ".join(f"{f'pass@{k}':>13}" for k in ks)]
    for name, metrics in results.items():
        cells = [f"{'-':>13}"] * len(ks)
        for column, k in enumerate(ks):
            mean, stderr = metrics.get(f"pass@{k}"), metrics.get(f"stderr/pass@{k}")
            if isinstance(mean, float) and isinstance(stderr, float):
                cells[column] = f"{f'{100 * mean:.1f} ± {196 * stderr:.1f}':>13}"
        lines.append(f"{name:<14} {metrics['problems']:>8.0f} " + " ".join(cells))
    return "\n".join([*lines, "per cent; ± half of the 95 % confidence interval over problems"])


def show_progress(text: str, fraction: float) -> None:
    """Redraw one line on a terminal's error stream."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)


def _check(options: argparse.Namespace) -> None:
    for name in options.benchmarks:
        find_benchmark(name)
    for k in options.k:
        if not 1 <= k <= options.samples:
            raise ValueError(f"--k {k}: each k must be between 1 and --samples {options.samples}")
    if not options.temperature > 0:
        raise ValueError(f"--temperature {options.temperature}: sampling needs a temperature above 0, such as 1.0")
    if options.problems < 0 or options.seed < 0:
        raise ValueError(f"--problems {options.problems} and --seed {options.seed} must be at least 0")
    if options.out and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no directory {options.out.resolve().parent}")


def _model_dir(name: str, seed: int) -> Path:
    kind, colon, part = name.partition(":")
    if kind != "embedded" or not colon:
        return Path(name)
    if part not in ("learner", "explorer"):
        raise ValueError(f"{name}: the embedded models are embedded:learner and embedded:explorer")
    family = embedded_family(default_cache_root(), seed, on_progress=show_progress)
    return family.learner if part == "learner" else family.explorer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description="Measure pass@k of a model.")
    parser.add_argument("model", help="Hugging Face directory, embedded:learner or embedded:explorer")
    parser.add_argument("--benchmarks", nargs="+", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--samples", type=int, default=8, help="completions per problem, n of pass@k (8)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8], help="the k of pass@k (1 2 4 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (1.0)")
    parser.add_argument("--problems", type=int, default=0, help="only the first so many; 0 is all (0)")
    parser.add_argument("--data", type=Path, help="directory with NAME.parquet of each benchmark")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, embedded problems and embedded models (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="working precision (float32)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
