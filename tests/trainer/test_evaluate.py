"""Estimates by hand, and the command over scripted and real engines."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from core.config import Config, Evaluation
from core.configfile import write_resolved
from core.countdown import EOS_ID, WORDS, encode, parse_prompt, problems, solutions
from core.datasets import question_uid
from core.schema import (
    Completion,
    CompletionKey,
    Prompt,
    Sampling,
    ScoredCompletion,
    Source,
    pack_logprobs,
    pack_tokens,
)
from rollout.engine import Request, Sampled
from trainer.answering import Answered
from trainer.benchmarks import find_benchmark
from trainer.evaluate import Estimate, main, measure, pass_at, summarise
from trainer.generations import Generation
from trainer.penalty import PenalisedSampling
from trainer.pretrain import Recipe, Shape, make_family
from trainer.verdicts import judge

REPOSITORY = Path(__file__).resolve().parents[2]


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
    ]
    assert summarise(rows, Evaluation(samples=2, k=(1, 2))) == {
        "eval/problems": 2.0,
        "eval/completions": 4.0,
        "eval/failed_ratio": 0.0,
        "eval/pass@1": 0.25,
        "eval/stderr/pass@1": pytest.approx(0.25),
        "eval/pass@2": 0.5,
        "eval/stderr/pass@2": pytest.approx(0.5),
        "eval/reward": 0.25,
        "eval/graded_ratio": 0.0,
        "eval/mean_length": 4.0,
        "eval/truncated_ratio": 0.25,
        "eval/unique_trace_ratio": 0.75,
    }


def test_summary_of_nothing_has_no_accuracy() -> None:
    assert summarise([[], []], Evaluation()) == {
        "eval/problems": 2.0,
        "eval/completions": 16.0,
        "eval/failed_ratio": 1.0,
    }


def test_a_reward_that_failed_counts_as_wrong_and_every_k_is_of_the_same_problems() -> None:
    right = [scored(0, 0, 1.0), scored(0, 1, 1.0), scored(0, 2, 1.0), scored(0, 3, 1.0)]
    summary = summarise([right, [scored(1, 2, 1.0)], []], Evaluation(samples=4, k=(1, 2, 4)))
    assert [summary[f"eval/pass@{k}"] for k in (1, 2, 4)] == pytest.approx([(1 + 1 / 4) / 3, (1 + 1 / 2) / 3, 2 / 3])
    assert (summary["eval/problems"], summary["eval/completions"]) == (3, 12)
    assert summary["eval/failed_ratio"] == pytest.approx(7 / 12)
    assert summary["eval/reward"] == 1.0  # of those that have one


def test_rewards_of_minus_one_and_one_count_as_wrong_and_right() -> None:
    summary = summarise([[scored(0, 0, -1.0), scored(0, 1, 1.0)]], Evaluation(samples=2, k=(1,)))
    assert summary["eval/pass@1"] == 0.5
    assert summary["eval/reward"] == 0.0
    assert summary["eval/graded_ratio"] == 0.0


def test_rewards_between_and_beyond_right_and_wrong_are_graded() -> None:
    rewards = (0.0, 1.0, 0.5, 3.0)
    rows = [[scored(0, sample, reward) for sample, reward in enumerate(rewards)]]
    summary = summarise(rows, Evaluation(samples=4, k=(1,)))
    assert summary["eval/graded_ratio"] == 0.5
    assert summary["eval/pass@1"] == 0.5  # 1 and 3


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

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sampled]:
        for i, request in reversed(list(enumerate(requests))):
            problem = parse_prompt(" ".join(WORDS[index] for index in request.prompt_ids))
            right = encode(next(solutions(*problem)))
            for j in range(len(request.seeds)):
                ids = np.array([*(right if j < i else right[:5]), EOS_ID], dtype=np.int32)
                yield Sampled(i, j, ids, np.full(len(ids), -0.5, dtype=np.float32), "stop")

    def close(self) -> None:
        pass


def run(model: Path | str, out: Path, *options: str, benchmark: str = "countdown") -> dict[str, object]:
    assert main([str(model), "--benchmarks", benchmark, "--out", str(out), *options]) == 0
    return json.loads((out / "results.json").read_text())


def test_the_command_counts_by_hand(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.answering.evaluation_engine", lambda *_, **__: ScriptedEngine())
    report = run(model_dir, tmp_path, "--samples", "4", "--problems", "4", "--seed", "5")
    found = report["benchmarks"]["countdown"]
    uids = [question_uid(problem.prompt) for problem in problems("eval", 5)[:4]]
    assert {uid: counts[:2] for uid, counts in found["counts"].items()} == dict(zip(uids, ([4, c] for c in range(4))))
    assert found["pass@1"] == pytest.approx(6 / 16)
    assert found["pass@2"] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1) / 4)
    assert found["pass@4"] == pytest.approx(3 / 4)
    assert found["interval/pass@4"] == pytest.approx([0.75 - 1.96 * 0.25, 1.0])
    assert found["mean_length"] == pytest.approx((6 * 18 + 10 * 6) / 16)
    assert found["unique_trace_ratio"] == pytest.approx((1 + 2 + 2 + 2) / 16)
    printed = capsys.readouterr().out
    assert "countdown: 256 problems in 256 rows of embedded" in printed
    assert "37.5 ±" in printed
    assert "75.0 ±" in printed
    kept = pq.read_table(tmp_path / "countdown.parquet").to_pylist()
    assert [row["sample"] for row in kept] == [0, 1, 2, 3] * 4
    assert sum(row["reward"] for row in kept) == 6


# Answers to a problem whose gold answer is one half, and to one whose answer is 2.
SAID = {
    "half": [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{\dfrac12}", r"\boxed{2}"],
    "two": [r"\boxed{12}", r"\boxed{x+12}", r"\boxed{2.0}", "2"],
}
GOLD = {"half": r"\frac{1}{2}", "two": "2"}


class TalkingEngine:
    """Says SAID; notes what it was asked for."""

    def __init__(self, words: Sequence[str], asked: list[tuple[str, int, Sampling]]) -> None:
        self._words, self._asked = words, asked

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sampled]:
        for i, request in enumerate(requests):
            problem = next(self._words[token] for token in request.prompt_ids if self._words[token] in SAID)
            for j in range(len(request.seeds)):
                self._asked.append((problem, j, sampling))
                ids = np.array([self._words.index(SAID[problem][j].replace(" ", "")), 1], dtype=np.int32)
                yield Sampled(i, j, ids, np.zeros(2, dtype=np.float32), "stop")

    def close(self) -> None:
        pass


@pytest.fixture
def talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[str, int, Sampling]]]:
    """A model directory whose engine says SAID, MATH-500 of two problems beside it, and what it is asked for."""
    words = ["<pad>", "<eos>", *SAID, *(answer for answers in SAID.values() for answer in answers)]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}user {{ m.content }}{% endfor %} assistant"
    model = tmp_path / "model"
    fast.save_pretrained(model)
    (model / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, model / "model.safetensors")
    rows = [{"problem": name, "solution": "s", "answer": GOLD[name]} for name in SAID]
    (tmp_path / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[tuple[str, int, Sampling]] = []
    monkeypatch.setattr("trainer.answering.evaluation_engine", lambda *_, **__: TalkingEngine(words, asked))
    return model, asked


def test_strict_and_lenient_scores_stand_side_by_side(
    talking: tuple[Path, list[tuple[str, int, Sampling]]], tmp_path: Path
) -> None:
    model, asked = talking
    options = ("--data", str(tmp_path), "--samples", "4", "--score-timeout", "60")
    found = run(model, tmp_path / "out", *options, benchmark="math500")["benchmarks"]["math500"]
    rows = pq.read_table(tmp_path / "out" / "math500.parquet").to_pylist()
    kept = {(row["prompt"].split()[1], row["sample"]): row for row in rows}
    strict = {name: [kept[name, j]["reward"] for j in range(4)] for name in SAID}
    lenient = {name: [kept[name, j]["lenient"] for j in range(4)] for name in SAID}
    assert strict == {"half": [1, 1, 1, 0], "two": [0, 0, 1, 0]}
    # The authors' box ends at its first brace, and 0.5 is not the text of a fraction; 2 stands in x + 12.
    assert lenient == {"half": [0, 0, 0, 0], "two": [0, 1, 1, 1]}
    assert found["pass@1"] == pytest.approx(4 / 8)
    assert found["lenient"]["pass@1"] == pytest.approx(3 / 8)
    assert found["timeouts"] == 0
    sampling = asked[0][2]
    assert isinstance(sampling, PenalisedSampling)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.presence_penalty) == (0.7, 0.8, 20, 1.5)
    assert sampling.max_tokens == 32768
    assert kept["half", 0]["prompt"].endswith(r"\boxed{}. /no_think assistant")


def test_a_check_that_hangs_or_raises_is_wrong_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_checks.py").write_text(
        "import time\n"
        "def check(completions, answer, **_):\n"
        "    if completions[0] == 'hang': time.sleep(600)\n"
        "    return [float(completions[0] == answer[0]) / (completions[0] != 'raise')]\n"
    )
    monkeypatch.chdir(tmp_path)
    prompt = Prompt(uid="p", token_ids=(1,), text="?", answer="a")
    texts = ["a", "hang", "raise", "b"]
    rows = [[Generation("p", sample, text, [5], "stop") for sample, text in enumerate(texts)]]
    (verdicts,) = judge([prompt], rows, reward="odd_checks:check", workers=1, timeout_s=3.0)
    assert [verdict.strict for verdict in verdicts] == [1, 0, 0, 0]
    assert [verdict.failure for verdict in verdicts] == ["", "timeout", "raised", ""]
    found = measure(Answered(find_benchmark("math500"), [prompt], rows, [verdicts]), [1])
    assert found["timeouts"] == 1
    assert found["failures"] == {"timeout": 1, "raised": 1}
    assert "no score within 3 s" in str(found["first_failure"])
    assert found["pass@1"] == 0.25


def test_a_second_call_makes_what_is_missing_and_refuses_other_settings(
    talking: tuple[Path, list[tuple[str, int, Sampling]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked = talking
    options = ["--data", str(tmp_path), "--mode", "think"]
    run(model, tmp_path / "out", *options, "--samples", "1", benchmark="math500")
    assert [one[:2] for one in asked] == [("half", 0), ("two", 0)]
    asked.clear()
    run(model, tmp_path / "out", *options, "--samples", "2", benchmark="math500")
    assert [one[:2] for one in asked] == [("half", 0), ("two", 0)]  # sample 1 of each: the engine counts from 0
    asked.clear()
    run(model, tmp_path / "out", *options, "--samples", "2", benchmark="math500")
    assert not asked
    arguments = [str(model), "--benchmarks", "math500", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    for change, said in (
        (["--mode", "nothink"], "their prompts is"),
        (["--mode", "think", "--temperature", "1.0"], "their sampling is"),
        (["--mode", "think", "--seed", "1"], "their seed is 0, now it is 1"),
    ):
        assert main([*arguments, *change]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Use another --out" in error
    save_file({"w": torch.ones(1)}, model / "model.safetensors")
    assert main([*arguments, "--mode", "think"]) == 2
    assert "their model is" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import trainer.generations as generations
generations.FILE_ROWS = 2
add = generations.Generations.add
def add_and_die(kept, rows, counted=[]):
    add(kept, rows)
    counted.append(1)
    if len(counted) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
generations.Generations.add = add_and_die
from trainer.evaluate import main
main(sys.argv[1:])
"""


def test_a_killed_evaluation_continues(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--samples", "4", "--problems", "5"]
    arguments = [str(model_dir), "--benchmarks", "countdown", "--out", str(tmp_path / "killed"), *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, timeout=200, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    folder = tmp_path / "killed" / "countdown"
    before = {file: file.read_bytes() for file in folder.glob("*.parquet")}
    assert sum(pq.read_metadata(file).num_rows for file in before) == 6
    continued = run(model_dir, tmp_path / "killed", *options)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet")) == 20
    assert continued["benchmarks"] == run(model_dir, tmp_path / "whole", *options)["benchmarks"]


def test_a_broken_file_of_completions_is_named(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, tmp_path, "--samples", "1", "--problems", "2")
    next((tmp_path / "countdown").glob("*.parquet")).write_bytes(b"PAR1")
    assert main([str(model_dir), "--benchmarks", "countdown", "--samples", "1", "--out", str(tmp_path)]) == 2
    assert "delete it: it is made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "aime"], "no benchmark 'aime'; there are: aime24, aime25, math500"),
        (["--benchmarks", "aime24"], "no_template has none"),
        (["--benchmarks", "countdown", "--k", "17"], "--k 17: each k must be between 1 and --samples 16"),
        (["--benchmarks", "countdown", "--k", "0"], "--k 0: each k must be between 1 and --samples 16"),
        (["--benchmarks", "countdown", "--samples", "0"], "--samples 0 must be at least 1"),
        (["--benchmarks", "countdown", "--temperature", "0"], "--temperature 0.0: sampling needs a temperature above"),
        (["--benchmarks", "countdown", "--problems", "-1"], "--problems -1"),
        (["--benchmarks", "countdown", "--batch-rows", "0"], "--batch-rows 0 must be at least 1"),
        (["--benchmarks", "countdown", "--score-timeout", "0"], "--score-timeout 0.0 must be above 0"),
        (["--benchmarks", "countdown", "--data", "nowhere"], "--data nowhere: there is no such directory"),
        (["--benchmarks", "countdown", "--max-tokens", "4096"], "--max-tokens 4,096 and the longest prompt of count"),
        (["--benchmarks", "countdown", "--out", "pyproject.toml"], "--out pyproject.toml is a file"),
    ],
)
def test_bad_options_are_explained(
    model_dir: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path)]
    assert main([str(model_dir), *out, *options]) == 2
    assert message.replace("no_template", str(model_dir)) in capsys.readouterr().err


@pytest.fixture
def short_model(model_dir: Path, tmp_path: Path) -> Path:
    """A model with fewer positions than countdown's 24 new tokens and a prompt take."""
    short = shutil.copytree(model_dir, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    return short


def test_the_budget_is_what_fits_the_model(
    short_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(short_model, out, "--samples", "1", "--problems", "4")
    assert "countdown: at most 23 new tokens instead of 24: the model has 30 positions" in capsys.readouterr().out
    assert json.loads((out / "countdown" / "settings.json").read_text())["sampling"]["max_tokens"] == 23
    run(short_model, out, "--samples", "1", "--problems", "8")  # the same settings


def test_a_model_without_room_for_a_completion_is_refused(
    short_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((short_model / "config.json").read_text())
    (short_model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    assert main([str(short_model), "--benchmarks", "countdown", "--out", str(tmp_path / "out")]) == 2
    assert "longest prompt of countdown (7 tokens) exceed the model's 7 positions" in capsys.readouterr().err


def test_countdown_needs_no_data_beside_benchmarks_that_do(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    options = ["--data", str(tmp_path / "data"), "--samples", "1", "--problems", "2"]
    assert run(model_dir, tmp_path / "out", *options)["benchmarks"]["countdown"]["problems"] == 2


def test_a_run_directory_is_not_a_model_but_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path), "--benchmarks", "countdown"]
    write_resolved(Config(), tmp_path / "config.resolved.json")
    for made, said in ((None, "no model yet"), ("checkpoints/step_9", "step_9?"), ("checkpoints/step_20", "step_20?"),
                       ("model", "did you mean {}/model?")):  # fmt: skip
        if made:
            (tmp_path / made).mkdir(parents=True)
            (tmp_path / made / "config.json").write_text("{}")
        assert main(command) == 2
        assert said.format(tmp_path) in capsys.readouterr().err


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
    monkeypatch.chdir(tmp_path)
    assert (
        main(["embedded:explorer", "--benchmarks", "countdown", "--problems", "2", "--samples", "1", "--seed", "3"])
        == 0
    )
    assert asked == [(tmp_path, 3)]
    (file,) = Path("runs/evaluations").glob("learner-*/nothink/results.json")
    assert json.loads(file.read_text())["settings"]["model"] == "embedded:explorer"
