"""Questions from the embedded task or a data file: columns mapped, duplicates removed, bad rows refused."""

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from core.config import Data
from core.countdown import problems
from core.data_files import DataFile, open_data
from core.schema import Noun

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDED = "embedded:"
PROMPT_COLUMNS = ("prompt", "problem", "question", "Problem", "Question")
# A final answer before a worked solution: benchmarks such as MATH-500 have both. Dots lead into structs.
ANSWER_COLUMNS = (
    "answer",
    "Answer",
    "final_answer",
    "answerKey",
    "reward_model.ground_truth",
    "ground_truth",
    "solution",
    "Solution",
)
# The text of a list of messages, as JSON or as Python prints it.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


class _Message(msgspec.Struct):
    role: str
    content: str


class Question(Noun, frozen=True, kw_only=True):
    """A question of a data set, not yet rendered for a tokenizer.

    Example: Question(uid="9f0c61b27a53e844", text="What is 2+2?", answer="4", columns={"level": 1},
                      messages=({"role": "user", "content": "What is 2+2?"},))
    """

    uid: str  # question_uid(text)
    text: str  # the contents of the messages, for template = "plain"; no suffix yet
    messages: tuple[dict[str, str], ...]  # {"role": ..., "content": ...}, as chat templates take them
    answer: str
    # Every other column as text, number, truth value, None, list or dict; dates and the like as ISO 8601 text.
    columns: dict[str, Any] = msgspec.field(default_factory=dict)


class Loaded(NamedTuple):
    """A data set in its own order, and what to tell the user about it."""

    questions: tuple[Question, ...]
    report: tuple[str, ...]


def question_uid(text: str) -> str:
    """16 hex digits of BLAKE2b over a question's text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_questions(data: Data, which: Literal["train", "eval"], seed: int) -> Loaded:
    """The questions of `data.train` or `data.eval`, each once.

    Of a parquet or jsonl file, a prompt is text or a list of {role, content} (both published forms of DAPO-Math-17k),
    as such or as JSON text; an answer is text, of which what follows `####` counts, a number, or a list of texts. Rows
    that repeat a prompt are counted and left out. An empty `data.eval` has no questions. `seed` makes the embedded
    problems. Raises ValueError, naming the configuration key, for a file that is missing, empty or of another kind, for
    a column that is not there, and for a row without prompt or answer.
    """
    name = data.train if which == "train" else data.eval
    key = f"data.{which}"
    if which == "eval" and not name:
        return Loaded((), (f"{key}: none, no evaluation",))
    if name.startswith(EMBEDDED):
        return _embedded(key, name, which, seed)
    return _from_file(open_data(key, name), data)


def column_names(data: Data, which: Literal["train", "eval"]) -> list[str]:
    """Names of the columns that questions of `data.train` or `data.eval` have, as `load_questions` gives them.

    Reads the schema of a parquet file and the whole of a jsonl file. Raises ValueError as `load_questions` does for a
    file or a prompt column that is not there.

    Example: column_names(Data(train="dapo.parquet"), "train")  # ["data_source", "ability", "reward_model", …]
    """
    name = data.train if which == "train" else data.eval
    if not name or name.startswith(EMBEDDED):
        return []
    file = open_data(f"data.{which}", name)
    return _readable(file, beside=file.column("data.prompt_column", data.prompt_column, PROMPT_COLUMNS))


def _readable(file: DataFile, *, beside: str = "") -> list[str]:
    """Columns that reach a question, beside that of its prompt; a prompt inside a struct leaves the struct there."""
    return [field.name for field in file.schema if "binary" not in str(field.type) and field.name != beside]


def _embedded(key: str, name: str, which: Literal["train", "eval"], seed: int) -> Loaded:
    if name != "embedded:countdown":
        raise ValueError(f'{key} = "{name}": the only embedded data set is "embedded:countdown"')
    questions = tuple(
        _question((("user", problem.prompt),), str(problem.target), {}) for problem in problems(which, seed)
    )
    return Loaded(questions, (f"{key}: {name}, {len(questions):,} problems",))


def _question(turns: tuple[tuple[str, str], ...], answer: str, columns: dict[str, Any]) -> Question:
    text = _text(turns)
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Question(uid=question_uid(text), text=text, messages=messages, answer=answer, columns=columns)


def _text(turns: tuple[tuple[str, str], ...]) -> str:
    return "\n\n".join(content for _, content in turns)


def _from_file(file: DataFile, data: Data) -> Loaded:
    key, name = file.key, file.name
    prompt = file.column("data.prompt_column", data.prompt_column, PROMPT_COLUMNS)
    answer = file.column("data.answer_column", data.answer_column, ANSWER_COLUMNS)
    questions: list[Question] = []
    answers: dict[str, str] = {}
    duplicates = contradictions = row = 0
    for turns, gold, others, index in _rows(file, prompt, answer):
        text = _text(turns) if turns else ""
        if not text.strip() or not gold:
            raise ValueError(
                f"{key}: row {row} (counted from 0) of {name} has no {'answer' if text.strip() else 'prompt'} "
                f"in column {answer if text.strip() else prompt}; remove the row or choose another column"
            )
        uid = question_uid(text)
        if uid in answers:
            duplicates += 1
            contradictions += answers[uid] != gold
        else:
            answers[uid] = gold
            questions.append(_question(turns, gold, _values(others, index)))
        row += 1
    if not questions:
        raise ValueError(f"{key}: {name} holds no rows; give a file with at least one question")
    lines = [
        f"{key}: {name}, {row:,} rows, {len(questions):,} questions ({duplicates:,} duplicates removed)",
        f"{key}: prompt from column {prompt}, answer from column {answer}",
    ]
    if contradictions:
        lines.append(f"{key}: {contradictions:,} of the duplicates gave another answer; the first one counts")
    return Loaded(tuple(questions), tuple(lines))


def _rows(file: DataFile, prompt: str, answer: str) -> Iterator[tuple[Any, str, "pa.RecordBatch", int]]:
    """Of every row: its turns or None, its answer or "", and where its other columns are.

    The other columns are converted for rows that are kept only: 17 thousand of DAPO-Math-17k's 1.8 million.
    """
    names, kept = _readable(file), _readable(file, beside=prompt)
    for batch in file.batches(names):
        turns = _turns(_dig(batch, prompt), prompt, file)
        if "choices" in names:
            turns = _with_choices(turns, batch.column("choices").to_pylist())
        others = batch.select(kept)
        for index, (turn, gold) in enumerate(zip(turns, _golds(_dig(batch, answer), answer, file))):
            yield turn, gold, others, index


def _dig(batch: "pa.RecordBatch", path: str) -> "pa.Array":
    import pyarrow.compute as pc

    top, *inner = path.split(".")
    column = batch.column(top)
    return pc.struct_field(column, inner) if inner else column


def _turns(column: "pa.Array", path: str, file: DataFile) -> list[Any]:
    """Per row the (role, content) pairs of its prompt; None where it is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [None if text is None else _turns_of_text(text, path, file) for text in column.to_pylist()]
    element = column.type.value_type if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else None
    if (
        element is None
        or not pa.types.is_struct(element)
        or not {"role", "content"} <= {field.name for field in element}
    ):
        wanted = "a prompt is text or a list of {role, content}"
        raise file.unfit(path, column.type, wanted, "data.prompt_column")
    flat = column.flatten()
    roles, contents = (pc.struct_field(flat, [part]).to_pylist() for part in ("role", "content"))
    rows: list[Any] = []
    start = 0
    for length in column.value_lengths().to_pylist():
        end = start + (length or 0)
        rows.append(None if None in contents[start:end] else tuple(zip(roles[start:end], contents[start:end])))
        start = end
    return rows


def _turns_of_text(text: str, path: str, file: DataFile) -> tuple[tuple[str, str], ...]:
    """A text is one user turn, unless it is the JSON of a list of messages."""
    if not _MESSAGES.match(text):
        return (("user", text),)
    try:
        messages = msgspec.json.decode(text, type=list[_Message])
    except msgspec.DecodeError as error:
        raise ValueError(
            f'{file.key} = "{file.name}": column {path} holds text that begins as a list of messages and is not the '
            f"JSON of one ({error}): {text[:80]!r} …; write it as JSON, or as a list of {{role, content}}"
        ) from error
    return tuple((message.role, message.content) for message in messages)


def _with_choices(turns: list[Any], choices: list[Any]) -> list[Any]:
    """Multiple-choice questions (CommonsenseQA) cannot be answered without their choices {label: [], text: []}."""
    rows = []
    for turn, choice in zip(turns, choices):
        if turn and isinstance(choice, dict) and {"label", "text"} <= choice.keys():
            options = "".join(f"\n{label}. {text}" for label, text in zip(choice["label"], choice["text"]))
            turn = (*turn[:-1], (turn[-1][0], turn[-1][1] + options))
        rows.append(turn)
    return rows


def _golds(column: "pa.Array", path: str, file: DataFile) -> list[str]:
    """Answers as text; "" where missing. GSM8K's stands after `####`, OlympiadBench's is a list in dollar signs."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [
            ", ".join(str(part).strip("$ ") for part in value or () if part is not None) for value in column.to_pylist()
        ]
    if pa.types.is_nested(kind) or "binary" in str(kind):
        raise file.unfit(path, kind, "an answer is text, a number, or a list of texts", "data.answer_column")
    return [(text or "").rpartition("####")[2].strip() for text in column.cast(pa.string()).to_pylist()]


def _values(others: "pa.RecordBatch", index: int) -> dict[str, Any]:
    # Builtins only: columns travel to scoring processes and to other ranks as msgpack.
    return {name: msgspec.to_builtins(others.column(name)[index].as_py()) for name in others.schema.names}
