"""Where on the schedule a step stands when a measurement moves it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.anneal import quota_at
from core.config import Algorithm, Config, Explorer
from core.configfile import parse_command
from core.confighelp import explain
from core.configkeys import ConfigError
from core.pace import POSITION, SIGNALS, Pace


def make(steps=10, anneal=6, driver="ess", lookahead=0, ahead=1, **settings):
    algorithm = Algorithm(
        steps=steps, anneal_steps=anneal, driver=driver, lookahead=lookahead, group_size=8, **settings
    )
    return Config(algorithm=algorithm, explorer=Explorer(ahead_steps=ahead))


def paced(config, values):
    pace = Pace(config)
    for step, value in enumerate(values, start=1):
        pace.observe(step, {SIGNALS[config.algorithm.driver]: value})
    return pace


def positions(config, values):
    pace = paced(config, values)
    return [pace.at(step) for step in range(1, config.algorithm.steps + 1)]


def test_by_the_clock_a_position_is_its_step_and_nothing_is_decided_or_written(tmp_path):
    pace = Pace(Config())
    assert [pace.at(step) for step in (1, 7, 80)] == [1, 7, 80]
    pace.observe(5, {})
    assert pace.metrics(5) == {}
    pace.save(tmp_path)
    pace.load(tmp_path, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1] * 10, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]),
        ([0.4] * 10, list(range(1, 11))),
        ([0.9] * 10, [1, 1, 1, 1, 1, 2, 3, 4, 5, 6]),  # held, then pushed: T_mix at T
        ([0.9, 0.9, 0.1, 0.4, None, 0.9, 0.9, 0.9, 0.9, 0.9], [1, 1, 1, 3, 4, 5, 5, 5, 5, 6]),
        ([0.25, 0.5] * 5, list(range(1, 11))),  # the bounds themselves are the clock's
    ],
)
def test_golden_positions(values, expected):
    assert positions(make(), values) == expected
    assert positions(make(driver="zero_variance"), values) == expected


def test_the_first_steps_follow_the_clock_and_later_ones_what_was_measured_a_horizon_before():
    config = make(steps=12, anneal=8, lookahead=1, ahead=2)
    assert positions(config, [0.9, 0.1, 0.9] + [0.4] * 9) == [1, 2, 3, 3, 5, 5, 6, 7, 8, 9, 10, 11]


def test_a_step_that_is_not_decided_is_refused():
    pace = paced(make(ahead=2), [0.4])
    assert pace.at(3) == 3
    with pytest.raises(ValueError, match=r"decided steps up to 3, not 4: .* when step 2 has trained"):
        pace.at(4)


@given(
    st.integers(2, 12), st.integers(0, 10), st.integers(0, 2), st.integers(1, 4),
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=30, max_size=30),
)  # fmt: skip
def test_every_path_falls_from_one_to_zero_within_the_run_by_0_1_or_2_positions_a_step(
    anneal, more, lookahead, ahead, values
):
    config = make(anneal + more, anneal, lookahead=lookahead, ahead=ahead)
    algorithm, found = config.algorithm, positions(config, values)
    quotas = [quota_at(position, algorithm).explorer for position in found]
    assert found[0] == 1
    assert all(after - before in (0, 1, 2) for before, after in pairwise(found))
    assert quotas[0] == 8
    assert quotas[-1] == 0
    assert all(before >= after for before, after in pairwise(quotas))


@given(st.integers(0, 11), st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_the_slowest_path_owes_at_least_what_any_path_owes(known, values):
    config = make(steps=12, anneal=7)
    bound, found = paced(config, values[:known]), positions(config, values)
    for step, position in enumerate(found, start=1):
        assert bound.slowest(step) <= position
        assert step > known + 1 or bound.slowest(step) == position


def test_a_checkpoint_keeps_what_is_decided_and_refuses_another_horizon(tmp_path):
    pace = paced(make(ahead=2), [0.9, 0.1, 0.9])
    pace.save(tmp_path)
    again = Pace(make(ahead=2))
    again.load(tmp_path, 3)
    assert [again.at(step) for step in range(1, 6)] == [pace.at(step) for step in range(1, 6)]
    again.observe(4, {"explorer/ess": 0.1})
    with pytest.raises(ValueError, match=r"decided 2 steps ahead .* 3 are asked for: keep explorer\.ahead_steps"):
        Pace(make(ahead=3)).load(tmp_path, 3)


def test_a_replay_takes_the_recorded_positions_whatever_it_measures():
    pace = Pace(make())
    pace.follow({2: 1, 3: 1})
    pace.observe(1, {"explorer/ess": 0.1})
    assert [pace.at(step) for step in (1, 2, 3, 4)] == [1, 1, 1, 4]
    assert pace.metrics(3) == {POSITION: 1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["algorithm.mixing=rescue"], "the same at every step"),
        (["algorithm.schedule=constant"], "not algorithm.schedule = \"constant\""),
        (["algorithm.schedule=abrupt"], "not algorithm.schedule = \"abrupt\""),
        (["algorithm.anneal_steps=1"], "use algorithm.anneal_steps=2 or more, not 1"),
        (["algorithm.anneal_steps=8"], "the first 8 steps .* follow the clock"),
        (["algorithm.driver_low=0.6"], "driver_low = 0.6 is above algorithm.driver_high = 0.5"),
        (["explorer.store=somewhere"], "not known before the run"),
        (["rollout.roles=handover"], "timetable is made before the run"),
        (["explorer.top_k=5", "correction.explorer.anchor=learner"], "normalise over other tokens"),
    ],
)  # fmt: skip
def test_what_a_driver_cannot_do_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        parse_command(["algorithm.driver=ess", *settings])


def test_a_wrong_driver_has_a_suggestion_and_the_plan_says_who_decides():
    with pytest.raises(ConfigError, match="did you mean zero_variance"):
        parse_command(["algorithm.driver=zero_varianc"])
    lines = "\n".join(explain(parse_command(["algorithm.driver=ess"]).config))
    assert "which α follows up to step 8; then explorer/ess of 8 steps before decides" in lines
    assert "decides" not in "\n".join(explain(Config()))
