import contextlib
import io
import logging
import os
import pty
import sys
import threading
from pathlib import Path

import pytest

from core.config import Algorithm, Config
from trainer import console as console_module
from trainer.console import Console
from trainer.wording import duration_text, flat_text, summary

REPORT, MODEL = Path("runs/tiny/report.html"), Path("runs/tiny/model")


def step_line(step, **changes):
    line = {
        "step": step, "reward": 0.25, "mix/alpha": 0.75, "mix/explorer_quota": 6.0, "mix/learner_quota": 2.0,
        "loss": 0.001, "kl": 0.002, "entropy": 0.31, "tokens_per_second": 12345.6, "step_time": 0.5,
        "time/wait_for_batch": 0.1, "frac_reward_zero_std": 0.2, "groups/all_fail": 0.15, "groups/all_pass": 0.05,
        "num_tokens": 3000 * step,
    }  # fmt: skip
    return line | changes


def evaluation_line(step, accuracy):
    return {"step": step, "eval/pass@1": accuracy, "eval/pass@2": accuracy + 0.1, "eval/pass@8": accuracy + 0.2}


def plain(config=None, history=()):
    """A console without a terminal, and a function that takes what it printed so far, line by line."""
    stream = io.StringIO()
    console = Console(config or Config(), stream, history)

    def taken():
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text.splitlines()

    return console, taken


def test_a_step_is_one_line_with_everything_in_it():
    console, taken = plain()
    with console:
        console.step(step_line(1))
        taken()
        console.step(step_line(2))
    (line,) = taken()
    for part in (
        "step 2/80",
        "reward 0.250",
        "α 0.75 = 6+2",
        "kl 0.002",
        "entropy 0.310",
        "12,346 tok/s",
        "0.50 s",
        "ETA 39 s",
    ):
        assert part in line


def test_long_lines_do_not_wrap_and_markup_is_text():
    console, taken = plain()
    console.say("x" * 500 + " [bold]no markup[/bold]")
    assert taken() == ["x" * 500 + " [bold]no markup[/bold]"]


def test_a_long_run_does_not_flood():
    console, taken = plain(Config(algorithm=Algorithm(steps=10_000)))
    for step in range(1, 10_001):
        console.step(step_line(step))
    lines = [line for line in taken() if line.startswith("step")]
    assert len(lines) <= 202
    assert lines[0].startswith("step 1/")
    assert lines[-1].startswith("step 10000/10000")
    assert lines[-1].endswith("done")


def test_eta_leaves_out_the_first_step():
    console, taken = plain(Config(algorithm=Algorithm(steps=10, anneal_steps=5)))
    console.step(step_line(1, step_time=60.0))
    console.step(step_line(2, step_time=1.0))
    assert "ETA 8 s" in taken()[-1]


def test_the_first_small_loss_is_explained_once():
    console, taken = plain()
    for step in (1, 2, 3):
        console.step(step_line(step))
    assert sum("loss starts near 0" in line for line in taken()) == 1


def test_waits_are_said_after_a_while_and_then_at_each_doubling():
    console, taken = plain()
    for seconds in range(100):
        console.waiting(f"{seconds}/256 completions from explorer-0", float(seconds))
    assert [line.rpartition("(")[2] for line in taken()] == ["15 s)", "30 s)", "60 s)"]
    console.waiting("the next batch", 1.0)  # another wait begins
    console.waiting("the next batch", 20.0)
    assert taken() == ["waiting for the next batch (20 s)"]


def test_phases_print_their_quarters():
    console, taken = plain()
    console.phase("pre-training the embedded learner")
    for done in range(1, 401):
        console.progress("learner", done, 400, "loss 0.5")
    console.phase("starting 1 explorer")
    lines = taken()
    assert lines[0] == "pre-training the embedded learner"
    assert lines[-1] == "starting 1 explorer"
    assert lines[1:-1] == [f"learner: {done}/400  loss 0.5" for done in (100, 200, 300, 400)]


def test_evaluations_say_how_far_it_came():
    console, taken = plain()
    console.evaluation(evaluation_line(0, 0.331))
    console.evaluation(evaluation_line(20, 0.4))
    assert taken() == [
        "evaluation before training: pass@1 33.1 %, pass@8 53.1 %",
        "evaluation after step 20: pass@1 40.0 %, pass@8 60.0 %, +6.9 points since the start",
    ]


def test_a_resumed_run_counts_from_its_first_start():
    console, taken = plain(history=[evaluation_line(0, 0.3), step_line(1)])
    console.evaluation(evaluation_line(20, 0.4))
    assert "+10.0 points" in taken()[0]


def test_flat_rewards_are_a_warning_that_says_why_and_does_not_repeat_each_step():
    console, taken = plain()
    for step in range(1, 40):
        console.step(step_line(step, **{"frac_reward_zero_std": 1.0, "groups/all_fail": 1.0, "groups/all_pass": 0.0}))
    warnings = [line for line in taken() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "100% all fail" in warnings[0]
    assert "reward does not read the answers" in warnings[0]
    assert "for 10 steps now" in warnings[1]
    assert "too easy" in flat_text({"step": 1, "groups/all_fail": 0.0, "groups/all_pass": 1.0}, 1)


def test_faults_are_warned_of_when_they_grow():
    console, taken = plain()
    for step, dropped in ((1, 0), (2, 3), (3, 3), (4, 5)):
        parts = {"fault/dropped/reward_raised": dropped - dropped // 2, "fault/dropped/unknown_token": dropped // 2}
        console.step(step_line(step, **{"fault/dropped": dropped, **parts}))
    log = "; why rewards failed: logs/reward.log)"
    assert [line for line in taken() if line.startswith("warning")] == [
        f"warning: step 2: 3 completions dropped (2 reward_raised, 1 unknown_token{log}",
        f"warning: step 4: 2 completions dropped (1 reward_raised, 1 unknown_token{log}",
    ]


def test_faults_of_earlier_starts_are_not_warned_of_again():
    history = [step_line(1, **{"fault/dropped": 3, "fault/skipped_updates": 1}), evaluation_line(1, 0.4)]
    console, taken = plain(history=history)
    console.step(step_line(2, **{"fault/dropped": 3, "fault/rejected": None, "fault/skipped_updates": 2}))
    assert [line for line in taken() if line.startswith("warning")] == [
        "warning: step 2: 1 optimizer updates skipped for a non-finite gradient"
    ]


def test_a_loss_that_is_not_finite_is_shown_as_such():
    console, taken = plain()
    console.step(step_line(2, kl=None, reward=None))
    assert "kl not finite" in taken()[0]


def test_the_summary_says_from_what_to_what():
    lines = [evaluation_line(0, 0.331), *[step_line(step) for step in range(1, 81)], evaluation_line(80, 0.558)]
    text = "\n".join(summary(lines, Config(), 95.0))
    assert "accuracy 33.1 % → 55.8 % (pass@1, 256 problems x 8), pass@8 53.1 % → 75.8 %" in text
    assert "80 steps, 240,000 tokens trained, 1 min 35 s" in text
    console, taken = plain()
    console.finish(lines, report=REPORT, model=MODEL)
    assert taken()[-2:] == [f"report: {REPORT}", f"model:  {MODEL}"]


def test_the_summary_of_a_run_without_evaluation_or_training():
    assert summary([], Config(), 1.0) == []
    assert len(summary([step_line(1)], Config(), 1.0)) == 1
    assert "accuracy 30.0 % → 30.0 %" in summary([evaluation_line(0, 0.3)], Config(), 1.0)[0]


def graded_line(step, reward, accuracy):
    return evaluation_line(step, accuracy) | {"eval/reward": reward, "eval/graded_ratio": 0.9}


def test_graded_rewards_are_headed_by_their_mean():
    lines = [graded_line(0, 2.69, 0.55), graded_line(20, 2.31, 0.65)]
    console, taken = plain(history=lines[:1])
    console.evaluation(lines[1])
    assert taken() == [
        "evaluation after step 20: reward 2.310, -0.380 since the start; above 0.5: pass@1 65.0 %, pass@8 85.0 %"
    ]
    assert summary(lines, Config(), 1.0) == [
        "reward 2.690 → 2.310 (mean, 256 problems x 8); above 0.5: pass@1 55.0 % → 65.0 %, pass@8 75.0 % → 85.0 %"
    ]


def test_an_evaluation_whose_rewards_all_failed_is_said():
    failed = {"step": 20, "eval/problems": 2.0, "eval/completions": 16.0, "eval/failed_ratio": 1.0}
    console, taken = plain()
    console.evaluation(failed | {"step": 0})
    console.evaluation(evaluation_line(20, 0.4))
    assert taken() == [
        "evaluation before training: no completion got a reward",
        "evaluation after step 20: pass@1 40.0 %, pass@8 60.0 %",
    ]
    assert summary([failed], Config(), 1.0) == []


def test_rewards_that_failed_in_an_evaluation_are_said_beside_pass_at_k():
    line = evaluation_line(0, 0.4) | {"eval/failed_ratio": 0.25}
    console, taken = plain()
    console.evaluation(line)
    said = "; 25.0 % without a reward (it failed), counted as wrong"
    assert taken() == [f"evaluation before training: pass@1 40.0 %, pass@8 60.0 %{said}"]
    assert summary([line], Config(), 1.0)[0].endswith(said)
    graded = graded_line(0, 2.5, 0.5) | {"eval/failed_ratio": 0.25}
    assert summary([graded], Config(), 1.0)[0].endswith(said)


def test_the_smallest_k_stands_for_pass_at_one_where_that_is_not_measured():
    console, taken = plain()
    for step, value in ((0, 0.5), (20, 0.6)):
        console.evaluation({"step": step, "eval/pass@4": value})
    assert taken()[1] == "evaluation after step 20: pass@4 60.0 %, +10.0 points since the start"
    lines = [{"step": 0, "eval/pass@4": 0.5}, {"step": 20, "eval/pass@4": 0.6}]
    assert summary(lines, Config(), 1.0) == ["accuracy 50.0 % → 60.0 % (pass@4, 256 problems x 8)"]


def test_the_time_of_a_run_that_was_resumed_is_that_of_this_start():
    console, taken = plain(history=[step_line(1)])
    console.finish([step_line(1), step_line(2)], report=REPORT, model=MODEL)
    assert "2 steps, 6,000 tokens trained, 0 s in this start" in taken()


def test_what_deepspeed_says_of_every_run_is_not_shown(capsys):
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        Console(Config())
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().out == "something else\n"


def test_other_ranks_are_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console, taken = plain()
    with console:
        console.phase("starting")
        console.step(step_line(1, frac_reward_zero_std=1.0))
        console.waiting("x", 100.0)
        console.warn("x")
    assert taken() == []


def test_a_terminal_gets_a_live_line_and_gets_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    main, secondary = pty.openpty()
    chunks = []

    def read():
        with contextlib.suppress(OSError):  # Linux says EIO when the other side is closed
            while chunk := os.read(main, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(secondary, "w", encoding="utf-8") as stream, Console(Config(), stream) as console:
        console.step(step_line(1))
        console.waiting("7/256 completions", 3.0)
        console._live.refresh()
        console.evaluation(evaluation_line(20, 0.4))
    reader.join(timeout=60)
    os.close(main)
    shown = b"".join(chunks).decode()
    assert "step 1/80" in shown
    assert "waiting for 7/256 completions (3 s)" in shown
    assert "evaluation after step 20" in shown
    assert "\x1b[?25l" in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2]  # the cursor is hidden, and shown again at the end


def test_a_stream_that_is_not_utf8_does_not_end_the_run():
    raw = io.BytesIO()
    console = Console(Config(), io.TextIOWrapper(raw, encoding="ascii"))
    console.step(step_line(1))
    assert b"step 1/80" in raw.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def test_the_console_writes_to_standard_output_by_default(capsys):
    Console(Config()).say("hello")
    assert capsys.readouterr().out == "hello\n"
    assert console_module.sys.stdout is sys.stdout
