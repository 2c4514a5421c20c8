"""What a run says of its data before it begins."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import Config, Data, Reward, Rollout
from rollout.prompting import load_prompts


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def report(tmp_path: Path, prompts: list[str], answers: list[str], function: str) -> list[str]:
    pq.write_table(pa.table({"prompt": prompts, "answer": answers}), tmp_path / "d.parquet")
    data = Data(train=str(tmp_path / "d.parquet"), suffix=" Box it.")
    return load_prompts(
        Config(data=data, reward=Reward(function=function), rollout=Rollout(max_prompt_tokens=512)),
        "train",
        Characters(),
    )[1]


def test_the_first_prompt_its_gold_answer_and_the_lengths_are_said(tmp_path: Path) -> None:
    lines = report(tmp_path, ["1+1?\nTell.", "What is 2+2?"], ["2", "#### 4"], "mine:score")
    assert lines[-1] == ("data.train: prompts of 18 to 20 tokens; the first: '1+1?\\nTell. Box it.', gold answer '2'")
    long = report(tmp_path, ["a" * 200 + "b" * 200], ["2"], "mine:score")[-1]
    assert f"the first: '{'a' * 120} … {'b' * 112} Box it.'" in long


def test_gold_answers_are_looked_at_where_math_verify_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solutions = ["2 + 2 is 4.\nSo it is four.", "two\nlines"]
    with pytest.raises(ValueError, match=r"data.train: reward.function = .math. would find nothing right"):
        report(tmp_path, ["a", "b"], solutions, "math")
    assert report(tmp_path, ["a", "b"], ["x\n#### 1", "2"], "math")[-1] == (
        "data.train: 2 gold answers looked at: math-verify reads them all"
    )
    monkeypatch.setenv("RANK", "1")  # whose lines nobody sees
    assert "the first: 'a Box it.'" in report(tmp_path, ["a", "b"], solutions, "math")[-1]
