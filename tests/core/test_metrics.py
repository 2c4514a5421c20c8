import json
import math

import numpy as np
import pytest

from core.metrics import RunLog, is_evaluation, read_metrics


def test_lines_are_on_disk_before_write_returns(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "reward": 0.5})
    assert read_metrics(tmp_path)[0]["reward"] == 0.5  # the file is still open
    log.write({"step": 2, "reward": np.float32(0.25), "S/rows": np.int64(7), "note": "warm-up", "ok": True})
    log.close()
    line = read_metrics(tmp_path)[1]
    assert line == {"step": 2, "reward": 0.25, "S/rows": 7, "note": "warm-up", "ok": True, "clock": line["clock"]}


def test_non_finite_values_are_null_and_every_line_is_standard_json(tmp_path):
    with RunLog(tmp_path) as log:
        returned = log.write(
            {"step": 1, "loss": math.nan, "kl": math.inf, "entropy": np.float64("-inf"), "reward": 1.0}
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (line["loss"], line["kl"], line["entropy"], line["reward"]) == (None, None, None, 1.0)
    assert returned == line


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, np.zeros(3), object()])
def test_a_value_that_is_no_number_is_named(tmp_path, value):
    with RunLog(tmp_path) as log, pytest.raises(TypeError, match="metric reward is a"):
        log.write({"step": 1, "reward": value})


@pytest.mark.parametrize("step", [1.0, -1, "1", None])
def test_a_line_needs_a_step(tmp_path, step):
    with RunLog(tmp_path) as log, pytest.raises(AssertionError):
        log.write({"step": step, "reward": 1.0})


def test_a_new_run_does_not_touch_an_old_file(tmp_path):
    RunLog(tmp_path).close()
    with pytest.raises(FileExistsError):
        RunLog(tmp_path)


def written(tmp_path, last):
    with RunLog(tmp_path) as log:
        log.write({"step": 0, "eval/pass@1": 0.3})
        for step in range(1, last + 1):
            log.write({"step": step, "reward": step / 10})
            if step % 2 == 0:
                log.write({"step": step, "eval/pass@1": step / 10})


def test_resume_cuts_what_happens_again_and_keeps_the_rest(tmp_path):
    written(tmp_path, last=5)
    with RunLog(tmp_path, resume_step=2) as log:
        assert log.evaluated_steps == {0, 2}
        log.write({"step": 3, "reward": 9.0})
    lines = read_metrics(tmp_path)
    assert [(line["step"], is_evaluation(line)) for line in lines] == [
        (0, True), (1, False), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert lines[-1]["reward"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_by_a_kill_is_left_out_and_resume_removes_it(tmp_path):
    written(tmp_path, last=3)
    path = tmp_path / "metrics.jsonl"
    whole = read_metrics(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"step": 4, "rew')
    assert read_metrics(tmp_path) == whole
    with RunLog(tmp_path, resume_step=3) as log:
        log.write({"step": 4, "reward": 0.4})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 2, 3, 4]


def test_resume_before_the_first_line(tmp_path):
    with RunLog(tmp_path, resume_step=0) as log:
        log.write({"step": 1, "reward": 1.0})
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"reward": 1}\n', '{"step": "1"}\n'])
def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + text + '{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_lines_of_later_steps_can_be_left_out(tmp_path):
    written(tmp_path, last=5)
    assert read_metrics(tmp_path, until=4) == read_metrics(tmp_path)[:-1]


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []
