"""Problem sets in the schemas they are published in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from trainer.benchmarks import BOXED, Problems, load_problems
from trainer.models import load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
OLYMPIAD = {
    "id": 1, "question": "Find $x$.", "solution": ["..."], "final_answer": ["$3$"], "context": None,
    "image_1": None, "modality": "Text-only", "difficulty": "Competition", "is_multiple_answer": False, "unit": None,
    "answer_type": "Numerical", "error": None, "question_type": "Open-ended", "subfield": "Algebra",
    "subject": "Math", "language": "English",
}  # fmt: skip
CHOICES = {"label": ["A", "B"], "text": ["bank", "library"]}
CHOICE = {"id": "1", "question": "Where?", "question_concept": "place", "choices": CHOICES, "answerKey": "B"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, learner_dir: Path) -> PreTrainedTokenizerBase:
    found = load_tokenizer(learner_dir)
    found.chat_template = TEMPLATE
    return found


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Problems]:
    def load_rows(name: str, rows: list[dict[str, Any]], file: str = "", mode: str = "think") -> Problems:
        write(tmp_path / (file or f"{name}.parquet"), rows)
        return load_problems(name, tokenizer, data=tmp_path, mode=mode, seed=0)

    return load_rows


@pytest.mark.parametrize(
    "row",
    [
        {"id": 60, "problem": "P", "solution": "S 34", "answer": "033", "url": "u", "year": "2024"},  # HuggingFaceH4
        {"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 33},  # Maxwell-Jia
        {"problem": "P", "answer": "33", "id": "0"},  # math-ai
        {"question": "P", "answer": "$33^\\circ$"},  # opencompass
    ],
)
def test_aime_in_its_schemas(load: Callable[..., Problems], row: dict[str, Any]) -> None:
    prompts, report = load("aime24", [row])
    assert [prompt.answer for prompt in prompts] == ["33"]
    assert prompts[0].text == f"<user>P\n{BOXED}<assistant>"
    assert "aime24: the published set has 30 problems, this one 1" in report


def test_a_prompt_in_verl_s_schema_brings_its_own_instruction_and_repeats(load: Callable[..., Problems]) -> None:
    row = {
        "data_source": "math_dapo", "prompt": [{"content": "P. End in Answer: $Answer", "role": "user"}],
        "ability": "MATH", "reward_model": {"ground_truth": "33", "style": "rule"}, "extra_info": {"index": "1"},
    }  # fmt: skip
    prompts, report = load("aime24", [row] * 32)
    assert [(prompt.text, prompt.answer) for prompt in prompts] == [
        ("<user>P. End in Answer: $Answer<assistant>", "33")
    ]
    assert "aime24: 31 rows left out: repeated" in report


def test_the_soft_switch_ends_the_question(load: Callable[..., Problems]) -> None:
    row = {
        "problem": "P",
        "solution": "S",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "u",
    }
    prompts, _ = load("math500", [row], "math500.jsonl", mode="nothink")
    assert prompts[0].text == f"<user>P\n{BOXED} /no_think<assistant>"
    assert prompts[0].answer == "\\frac{1}{2}"


def test_olympiadbench_has_lists_units_tolerances_and_context(load: Callable[..., Problems]) -> None:
    rows = [
        OLYMPIAD
        | {"final_answer": ["$1$", "$2$"], "is_multiple_answer": True, "question": "A", "context": "Let $n=1$."},
        OLYMPIAD | {"unit": "$\\mathrm{km}$", "error": "1e-1", "question": "B"},
        OLYMPIAD | {"question_type": "Theorem proving", "question": "C"},
        OLYMPIAD | {"modality": "Multimodal", "question": "D"},
        OLYMPIAD | {"language": "Chinese", "question": "E"},
    ]
    prompts, report = load("olympiadbench", rows)
    assert [prompt.answer for prompt in prompts] == ["1, 2", "3"]
    assert prompts[0].text == f"<user>Let $n=1$.\nA\n{BOXED}<assistant>"
    assert prompts[0].columns == {"golds": '["1","2"]', "tolerance": "", "unit": ""}
    assert prompts[1].columns == {"golds": '["3"]', "tolerance": "1e-1", "unit": "\\mathrm{km}"}
    for reason in ("question_type is Theorem proving", "modality is Multimodal", "language is Chinese"):
        assert f"olympiadbench: 1 rows left out: {reason}" in report


def test_choices_belong_to_the_question(load: Callable[..., Problems]) -> None:
    first_release = {
        "answerKey": "B", "id": "1",
        "question": {"stem": "When?", "question_concept": "time", "choices": [
            {"label": "A", "text": "now"}, {"label": "B", "text": "then"}]},
    }  # fmt: skip
    prompts, _ = load("commonsenseqa", [CHOICE])
    assert prompts[0].text.startswith("<user>Where?\nA. bank\nB. library\nPlease")
    prompts, _ = load("commonsenseqa", [first_release], "two/commonsenseqa.jsonl")
    assert prompts[0].answer == "B"


def test_of_a_downloaded_repository_the_right_files_are_read(
    load: Callable[..., Problems], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write(tmp_path / "commonsenseqa/data/test-0.parquet", [CHOICE | {"answerKey": ""}])
    write(tmp_path / "commonsenseqa/data/train-0.parquet", [CHOICE])
    prompts, report = load("commonsenseqa", [CHOICE | {"question": "Who?"}], "commonsenseqa/data/validation-0.parquet")
    assert len(prompts) == 1
    assert "validation-0.parquet" in report[0]
    write(tmp_path / "aime25/AIME2025-I/aime2025-I.jsonl", [{"question": "P", "answer": "1"}])
    prompts, _ = load("aime25", [{"question": "Q", "answer": "2"}], "aime25/AIME2025-II/aime2025-II.jsonl")
    assert [prompt.answer for prompt in prompts] == ["1", "2"]


def test_countdown_is_embedded_and_stands_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, report = load_problems("countdown", tokenizer, data=None, mode="nothink", seed=0)
    assert len(prompts) == 256
    assert prompts[0].text.endswith(":")
    assert report[0] == "countdown: 256 problems in 256 rows of embedded"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("aime24", [{"problem": "P", "answer": "1/2"}], "row 0 .* its answer '1/2' is not an integer"),
        ("aime24", [{"problem": "P", "solution": "33"}], "none of the columns answer, Answer"),
        ("math500", [{"problem": "", "answer": "1"}], "its question is empty"),
        ("math500", [{"problem": "P", "answer": ""}], "it has no answer"),
        ("math500", [{"problem": "P", "answer": "1"}, {"problem": "P", "answer": "2"}], "row 1 .* another answer: '2'"),
        ("olympiadbench", [OLYMPIAD | {"final_answer": ["$$"]}], "one of its final answers is empty"),
        ("olympiadbench", [OLYMPIAD | {"language": "Chinese"}], r"holds no problem \(1 rows\)"),
        ("commonsenseqa", [CHOICE | {"answerKey": ""}], "the test split has none; take the validation split"),
        ("commonsenseqa", [CHOICE | {"answerKey": "C"}], r"'C' is none of its choices \['A', 'B'\]"),
        ("commonsenseqa", [{"question": "Where?", "answerKey": "A"}], "no question with choices"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(
    load: Callable[..., Problems], name: str, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, rows)


def test_files_that_cannot_be_read_are_refused(
    load: Callable[..., Problems], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for data, message in (
        (None, "math500 is not embedded: give the directory of its files with --data DIR"),
        (tmp_path / "nowhere", "there is no such directory"),
        (tmp_path, "nothing is there"),
    ):
        with pytest.raises(ValueError, match=message):
            load_problems("math500", tokenizer, data=data, mode="think", seed=0)
    (tmp_path / "math500.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"math500.parquet is not a parquet file"):
        load_problems("math500", tokenizer, data=tmp_path, mode="think", seed=0)
    (tmp_path / "math500.jsonl").write_text("\n{}\n{")
    with pytest.raises(ValueError, match=r"both math500.parquet and math500.jsonl is there"):
        load_problems("math500", tokenizer, data=tmp_path, mode="think", seed=0)
    (tmp_path / "math500.parquet").unlink()
    with pytest.raises(ValueError, match=r"math500.jsonl line 3 is not JSON"):
        load_problems("math500", tokenizer, data=tmp_path, mode="think", seed=0)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path, learner_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"through its chat template, and .* has none"):
        load_problems("aime24", load_tokenizer(learner_dir), data=tmp_path, mode="think", seed=0)
