"""The fault table: quick rows hold, rows that do not hold are seen, and the command says so."""

import io
import json
from functools import partial
from pathlib import Path

import pytest

from bench import measure
from bench.faults import __main__ as faults
from bench.faults import lanes
from bench.faults.lanes import run_beside, serve
from bench.faults.rows import LEFT_OUT, NotHere, Row, Verdict

# The rest of the quick rows are the stream's own tests with other names (tests/rollout).
QUICK = ("F1", "F3", "F4", "F11", "F12", "F13", "F15", "F25", "F26c", "F26d", "F27", "F28", "F35")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measure, "record", partial(measure.record, folder=tmp_path))
    return tmp_path / "faults.jsonl"


@pytest.mark.slow
def test_quick_rows_hold_beside_each_other() -> None:
    """In processes of their own, as the command runs them."""
    rows = [row for row in faults.load() if row.name in QUICK]
    assert all(row.quick for row in rows)
    lines = run_beside(rows, 1, faults.say)
    assert [line["row"] for line in lines] == list(QUICK)
    failed = [f"{line['row']}: {line['what happened']}" for line in lines if not line["holds"]]
    assert not failed, "\n".join(failed)
    assert {(line["lost"], line["duplicated"]) for line in lines} == {(0, 0)}


def test_a_lane_whose_process_ends_fails_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.sys, "executable", "/bin/false")
    rows = [Row(name, name, True, holding) for name in ("F1", "F2", "F3", "F4")]
    said: list[str] = []
    lines = run_beside(rows, 0, lambda line: said.append(line["row"]))
    assert [line["row"] for line in lines] == sorted(said) == ["F1", "F2", "F3", "F4"]
    assert all(line["holds"] is False and "ended with 1" in line["what happened"] for line in lines)


def test_a_lane_answers_each_name_with_a_line() -> None:
    rows = [Row("F1", "x", True, holding), Row("F2", "y", True, wrong)]
    answers = io.StringIO()
    serve(rows, lambda row: faults.run(row, 7), io.StringIO("F2\nF1\n"), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [(line["row"], line["holds"]) for line in lines] == [("F2", False), ("F1", True)]
    assert "exit code 0, expected 1" in lines[0]["what happened"]


def test_every_fault_of_the_plan_has_a_row() -> None:
    names = {row.name for row in faults.load()} | set(LEFT_OUT)
    missing = [number for number in range(1, 38) if not any(name.rstrip("bcd") == f"F{number}" for name in names)]
    assert not missing
    assert len({row.name for row in faults.load()}) == len(faults.load())


def holding(seed: int) -> Verdict:
    return Verdict("tolerated", f"seed {seed}", 0.5)


def losing(seed: int) -> Verdict:
    return Verdict("tolerated", "one is gone", None, lost=1)


def wrong(seed: int) -> Verdict:
    raise AssertionError("exit code 0, expected 1")


def absent(seed: int) -> Verdict:
    raise NotHere("no such tool")


@pytest.mark.parametrize(
    ("checks", "code"),
    [([holding], 0), ([holding, absent], 0), ([holding, losing], 1), ([wrong, holding], 1)],
)
def test_the_exit_code_is_0_only_if_every_row_holds(
    checks: list, code: int, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(f"F{number}", check.__name__, True, check) for number, check in enumerate(checks, start=1)]
    monkeypatch.setattr(faults, "load", lambda: rows)
    assert faults.main(["--seed", "3"]) == code
    said = capsys.readouterr().out
    assert ("FAILED" in said) == (code == 1)
    assert "left out: F24b" in said
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["row"] for line in lines] == [row.name for row in rows]
    assert {line["seed"] for line in lines} == {3}


def test_rows_are_chosen_by_name_with_their_variants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(name, "x", name != "F5", holding) for name in ("F5", "F5b", "F50")]
    monkeypatch.setattr(faults, "load", lambda: rows)
    assert faults.main(["--only", "F5", "--markdown"]) == 0
    assert "| F5b | x | tolerated | 0.5 s | 0 | 0 |" in capsys.readouterr().out
    assert faults.main(["--quick", "--list"]) == 0
    assert "F50" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        faults.main(["--only", "F9"])
