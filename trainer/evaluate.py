"""Pass@k with its uncertainty; `python -m trainer.evaluate MODEL --benchmarks …` measures it without a run."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from core.config import Evaluation
from core.metrics import CORRECT_ABOVE
from core.schema import ScoredCompletion
from core.standard_streams import keep_going
from rollout.torch_engine import DTYPES
from trainer.answering import Answered, Evaluator
from trainer.benchmarks import BENCHMARKS, MODES, find_benchmark
from trainer.command import BAD_INPUT, OK, complain
from trainer.family import default_cache_root, embedded_family

PLAIN_REWARDS = (-1.0, 0.0, 1.0)


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
    `eval/graded_ratio` (share of rewards other than −1, 0 and 1), `eval/mean_length` (tokens, the stop token included),
    `eval/truncated_ratio`, `eval/unique_trace_ratio` (distinct texts over samples, mean over problems),
    `eval/problems`, `eval/completions`. Completions whose reward failed are not among the rows; problems without any
    are left out.
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
    metrics["eval/graded_ratio"] = float(np.mean([one.reward not in PLAIN_REWARDS for one in scored]))
    metrics["eval/mean_length"] = float(np.mean([len(one.completion.tokens) for one in scored]))
    metrics["eval/truncated_ratio"] = float(np.mean([one.completion.finish == "length" for one in scored]))
    metrics["eval/unique_trace_ratio"] = float(np.mean([len({one.text for one in row}) / len(row) for row in answered]))
    return metrics


def count_correct(row: Sequence[ScoredCompletion]) -> int:
    """Completions of one problem with a reward above 0.5."""
    return sum(one.reward > CORRECT_ABOVE for one in row)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    options = parser().parse_args(arguments)
    try:
        _check(options)
        model_dir = model_directory(options.model, options.seed)
        with Evaluator(model_dir, options, on_progress=show_progress) as evaluator:
            loaded = {name: evaluator.load(name) for name in options.benchmarks}  # bad files end it before it generates
            results = {name: measure(evaluator.answer(problems), options.k) for name, problems in loaded.items()}
        print(table(results, options.k))
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        report = msgspec.json.encode({"settings": settings, "benchmarks": results})
        file = evaluator.out / "results.json"
        file.write_bytes(msgspec.json.format(report, indent=2) + b"\n")
        print(f"results: {file}; scored completions: {evaluator.out}/NAME.parquet")
    except (ValueError, OSError) as error:
        return complain(str(error), BAD_INPUT)
    return OK


def measure(answered: Answered, ks: Sequence[int]) -> dict[str, object]:
    """The results of one benchmark.

    `pass@k`, `stderr/pass@k` and `interval/pass@k` (95 %) by the strict check, and under `lenient` by the authors';
    `failures`: strict checks that failed (time-outs and others), which count as wrong; `counts`: uid to
    [n, strictly correct, leniently correct].
    """
    rows = [generation for row in answered.rows for generation in row]
    verdicts = [verdict for row in answered.verdicts for verdict in row]
    samples = [len(row) for row in answered.rows]
    strict = [round(sum(verdict.strict for verdict in row)) for row in answered.verdicts]
    lenient = [round(sum(verdict.lenient for verdict in row)) for row in answered.verdicts]
    failures = Counter(verdict.failure for verdict in verdicts if verdict.failure)
    result: dict[str, object] = {
        "problems": len(answered.prompts),
        "completions": len(rows),
        **_estimates(samples, strict, ks),
        "lenient": _estimates(samples, lenient, ks) if answered.benchmark.chat else {},
        "timeouts": failures["timeout"],
        "failures": dict(failures),
        "first_failure": next((verdict.detail for verdict in verdicts if verdict.failure), ""),
        "mean_length": float(np.mean([len(row.token_ids) for row in rows])),
        "truncated_ratio": float(np.mean([row.finish == "length" for row in rows])),
        "unique_trace_ratio": float(np.mean([len({row.text for row in of}) / len(of) for of in answered.rows])),
        "counts": {prompt.uid: list(of) for prompt, *of in zip(answered.prompts, samples, strict, lenient)},
    }
    return result


def _estimates(samples: Sequence[int], correct: Sequence[int], ks: Sequence[int]) -> dict[str, object]:
    found: dict[str, object] = {}
    for k in ks:
        estimate = pass_at(samples, correct, k)
        assert estimate is not None, "every problem has as many samples as the largest k"
        found[f"pass@{k}"], found[f"stderr/pass@{k}"] = estimate
        found[f"interval/pass@{k}"] = estimate.interval
    return found


def table(results: Mapping[str, Mapping[str, object]], ks: Sequence[int]) -> str:
    """One line per benchmark: problems, pass@k in per cent with half its 95 % interval, lenient pass@1, failures."""
    heads = [f"pass@{k}" for k in ks]
    titles = " ".join(f"{title:>13}" for title in [*heads, "lenient @1", "failed"])
    lines = [f"{'benchmark':<14} {'problems':>8} {titles}"]
    for name, metrics in results.items():
        lenient, failures = metrics["lenient"], metrics["failures"]
        assert isinstance(lenient, dict)
        assert isinstance(failures, dict)
        cells = [_cell(metrics, head) for head in heads] + [_cell(lenient, "pass@1"), f"{sum(failures.values())}"]
        lines.append(f"{name:<14} {metrics['problems']:>8} " + " ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(
        [
            *lines,
            "per cent; ± half of the 95 % confidence interval over problems; lenient: as the authors' code scores;",
            "failed: strict checks without a score (such as time-outs), counted as wrong",
        ]
    )


def _cell(metrics: Mapping[str, object], head: str) -> str:
    mean, stderr = metrics.get(head), metrics.get(f"stderr/{head}")
    return f"{100 * mean:.1f} ± {196 * stderr:.1f}" if isinstance(mean, float) and isinstance(stderr, float) else "-"


def show_progress(text: str, fraction: float) -> None:
    """Redraw one line on a terminal's error stream."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)


def model_directory(name: str, seed: int) -> Path:
    """A Hugging Face directory, or that of an embedded model, made where it is not there yet."""
    kind, colon, part = name.partition(":")
    if kind != "embedded" or not colon:
        return Path(name)
    if part not in ("learner", "explorer"):
        raise ValueError(f"{name}: the embedded models are embedded:learner and embedded:explorer")
    family = embedded_family(default_cache_root(), seed, on_progress=show_progress)
    return family.learner if part == "learner" else family.explorer


def _check(options: argparse.Namespace) -> None:
    for name in options.benchmarks:
        find_benchmark(name)
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples} must be at least 1")
    # Powers of two up to the number of samples, unless asked for others.
    options.k = options.k or [2**power for power in range(options.samples.bit_length())]
    for k in options.k:
        if not 1 <= k <= options.samples:
            raise ValueError(f"--k {k}: each k must be between 1 and --samples {options.samples}")
    if options.temperature is not None and not options.temperature > 0:
        raise ValueError(f"--temperature {options.temperature}: sampling needs a temperature above 0, such as 1.0")
    for name in ("problems", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 0")
    for name in ("max_tokens", "batch_rows", "workers", "tensor_parallel"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if not options.score_timeout > 0:
        raise ValueError(f"--score-timeout {options.score_timeout} must be above 0 seconds")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description="Measure pass@k of a model.")
    add = parser.add_argument
    add("model", help="Hugging Face directory, embedded:learner or embedded:explorer")
    add("--benchmarks", nargs="+", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--data", type=Path, help="directory with NAME.parquet, NAME.jsonl or a folder NAME of each benchmark")
    add("--out", type=Path, help="directory to write and to continue (runs/evaluations/MODEL-FINGERPRINT/MODE)")
    add("--samples", type=int, default=16, help="completions per problem, n of pass@k (16)")
    add("--k", type=int, nargs="+", help="the k of pass@k (powers of two up to --samples)")
    add("--mode", choices=list(MODES), default="nothink", help="the published settings of Qwen3's modes (nothink)")
    add("--temperature", type=float, help="instead of the mode's (countdown: 1.0)")
    add("--max-tokens", type=int, help="longest completion, instead of the benchmark's")
    add("--problems", type=int, default=0, help="only the first so many; 0 is all (0)")
    add("--seed", type=int, default=0, help="of sampling, embedded problems and embedded models (0)")
    add(
        "--engine", choices=["auto", "torch", "vllm"], default="auto", help="vLLM on a GPU where it is installed (auto)"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=sorted(DTYPES), help="working precision (bfloat16 on cuda, float32 on cpu)")
    add("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads over (1)")
    add("--batch-rows", type=int, help="completions generated at once (1024 with torch, all with vLLM)")
    add("--workers", type=int, default=1, help="scoring processes (1)")
    add("--score-timeout", type=float, default=20.0, help="seconds for the strict check of one completion (20)")
    return parser


if __name__ == "__main__":
    keep_going()
    sys.exit(main(sys.argv[1:]))
