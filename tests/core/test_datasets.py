import datetime
import json

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import Data
from core.countdown import problems
from core.datasets import column_names, load_questions, question_uid
from core.rewards import RewardItem


def write(tmp_path, table, name="data.parquet", **options):
    path = tmp_path / name
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return str(path)


def load(path, **settings):
    return load_questions(Data(train=path, **settings), "train", 0)


def dapo(prompts, answers):
    """The schema of BytedTsinghua-SIA/DAPO-Math-17k."""
    return pa.table(
        {
            "data_source": ["math_dapo"] * len(prompts),
            "prompt": [[{"content": text, "role": "user"}] for text in prompts],
            "ability": ["MATH"] * len(prompts),
            "reward_model": [{"ground_truth": gold, "style": "rule-lighteval/MATH_v2"} for gold in answers],
            "extra_info": [{"index": f"id-{row}"} for row in range(len(prompts))],
        }
    )


def test_embedded_countdown():
    train, evaluation = (load_questions(Data(), which, 7) for which in ("train", "eval"))
    assert [q.text for q in train.questions] == [p.prompt for p in problems("train", 7)]
    assert [q.answer for q in evaluation.questions] == [str(p.target) for p in problems("eval", 7)]
    assert len({q.uid for q in train.questions + evaluation.questions}) == 1489 + 256
    assert train.report == ("data.train: embedded:countdown, 1,489 problems",)
    with pytest.raises(ValueError, match=r'data.train = "embedded:countdwn".*"embedded:countdown"'):
        load("embedded:countdwn")


def test_no_evaluation_set_has_no_questions():
    assert load_questions(Data(eval=""), "eval", 0).questions == ()


def test_the_names_of_columns_are_those_that_questions_have(tmp_path):
    file = write(tmp_path, dapo(["1 + 1?"], ["2"]).append_column("picture", pa.array([b"x"])))
    names = column_names(Data(train=file), "train")
    assert names == ["data_source", "ability", "reward_model", "extra_info"]
    assert names == list(load(file).questions[0].columns)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3", "level": 1}\n')
    assert column_names(Data(eval=str(lines)), "eval") == ["answer", "level"]
    assert column_names(Data(eval=""), "eval") == column_names(Data(), "train") == []
    with pytest.raises(ValueError, match=r'data.eval = "gone.parquet" does not exist'):
        column_names(Data(eval="gone.parquet"), "eval")


def test_dapo_as_published_with_its_duplicates(tmp_path):
    prompts = [
        f"Solve {row % 17}. Remember to put your answer on its own line after Answer:" for row in range(17 * 100)
    ]
    loaded = load(write(tmp_path, dapo(prompts, [str(row % 17) for row in range(17 * 100)])))
    assert [q.answer for q in loaded.questions] == [str(number) for number in range(17)]
    first = loaded.questions[0]
    assert first.text == prompts[0]
    assert first.uid == question_uid(prompts[0])
    assert first.messages == ({"role": "user", "content": prompts[0]},)
    assert first.columns["data_source"] == "math_dapo"
    assert first.columns["extra_info"] == {"index": "id-0"}
    assert first.columns["reward_model"]["ground_truth"] == "0"
    assert "prompt" not in first.columns
    assert "1,700 rows, 17 questions (1,683 duplicates removed)" in loaded.report[0]
    assert loaded.report[1].endswith("prompt from column prompt, answer from column reward_model.ground_truth")


def test_dapo_as_processed_by_open_r1(tmp_path):
    path = write(
        tmp_path,
        {
            "prompt": ["What is 1+1?", "What is 2+2?"],
            "solution": ["2", "4"],
            "data_source": ["math_dapo"] * 2,
            "source_prompt": [[{"content": "long", "role": "user"}]] * 2,
            "ability": ["MATH"] * 2,
            "reward_model": [{"ground_truth": gold, "style": "rule-lighteval/MATH_v2"} for gold in ("2", "4")],
            "extra_info": [{"index": "a"}, {"index": "b"}],
        },
    )
    loaded = load(path)
    assert [(q.text, q.answer) for q in loaded.questions] == [("What is 1+1?", "2"), ("What is 2+2?", "4")]
    assert loaded.questions[1].columns["solution"] == "4"
    assert loaded.questions[1].messages == ({"role": "user", "content": "What is 2+2?"},)


@pytest.mark.parametrize(
    ("columns", "text", "answer"),
    [
        ({"problem": "P", "solution": "long, \\boxed{3}", "answer": "3", "level": 5, "unique_id": "u"}, "P", "3"),
        ({"id": 60, "problem": "P", "solution": "S", "answer": "033", "url": "u", "year": "2024"}, "P", "033"),
        ({"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 204}, "P", "204"),
        ({"question": "Q", "answer": "70"}, "Q", "70"),
        ({"question": "Q", "answer": "9 - 4 = 5.\nHe has 5.\n#### 5"}, "Q", "5"),
        (
            {"id": 1, "question": "Q", "solution": ["s"], "final_answer": ["$2$", "$-5$"], "context": None,
             "is_multiple_answer": True},
            "Q",
            "2, -5",
        ),
        (
            {"id": "x", "question": "Where?", "question_concept": "c", "answerKey": "B",
             "choices": {"label": ["A", "B"], "text": ["bank", "library"]}},
            "Where?\nA. bank\nB. library",
            "B",
        ),
    ],
)  # fmt: skip
def test_benchmark_schemas_are_mapped(tmp_path, columns, text, answer):
    (question,) = load(write(tmp_path, {name: [value] for name, value in columns.items()})).questions
    assert (question.text, question.answer) == (text, answer)
    assert set(columns) - {"problem", "Problem", "question"} == set(question.columns)
    assert all(question.columns[name] == columns[name] for name in question.columns)


def test_system_turns_are_kept(tmp_path):
    turns = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]]
    (question,) = load(write(tmp_path, {"prompt": turns, "answer": ["2"]})).questions
    assert question.text == "Be brief.\n\n1+1?"
    assert [turn["role"] for turn in question.messages] == ["system", "user"]


def test_columns_by_name(tmp_path):
    path = write(tmp_path, {"prompt": ["no"], "q": ["yes"], "answer": ["no"], "meta": [{"gold": {"value": "7"}}]})
    (question,) = load(path, prompt_column="q", answer_column="meta.gold.value").questions
    assert (question.text, question.answer) == ("yes", "7")


def test_contradicting_duplicates_are_said(tmp_path):
    loaded = load(write(tmp_path, {"prompt": ["a", "b", "a", "a"], "answer": ["1", "2", "1", "3"]}))
    assert [q.answer for q in loaded.questions] == ["1", "2"]
    assert loaded.report[2] == "data.train: 1 of the duplicates gave another answer; the first one counts"


def test_rows_are_the_same_whatever_the_batches_and_string_types(tmp_path):
    prompts, answers = [f"p{row % 9000}" for row in range(20000)], [str(row % 9000) for row in range(20000)]
    plain = load(write(tmp_path, {"prompt": prompts, "answer": answers}, row_group_size=777))
    other = pa.table({"prompt": pa.array(prompts, pa.large_string()), "answer": pa.array(answers).dictionary_encode()})
    assert len(plain.questions) == 9000
    assert load(write(tmp_path, other, "other.parquet")).questions == plain.questions


def test_chat_rows_that_cross_batches_keep_their_own_turns(tmp_path):
    rng = np.random.default_rng(0)
    turns = [
        [{"role": "user", "content": f"{row}/{turn}"} for turn in range(rng.integers(1, 4))] for row in range(10000)
    ]
    loaded = load(write(tmp_path, {"prompt": turns, "answer": [str(row) for row in range(10000)]}))
    assert [list(q.messages) for q in loaded.questions] == turns


def test_image_columns_are_left_alone(tmp_path):
    (question,) = load(
        write(tmp_path, {"prompt": ["p"], "answer": ["1"], "image_1": [{"bytes": b"\xff", "path": ""}]})
    ).questions
    assert question.columns == {"answer": "1"}


@pytest.mark.parametrize("answer", [None, "", "  ", "#### "])
def test_row_without_answer_is_refused_with_its_number(tmp_path, answer):
    path = write(tmp_path, {"prompt": ["a", "b", "c"], "answer": ["1", "2", answer]})
    with pytest.raises(ValueError, match=r"data.train: row 2 \(counted from 0\) of .* has no answer in column answer"):
        load(path)


@pytest.mark.parametrize("bad", [None, [], [{"role": "user", "content": None}], [{"role": "user", "content": " "}]])
def test_row_without_prompt_is_refused_with_its_number(tmp_path, bad):
    good = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"row 1 .* has no prompt in column prompt"):
        load(write(tmp_path, {"prompt": [good, bad], "answer": ["1", "2"]}))


def test_answer_missing_inside_a_struct_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 .* has no answer in column reward_model.ground_truth"):
        load(write(tmp_path, dapo(["a", "b"], ["1", None])))
    with pytest.raises(ValueError, match=r"row 0 .* has no answer in column final_answer"):
        load(write(tmp_path, {"question": ["a"], "final_answer": [[None]], "other": ["3"]}))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r'data.train = ".*none.parquet" does not exist; give a parquet file'):
        load(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="is a folder"):
        load(str(tmp_path))
    text = tmp_path / "data.json"
    text.write_text('{"prompt": "a"}\n' * 10)
    with pytest.raises(ValueError, match=r'data.eval = ".*data.json" is not a parquet file .* is named .jsonl'):
        load_questions(Data(eval=str(text)), "eval", 0)


def lines(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_is_read_as_parquet_is(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{row}"}],
            "answer": f"#### {row}",
            "tags": [row],
            "when": "2026-01-31",
        }
        for row in range(9000)
    ]
    rows[8999]["level"] = 2.5  # a column of the last part of the file only
    from_lines = load(lines(tmp_path, *rows[:10], "\n", *rows[10:]))
    table = pa.Table.from_pylist([rows[-1], *rows[:-1]])  # its first row names the columns
    from_parquet = load(write(tmp_path, table)).questions
    assert from_lines.questions == (*from_parquet[1:], from_parquet[0])
    assert from_lines.questions[7].columns == {
        "answer": "#### 7", "tags": [7], "when": "2026-01-31", "level": None,
    }  # fmt: skip
    assert from_lines.questions[7].answer == "7"
    assert from_lines.questions[-1].columns["level"] == 2.5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{'prompt': 1}\n", "line 2 is no JSON object: JSON is malformed"),
        ("[1]\n", "line 2 is no JSON object: Expected `object`, got `array`"),
        ({"prompt": "b", "answer": [1]}, "values of column answer are not of one type"),
    ],
)
def test_jsonl_that_cannot_be_read_names_the_key_and_the_place(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f'data.train = ".*data.jsonl": .*{message}'):
        load(lines(tmp_path, {"prompt": "a", "answer": "1"}, bad))


def test_a_prompt_that_is_the_json_of_messages_is_read_as_those(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"content": "1+1?", "role": "user", "name": "x"}]
    texts = [json.dumps(turns), json.dumps(turns[:1], indent=1), "[1, 2] has how many parts?", '["role"]']
    questions = load(write(tmp_path, {"prompt": texts, "answer": ["2"] * 4})).questions
    assert questions[0].messages == tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    assert questions[0].text == "Be brief.\n\n1+1?"
    assert [question.text for question in questions[1:]] == ["Be brief.", *texts[2:]]
    with pytest.raises(
        ValueError, match=r"data.train = .*data.parquet.: column prompt holds text that begins as a list of messages"
    ):
        load(write(tmp_path, {"prompt": [str(turns)], "answer": ["2"]}))


def test_empty_data_set(tmp_path):
    schema = pa.schema([("prompt", pa.string()), ("answer", pa.string())])
    with pytest.raises(ValueError, match=r"data.train: .* holds no rows"):
        load(write(tmp_path, schema.empty_table()))


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path, {"query": ["a"], "answer": ["1"], "meta": [{"gold": "1"}]})
    with pytest.raises(
        ValueError, match=r"data.prompt_column: none of prompt, .*columns of .*: query, answer, meta, meta.gold"
    ):
        load(path)
    with pytest.raises(ValueError, match=r'data.prompt_column = "querry" is not there; did you mean "query"\?'):
        load(path, prompt_column="querry")
    with pytest.raises(ValueError, match=r'data.answer_column = "meta.glod".*did you mean "meta.gold"\?'):
        load(path, prompt_column="query", answer_column="meta.glod")


def test_columns_keep_their_values_over_the_wire(tmp_path):
    columns = {
        "prompt": ["p"], "answer": ["1"], "difficulty": [2], "weight": [0.5], "hard": [True], "tags": [["a", "b"]],
        "meta": [{"source": "x", "scores": [1, None]}], "nothing": pa.array([None], pa.string()),
    }  # fmt: skip
    day = pa.array([datetime.date(2026, 1, 31)])
    (question,) = load(write(tmp_path, pa.table({**columns, "day": day}))).questions
    expected = {
        "answer": "1", "difficulty": 2, "weight": 0.5, "hard": True, "tags": ["a", "b"],
        "meta": {"source": "x", "scores": [1, None]}, "nothing": None, "day": "2026-01-31",
    }  # fmt: skip
    assert question.columns == expected
    item = RewardItem(prompt="", completion="", answer="", columns=question.columns)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(item), type=RewardItem).columns == expected


def test_columns_of_other_types(tmp_path):
    path = write(tmp_path, {"prompt": [3], "answer": ["1"], "struct": [{"a": 1}]})
    with pytest.raises(
        ValueError,
        match=r"data.train = .*data.parquet.: column prompt has type int64: a prompt is .* with data.prompt_column",
    ):
        load(path)
    with pytest.raises(ValueError, match=r"column struct has type struct.* with data.answer_column"):
        load(path, prompt_column="answer", answer_column="struct")
