"""Rows of the published benchmark files as questions: which column is which, and what each set does differently."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from core.datasets import Question, question_uid

Row = Mapping[str, Any]
# A worked solution is not among the answers: MATH-500 has both, and only one of them can be compared.
PROMPTS = ("prompt", "problem", "Problem", "question", "Question")
ANSWERS = ("answer", "Answer", "reward_model.ground_truth", "ground_truth")
_LETTERS = re.compile(r"[A-Z]")


class LeftOut(Exception):
    """A row that is no problem of this benchmark, such as one that asks for a proof; its text is the reason."""


def countdown_question(row: Row) -> Question:
    """The embedded task: `prompt` and `answer`."""
    return _question(row, "", _text(_first(row, ANSWERS)))


def integer_question(row: Row, instruction: str) -> Question:
    """AIME: answers are integers, as numbers or as text; some sources pad them (`033`) or add a degree sign."""
    gold = _text(_first(row, ANSWERS)).strip("$ ").removesuffix("^\\circ")
    if not re.fullmatch(r"\d+(\.0)?", gold):
        raise ValueError(f"its answer {gold!r} is not an integer")
    return _question(row, instruction, str(int(float(gold))))


def math_question(row: Row, instruction: str) -> Question:
    """MATH-500: the answer in LaTeX."""
    return _question(row, instruction, _text(_first(row, ANSWERS)))


def olympiad_question(row: Row, instruction: str) -> Question:
    """OlympiadBench: a list of final answers, a unit and a tolerance (`error`) for each or for all.

    Left out: proofs, questions with images, and those in Chinese. The context stands before the question.
    """
    for column, wanted in (("question_type", "Open-ended"), ("modality", "Text-only"), ("language", "English")):
        if row.get(column) not in (None, wanted):
            raise LeftOut(f"{column} is {row[column]}")
    found = _first(row, ("final_answer", *ANSWERS))
    golds = [str(one).strip().strip("$").strip() for one in (found if isinstance(found, list) else [found])]
    if not all(golds):
        raise ValueError("one of its final answers is empty")
    columns = {
        "golds": msgspec.json.encode(golds).decode(),
        "tolerance": _optional(row, "error"),
        "unit": _optional(row, "unit"),
    }
    return _question(row, instruction, ", ".join(golds), before=_optional(row, "context"), columns=columns)


def choice_question(row: Row, instruction: str) -> Question:
    """CommonsenseQA: choices {label: [], text: []}, or question {stem, choices: [{label, text}]} (first release)."""
    question: Any = row.get("question")
    choices: Any = row.get("choices")
    if isinstance(question, Mapping):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list):
        choices = {key: [one[key] for one in choices] for key in ("label", "text")}
    if not isinstance(question, str) or not isinstance(choices, Mapping) or not choices.get("label"):
        raise ValueError("it has no question with choices {label, text}")
    gold = _text(row.get("answerKey"))
    if not gold:
        raise ValueError("it has no answerKey: the test split has none; take the validation split")
    if gold not in choices["label"] or not _LETTERS.fullmatch(gold):
        raise ValueError(f"its answerKey {gold!r} is none of its choices {list(choices['label'])}")
    options = "".join(f"\n{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
    return _question({"question": question + options}, instruction, gold)


def _question(
    row: Row, instruction: str, answer: str, *, before: str = "", columns: dict[str, str] | None = None
) -> Question:
    """A prompt that is a list of messages brings its own instruction (verl's schema); a text gets ours."""
    found = _first(row, PROMPTS)
    if isinstance(found, list):
        messages = tuple({"role": str(one["role"]), "content": str(one["content"])} for one in found)
    else:
        parts = (before, str(found or "").strip(), instruction)
        messages = ({"role": "user", "content": "\n".join(part for part in parts if part)},)
    if not messages or not messages[-1]["content"].removesuffix(instruction).strip():
        raise ValueError("its question is empty")
    if not answer:
        raise ValueError("it has no answer")
    text = "\n\n".join(message["content"] for message in messages)
    return Question(uid=question_uid(text), text=text, messages=messages, answer=answer, columns=columns or {})


def _first(row: Row, names: tuple[str, ...]) -> Any:
    """The value of the first column that is there; dots lead into structs."""
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    raise ValueError(f"it has none of the columns {', '.join(names)}, only {', '.join(row)}")


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _optional(row: Row, column: str) -> str:
    return _text(row.get(column)).strip("$ ")


ToQuestion = Callable[[Row], Question]
