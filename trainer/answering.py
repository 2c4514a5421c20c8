"""A model answers benchmarks: problems loaded, completions generated where they are missing, all of them scored."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pyarrow as pa

from core.config import engine_for
from core.schema import Prompt
from rollout.engine import Engine, engine_kind
from rollout.fingerprint import weights_fingerprint
from rollout.prompting import held_out, stop_tokens
from trainer.benchmarks import Benchmark, find_benchmark, load_problems
from trainer.generations import Generation, Generations, Settings, draw, prompts_fingerprint, write_whole
from trainer.models import load_tokenizer
from trainer.penalty import PenalisedSampling, evaluation_engine
from trainer.verdicts import Verdict, judge

TORCH_ROWS, VLLM_ROWS = 1024, 1 << 20


class Loaded(NamedTuple):
    """A benchmark that this model can be asked."""

    name: str
    prompts: list[Prompt]
    fingerprint: str  # of all its problems, whichever are asked
    max_tokens: int


class Answered(NamedTuple):
    """A benchmark with its completions and the verdicts on them, one row per prompt."""

    benchmark: Benchmark
    prompts: list[Prompt]
    rows: list[list[Generation]]
    verdicts: list[list[Verdict]]


class Evaluator:
    """One model under the options of `python -m trainer.evaluate`; the engine is loaded when something is missing.

    `out` is where completions, scores and results go.
    """

    def __init__(
        self, model_dir: Path, options: argparse.Namespace, *, on_progress: Callable[[str, float], None]
    ) -> None:
        self._model_dir, self._options, self._show = model_dir, options, on_progress
        self._tokenizer = load_tokenizer(model_dir, key="MODEL")
        self._fingerprint = weights_fingerprint(model_dir)
        self._engine: Engine | None = None
        self._kind = engine_kind(engine_for(options.engine, options.model), options.device)
        self._dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
        self._label = f"{model_dir.resolve().name}-{self._fingerprint[:8]}"
        self.out: Path = options.out or Path("runs") / "evaluations" / self._label / options.mode
        if self.out.is_file():
            raise ValueError(f"--out {self.out} is a file: give a directory")
        self.out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._engine is not None:
            self._engine.close()

    def load(self, name: str) -> Loaded:
        """A benchmark's problems, after saying what was read."""
        options = self._options
        prompts, report = load_problems(name, self._tokenizer, data=options.data, mode=options.mode, seed=options.seed)
        asked = held_out(prompts, options.problems)
        budget = self._budget(name, prompts, asked, report)
        print("\n".join(report))
        return Loaded(name, asked, prompts_fingerprint(prompts), budget)

    def _budget(self, name: str, prompts: list[Prompt], asked: list[Prompt], report: list[str]) -> int:
        """New tokens at most: what was asked for, or the benchmark's as far as the model has positions for it beside
        the longest of all prompts, so that fewer problems are asked under the same settings."""
        given, published = self._options.max_tokens, find_benchmark(name).max_tokens
        positions = positions_of(self._model_dir)
        if positions is None:
            return given or published
        longest = max(len(prompt.token_ids) for prompt in (asked if given else prompts))
        room = positions - longest
        if (given or 1) > room:
            what = f"--max-tokens {given:,} and the" if given else "the"
            remedy = f"give at most {room:,}, or leave it out" if room > 0 else "take another model"
            raise ValueError(
                f"{what} longest prompt of {name} ({longest:,} tokens) exceed the model's {positions:,} positions; "
                + remedy
            )
        if not given and published > room:
            report.append(
                f"{name}: at most {room:,} new tokens instead of {published:,}: the model has {positions:,} positions"
            )
        return given or min(published, room)

    def answer(self, loaded: Loaded) -> Answered:
        """Generate what is missing, score everything, and keep the scores beside the completions."""
        name, options = loaded.name, self._options
        benchmark = find_benchmark(name)
        settings = Settings(
            benchmark=name,
            model=self._fingerprint,
            prompts=loaded.fingerprint,
            sampling=self._sampling(benchmark, loaded.max_tokens),
            seed=options.seed,
            engine=self._kind,
            dtype=self._dtype,
        )
        kept = Generations(self.out / name, settings)
        if kept.missing(loaded.prompts, options.samples):
            draw(
                self._loaded_engine(),
                loaded.prompts,
                kept,
                settings,
                samples=options.samples,
                batch_rows=options.batch_rows or (VLLM_ROWS if self._kind == "vllm" else TORCH_ROWS),
                decode=lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
                on_progress=self._progress(f"{name}: generated"),
            )
        rows = kept.of(loaded.prompts, options.samples)
        verdicts = judge(
            loaded.prompts,
            rows,
            reward=benchmark.reward,
            workers=options.workers,
            timeout_s=options.score_timeout,
            on_progress=self._progress(f"{name}: scored"),
        )
        answered = Answered(benchmark, loaded.prompts, rows, verdicts)
        write_whole(self.out / f"{name}.parquet", _table(answered, source=self._label))
        return answered

    def _sampling(self, benchmark: Benchmark, max_tokens: int) -> PenalisedSampling:
        decoding, options = benchmark.decoding(self._options.mode), self._options
        return PenalisedSampling(
            temperature=options.temperature or decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            presence_penalty=decoding.presence_penalty,
            max_tokens=max_tokens,
            stop_token_ids=stop_tokens(self._model_dir, self._tokenizer),
        )

    def _loaded_engine(self) -> Engine:
        if self._engine is None:
            sizes = {"tensor_parallel_size": self._options.tensor_parallel} if self._kind == "vllm" else {}
            self._engine = evaluation_engine(
                self._kind, self._model_dir, device=self._options.device, dtype=self._dtype, **sizes
            )
        return self._engine

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, wanted: self._show(f"{what} {done:,} of {wanted:,} completions", done / wanted)


def positions_of(model_dir: Path) -> int | None:
    """Tokens of prompt and completion together that a model can hold; None where config.json does not say."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"]) if "max_position_embeddings" in config else None


def _table(answered: Answered, source: str) -> pa.Table:
    """Completions with their scores, in the columns of rollouts/*.parquet where the meaning is the same."""
    scored = [
        (prompt, row, verdict)
        for prompt, rows, verdicts in zip(answered.prompts, answered.rows, answered.verdicts, strict=True)
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return pa.table(
        {
            "source": pa.array([source] * len(scored)),
            "prompt_uid": [row.prompt_uid for _, row, _ in scored],
            "sample": pa.array([row.sample for _, row, _ in scored], pa.int32()),
            "prompt": [prompt.text for prompt, _, _ in scored],
            "answer": [prompt.answer for prompt, _, _ in scored],
            "text": [row.text for _, row, _ in scored],
            "token_ids": pa.array([row.token_ids for _, row, _ in scored], pa.list_(pa.int32())),
            "reward": [verdict.strict for _, _, verdict in scored],
            "lenient": [verdict.lenient for _, _, verdict in scored],
            "failure": [verdict.failure for _, _, verdict in scored],
            "finish": [row.finish for _, row, _ in scored],
        }
    )
