"""Why rewards failed: said once by kind, every distinct reason in the log, both bounded."""

from pathlib import Path

from core.schema import CompletionKey, Source
from core.scoring_worker import Outcome
from rollout.rewarding import MAX_REASONS, FailureLog

KEY = CompletionKey(source=Source.LEARNER, step=3, slot=1, sample=2)
BOOM = Outcome(None, "raised", "KeyError: 'boom' (mine.py:12)")


def failure_log(tmp_path: Path) -> tuple[FailureLog, list[str]]:
    said: list[str] = []
    return FailureLog("mine:score", tmp_path / "logs" / "reward.log", say=said.append), said


def test_the_first_of_each_kind_is_said_and_each_distinct_reason_is_logged(tmp_path: Path) -> None:
    log, said = failure_log(tmp_path)
    assert log.summary() == ""
    for outcome in (BOOM, BOOM, Outcome(None, "raised", "KeyError: 'bang' (mine.py:13)"),
                    Outcome(None, "timeout", "no score within 10 s"), BOOM):  # fmt: skip
        log.note(("train", KEY), "9f0c", "so 2 + 2\nis 5", outcome)
    log.note(("eval", KEY), "77aa", "x" * 5000, Outcome(None, "crashed", "the scoring process ended with SIGKILL"))
    assert [line.split(", first in ")[0] for line in said] == [
        "warning: reward.function = \"mine:score\" raised KeyError: 'boom' (mine.py:12)",
        'warning: reward.function = "mine:score": no score within 10 s (reward.timeout_s)',
        'warning: reward.function = "mine:score": the scoring process ended with SIGKILL',
    ]
    assert "first in step 3, prompt 9f0c." in said[0]
    assert "first in the evaluation after step 3, prompt 77aa." in said[2]
    assert str(log.file) in said[0]
    lines = log.file.read_text().splitlines()
    assert len(lines) == 8  # four distinct reasons, each with its completion
    assert lines[0].startswith("step 3, prompt 9f0c, learner sample 2: reward.function")
    assert lines[0].endswith("raised KeyError: 'boom' (mine.py:12)")
    assert lines[1] == "    its completion: 'so 2 + 2\\nis 5'"
    assert lines[7] == f"    its completion: '{'x' * 200}' …"
    assert log.summary().startswith("reward.function = \"mine:score\" raised KeyError: 'boom' (mine.py:12) (3 of 6 ")


def test_reasons_that_always_differ_are_bounded(tmp_path: Path) -> None:
    log, said = failure_log(tmp_path)
    for number in range(3 * MAX_REASONS):
        log.note(("train", KEY), "9f0c", "text", Outcome(None, "raised", f"ValueError: cannot read {number}"))
    log.note(("train", KEY), "9f0c", "text", Outcome(None, "raised", "ValueError: cannot read 0"))
    assert len(said) == 1
    lines = log.file.read_text().splitlines()
    assert len(lines) == 2 * MAX_REASONS + 1
    assert lines[-1] == f"{MAX_REASONS} distinct reasons: later ones are not written down"
    assert f"cannot read 0 (2 of {3 * MAX_REASONS + 1} failures" in log.summary()
