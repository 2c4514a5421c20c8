import functools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, train_here

from core.configfile import load_config
from rollout.pool import WorkerPool
from trainer.alarm import COUNT, GAP, GapAlarm, gap_bounds, weight_metrics

CURRENT = f"{GAP}/current_max"


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ((), {f"{GAP}/current_max": 0.02, f"{GAP}/mean": 1.0}),
        (("learner.dtype=bfloat16",), {f"{GAP}/current_max": 2.0, f"{GAP}/mean": 1.0}),
        (("algorithm.lookahead=1",), {f"{GAP}/current_max": 0.02, f"{GAP}/mean": 1.0}),
        (("rollout.top_p=0.9", "correction.learner.weight=none"), {}),
        (("rollout.max_logprob_gap=0",), {}),
        (("rollout.max_logprob_gap=0.5", "algorithm.lookahead=1"), {f"{GAP}/max": 0.5}),
    ],
)
def test_the_bounds_follow_precision_and_what_differs_anyway(
    overrides: tuple[str, ...], bounds: dict[str, float]
) -> None:
    assert gap_bounds(load_config(None, overrides)) == bounds


def test_steps_beyond_the_bound_are_counted_and_said_at_powers_of_ten() -> None:
    alarm, texts = GapAlarm(load_config()), Counter[int]()
    assert alarm.check(1, {CURRENT: 0.01}) == {COUNT: 0.0}
    assert alarm.check(2, {"reward": 1.0}) == {COUNT: 0.0}  # no learner row in this step
    for step in range(3, 15):
        found = alarm.check(step, {CURRENT: math.nan if step == 3 else 0.5})
        texts[step] += bool(alarm.text)
    assert found == {COUNT: 12.0}
    assert [step for step, said in texts.items() if said] == [3, 12]
    assert alarm.check(15, {CURRENT: 0.0}) == {COUNT: 12.0}
    assert alarm.text == ""
    resumed = GapAlarm(load_config(), [{"step": 9, COUNT: 12.0}, {"step": 9, "eval/pass@1": 0.5}])
    assert resumed.check(10, {CURRENT: 1.0}) == {COUNT: 13.0}


def test_the_text_names_number_bound_key_and_what_to_look_at() -> None:
    alarm = GapAlarm(load_config())
    alarm.check(7, {CURRENT: 5.7})
    assert all(
        part in alarm.text for part in ("step 7", CURRENT, "5.7", "0.02", "rollout.max_logprob_gap", "weights/held_min")
    )


def test_versions_of_the_workers() -> None:
    assert weight_metrics({"learner-0": 3, "learner-1": 2}) == {"weights/held_min": 2, "weights/held_max": 3}
    assert weight_metrics({}) == {}


def test_older_weights_may_differ_and_by_no_more_than_e_in_the_mean() -> None:
    alarm = GapAlarm(load_config(None, ["algorithm.lookahead=2"]))
    assert alarm.check(1, {f"{GAP}/max": 7.0, f"{GAP}/mean": 0.3}) == {COUNT: 0.0}
    assert alarm.check(2, {f"{GAP}/max": 7.0, f"{GAP}/mean": 1.3}) == {COUNT: 1.0}
    assert f"{GAP}/mean" in alarm.text


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_worker_that_keeps_old_weights_raises_the_alarm(
    lookahead: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(
        tmp_path, tmp_path / "run", algorithm__steps=3 + 5 * lookahead, algorithm__lookahead=lookahead,
        algorithm__anneal_steps=0, data__eval="", learner__learning_rate=3e-2,
    )  # fmt: skip
    with_it = functools.partial(WorkerPool, worker_arguments=("--engine", "stale_engine:forgetful"))
    monkeypatch.setattr("trainer.stream.WorkerPool", with_it)
    run_dir = train_here(words)
    counts = [line[COUNT] for line in run_parts.training_lines(run_dir)]
    assert counts[0] == 0  # the first step samples from the weights that both began with
    assert counts[-1] >= 1
    assert "rollout.max_logprob_gap" in capfd.readouterr().out
    newest = run_parts.training_lines(run_dir)[-1]["weights/held_max"]
    assert 0 <= newest <= 3 + 5 * lookahead
    trace = json.loads((run_dir / "trace.json").read_text())
    assert any(event["name"] == "weights" and "of learner-0" in event["args"] for event in trace if event["ph"] == "C")
