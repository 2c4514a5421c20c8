"""Pass@k with its uncertainty; `python -m trainer.evaluate MODEL --benchmarks …` measures it without a run."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from core.config import Evaluation
from core.diversity import pass_at_k
from core.metrics import CORRECT_ABOVE
from core.schema import ScoredCompletion
from core.standard_streams import keep_going
from trainer.answering import Answered, Evaluator
from trainer.command import BAD_INPUT, OK, complain
from trainer.evaluate_options import check, parser
from trainer.family import default_cache_root, embedded_family
from trainer.run_directory import CONFIG_FILE

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

    The standard error is over problems, so it holds the noise of the samples as well. Problems with fewer than k
    samples are left out; None where that leaves none. One problem has standard error 0.
    """
    if len(samples) != len(correct) or not all(0 <= c <= n for n, c in zip(samples, correct)) or k < 1:
        raise ValueError(
            f"pass@k needs k >= 1 and 0 <= correct <= samples per problem: k = {k}, {samples=}, {correct=}"
        )
    values = [pass_at_k(n, c, k) for n, c in zip(samples, correct) if n >= k]
    if not values:
        return None
    stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(np.mean(values)), stderr)


def summarise(rows: Sequence[Sequence[ScoredCompletion]], settings: Evaluation) -> dict[str, float]:
    """The evaluation line of metrics.jsonl, from the scored completions of each held-out problem.

    `eval/pass@k` and `eval/stderr/pass@k` (a completion is correct with a reward above 0.5), `eval/reward`,
    `eval/graded_ratio` (share of rewards other than −1, 0 and 1), `eval/mean_length` (tokens, the stop token included),
    `eval/truncated_ratio`, `eval/unique_trace_ratio` (distinct texts over samples, mean over problems),
    `eval/problems`, `eval/completions`, `eval/failed_ratio`. Completions whose reward failed are not among the rows:
    they count as wrong, as they do in `measure`, so that every k is of the same problems. The other means are without
    them; where no reward is left, there are none.
    """
    answered = [row for row in rows if row]
    scored = [one for row in answered for one in row]
    metrics = {"eval/problems": float(len(rows)), "eval/completions": float(len(rows) * settings.samples)}
    metrics["eval/failed_ratio"] = 1 - len(scored) / metrics["eval/completions"]
    if not scored:
        return metrics
    correct = [count_correct(row) for row in rows]
    for k in settings.k:
        estimate = pass_at([settings.samples] * len(rows), correct, k)
        assert estimate is not None, "every k is at most evaluation.samples"
        metrics[f"eval/pass@{k}"], metrics[f"eval/stderr/pass@{k}"] = estimate
    metrics["eval/reward"] = float(np.mean([one.reward for one in scored]))
    metrics["eval/graded_ratio"] = float(np.mean([one.reward not in PLAIN_REWARDS for one in scored]))
    metrics["eval/mean_length"] = float(np.mean([one.completion.num_tokens for one in scored]))
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
        check(options)
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
        _refuse_run(Path(name))
        return Path(name)
    if part not in ("learner", "explorer"):
        raise ValueError(f"{name}: the embedded models are embedded:learner and embedded:explorer")
    family = embedded_family(default_cache_root(), seed, on_progress=show_progress)
    return family.learner if part == "learner" else family.explorer


def _refuse_run(directory: Path) -> None:
    """A run directory is no model, but has some."""
    if not (directory / CONFIG_FILE).is_file():
        return
    checkpoints = sorted(directory.glob("checkpoints/step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    models = [path for path in (directory / "model", *reversed(checkpoints)) if (path / "config.json").is_file()]
    hint = f"; did you mean {models[0]}?" if models else ", and has no model yet"
    raise ValueError(f"{directory} is a run directory{hint}")


if __name__ == "__main__":
    keep_going()
    sys.exit(main(sys.argv[1:]))
