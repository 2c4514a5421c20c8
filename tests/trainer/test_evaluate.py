import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import Evaluation
from core.countdown import EOS_ID, WORDS, encode, parse_prompt, problems, solutions, verify
from core.datasets import question_uid
from core.schema import (
    Completion,
    CompletionKey,
    Sampling,
    ScoredCompletion,
    Source,
    check_completion,
    pack_logprobs,
    pack_tokens,
)
from rollout.engine import Request, Sampled
from rollout.prompting import load_prompts
from rollout.torch_engine import TorchEngine
from trainer.benchmarks import BENCHMARKS, answer_prompts, find_benchmark
from trainer.evaluate import Estimate, main, pass_at, summarise
from trainer.models import load_tokenizer
from trainer.pretrain import Recipe, Shape, make_family


def scored(
    slot: int, sample: int, reward: float, *, text: str = "a", length: int = 3, finish: str = "stop"
) -> ScoredCompletion:
    completion = Completion(
        key=CompletionKey(source=Source.LEARNER, step=0, slot=slot, sample=sample),
        prompt_uid=f"{slot}",
        token_bytes=pack_tokens([5] * length),
        logprob_bytes=pack_logprobs([-0.5] * length),
        finish=finish,
        version=0,
        worker="test",
        started_s=0.0,
        finished_s=1.0,
    )
    return ScoredCompletion(completion=completion, reward=reward, text=text)


def test_pass_at_one_is_the_mean_over_samples() -> None:
    estimate = pass_at([4, 4], [1, 3], 1)
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.5)
    assert estimate.stderr == pytest.approx(math.sqrt(2 * 0.25**2 / 1) / math.sqrt(2))


def test_pass_at_k_is_the_chance_that_a_subset_of_k_holds_a_correct_one() -> None:
    # n = 4, c = 1: of the 6 pairs 3 hold the correct one. n = 5, c = 2: of the 10 pairs 3 hold none.
    estimate = pass_at([4, 5], [1, 2], 2)
    assert estimate is not None
    assert estimate.mean == pytest.approx((3 / 6 + 7 / 10) / 2)
    assert pass_at([8], [0], 8) == Estimate(0.0, 0.0)
    assert pass_at([8], [1], 8) == Estimate(1.0, 0.0)


def test_problems_with_too_few_samples_are_left_out() -> None:
    assert pass_at([1, 4], [1, 0], 2) == Estimate(0.0, 0.0)
    assert pass_at([1, 1], [1, 0], 2) is None
    assert pass_at([], [], 1) is None


@pytest.mark.parametrize(("samples", "correct", "k"), [([4], [5], 1), ([4], [-1], 1), ([4], [1], 0), ([4, 4], [1], 1)])
def test_impossible_counts_are_refused(samples: list[int], correct: list[int], k: int) -> None:
    with pytest.raises(ValueError, match="0 <= correct <= samples"):
        pass_at(samples, correct, k)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        truth = rng.beta(1, 2, size=200)
        estimate = pass_at([8] * 200, rng.binomial(8, truth).tolist(), 1)
        assert estimate is not None
        low, high = estimate.interval
        covered += low <= 1 / 3 <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert Estimate(0.01, 0.1).interval == (0.0, pytest.approx(0.206))


def test_summary_by_hand() -> None:
    rows = [
        [scored(0, 0, 1.0, text="a", length=2), scored(0, 1, 0.0, text="b", length=4)],
        [scored(1, 0, 0.0, text="c", finish="length", length=6), scored(1, 1, 0.0, text="c", length=4)],
        [],
    ]
    assert summarise(rows, Evaluation(samples=2, k=(1, 2))) == {
        "eval/problems": 2.0,
        "eval/completions": 4.0,
        "eval/pass@1": 0.25,
        "eval/stderr/pass@1": pytest.approx(0.25),
        "eval/pass@2": 0.5,
        "eval/stderr/pass@2": pytest.approx(0.5),
        "eval/reward": 0.25,
        "eval/mean_length": 4.0,
        "eval/truncated_ratio": 0.25,
        "eval/unique_trace_ratio": 0.75,
    }


def test_summary_of_nothing_has_no_accuracy() -> None:
    assert summarise([[], []], Evaluation()) == {"eval/problems": 0.0, "eval/completions": 0.0}


def test_rewards_of_minus_one_and_one_count_as_wrong_and_right() -> None:
    summary = summarise([[scored(0, 0, -1.0), scored(0, 1, 1.0)]], Evaluation(samples=2, k=(1,)))
    assert summary["eval/pass@1"] == 0.5
    assert summary["eval/reward"] == 0.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner that has learnt nothing."""
    folder = tmp_path_factory.mktemp("family")
    small = Shape(layers=1, hidden=16, heads=1, intermediate=16, init_std=0.1)
    recipe = Recipe(learner=small, explorer=small, learner_steps=1, explorer_steps=1, batch=2, threads=1)
    make_family(folder, 0, recipe, lambda text, fraction: None)
    return folder / "learner"


class ScriptedEngine:
    """Answers prompt number i of a call correctly in its first i samples, and with one step in the others."""

    vocab_size = len(WORDS)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sampled]:
        for i, request in reversed(list(enumerate(requests))):
            problem = parse_prompt(" ".join(WORDS[index] for index in request.prompt_ids))
            right = encode(next(solutions(*problem)))
            for j in range(len(request.seeds)):
                ids = np.array([*(right if j < i else right[:5]), EOS_ID], dtype=np.int32)
                yield Sampled(i, j, ids, np.full(len(ids), -0.5, dtype=np.float32), "stop")


def run(model_dir: Path, tmp_path: Path, *options: str) -> dict[str, object]:
    out = tmp_path / "out.json"
    arguments = [str(model_dir), "--benchmarks", "countdown", "--out", str(out), *options]
    assert main(arguments) == 0
    return json.loads(out.read_text())


def test_the_command_counts_by_hand(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evaluate.TorchEngine", ScriptedEngine)
    report = run(model_dir, tmp_path, "--samples", "4", "--k", "1", "2", "4", "--problems", "4", "--seed", "5")
    found = report["benchmarks"]["countdown"]
    uids = [question_uid(problem.prompt) for problem in problems("eval", 5)[:4]]
    assert found["counts"] == {uid: [4, correct] for uid, correct in zip(uids, (0, 1, 2, 3))}
    assert found["pass@1"] == pytest.approx(6 / 16)
    assert found["pass@2"] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1) / 4)
    assert found["pass@4"] == pytest.approx(3 / 4)
    assert found["mean_length"] == pytest.approx((6 * 18 + 10 * 6) / 16)
    assert found["unique_trace_ratio"] == pytest.approx((1 + 2 + 2 + 2) / 16)
    printed = capsys.readouterr().out
    assert "data.eval: embedded:countdown, 256 problems" in printed
    assert "37.5 ±" in printed
    assert "75.0 ±" in printed


def test_a_real_engine_answers_each_prompt_in_order(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.benchmarks.ROWS_PER_BATCH", 6)  # two prompts a batch, and one in the last
    tokenizer = load_tokenizer(model_dir)
    prompts = load_prompts(BENCHMARKS["countdown"].config("countdown", 0, None), "eval", tokenizer)[0][:5]
    done: list[int] = []
    rows = answer_prompts(
        TorchEngine(model_dir),
        prompts,
        Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(EOS_ID,)),
        samples=3,
        seed=0,
        reward="countdown",
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        on_progress=done.append,
    )
    assert done == [2, 4, 5]
    for slot, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert [(one.completion.key.slot, one.completion.key.sample) for one in row] == [(slot, i) for i in range(3)]
        for one in row:
            assert one.completion.prompt_uid == prompt.uid
            assert one.reward == verify(prompt.text, one.text)[0]
            check_completion(one.completion, vocab_size=len(WORDS), max_tokens=24)
    assert len({one.text for row in rows for one in row}) == 15


def test_equal_seeds_give_equal_reports(model_dir: Path, tmp_path: Path) -> None:
    options = ("--samples", "2", "--k", "1", "--problems", "8")
    assert run(model_dir, tmp_path, *options) == run(model_dir, tmp_path, *options)
    assert run(model_dir, tmp_path, *options) != run(model_dir, tmp_path, *options, "--temperature", "0.1")


def test_problems_can_come_from_a_directory(model_dir: Path, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["8 5 9 7 = 15 :", "1 2 3 4 = 10 :"], "answer": ["15", "10"]})
    pq.write_table(table, tmp_path / "countdown.parquet")
    report = run(model_dir, tmp_path, "--data", str(tmp_path), "--samples", "2", "--k", "1")
    assert report["benchmarks"]["countdown"]["problems"] == 2
    assert report["settings"]["data"] == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "aime24"], "no benchmark 'aime24'; there are: countdown"),
        (["--benchmarks", "countdown", "--k", "9"], "--k 9: each k must be between 1 and --samples 8"),
        (["--benchmarks", "countdown", "--k", "0"], "--k 0: each k must be between 1 and --samples 8"),
        (
            ["--benchmarks", "countdown", "--temperature", "0"],
            "--temperature 0.0: sampling needs a temperature above 0",
        ),
        (["--benchmarks", "countdown", "--problems", "-1"], "--problems -1"),
        (["--benchmarks", "countdown", "--data", "nowhere"], "nowhere/countdown.parquet"),
        (["--benchmarks", "countdown", "--out", "nowhere/out.json"], "there is no directory"),
    ],
)
def test_bad_options_are_explained(
    model_dir: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model_dir), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere", "embedded:teacher"])
def test_a_model_that_is_not_there_is_an_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--benchmarks", "countdown"]) == 2
    assert model in capsys.readouterr().err


def test_the_embedded_models_are_made_on_demand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path
) -> None:
    asked: list[tuple[Path, int]] = []

    def family(root: Path, seed: int, **_: object) -> object:
        asked.append((root, seed))
        return type("Family", (), {"learner": model_dir, "explorer": model_dir})

    monkeypatch.setenv("S2LPO_CACHE", str(tmp_path))
    monkeypatch.setattr("trainer.evaluate.embedded_family", family)
    report = run(Path("embedded:explorer"), tmp_path, "--problems", "2", "--samples", "1", "--k", "1", "--seed", "3")
    assert asked == [(tmp_path, 3)]
    assert report["settings"]["model"] == "embedded:explorer"


def test_every_benchmark_loads_its_problems(model_dir: Path) -> None:
    for name in BENCHMARKS:
        config = find_benchmark(name).config(name, 0, None)
        prompts, _ = load_prompts(config, "eval", load_tokenizer(model_dir))
        assert len(prompts) == 256
        assert msgspec.to_builtins(config)["data"]["eval"] == "embedded:countdown"
