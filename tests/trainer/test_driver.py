"""Whole runs whose α is moved by a measurement: exact quotas, kill -9 and --resume, --replay."""

import signal
from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, finish, start, train_here, training_lines
from test_resume import assert_the_same_run

from core.anneal import explorer_quota
from core.config import Config
from core.configkeys import ConfigError
from core.pace import POSITION
from trainer.replay import recorded_positions

# Thresholds that make these hardly trained models hold α, follow the clock and hurry within 7 steps.
DRIVERS = {
    "ess": {"algorithm__driver_low": 0.0, "algorithm__driver_high": 0.0},
    "zero_variance": {"algorithm__driver_low": 1.0, "algorithm__driver_high": 1.0},
}
SETTINGS = {"algorithm__steps": 7, "explorer__ahead_steps": 1, "data__eval": ""}


def settings(driver: str) -> dict[str, object]:
    return {**SETTINGS, **DRIVERS[driver], "algorithm__driver": driver}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def held(root: Path) -> Path:
    """α held by ESS for as long as the run allows, uninterrupted."""
    return train_here(arguments(root, root / "held", **settings("ess")))


def positions(run_dir: Path) -> list[int]:
    return [line[POSITION] for line in training_lines(run_dir)]


def assert_exact(run_dir: Path) -> None:
    for line in training_lines(run_dir):
        quota = explorer_quota(line[POSITION], group_size=4, anneal_steps=4)
        assert (line["mix/explorer_quota"], line["mix/learner_quota"]) == (quota, 4 - quota)
        assert run_parts.group_counts(run_dir, line["step"]) == {(quota, 4 - quota)}
    assert set(run_parts.trained_keys(run_dir).values()) == {1}
    ledger = run_parts.ledger(run_dir)
    assert ledger["conserved"]
    assert ledger["explorer"]["trained"] + ledger["learner"]["trained"] == 7 * 8 * 4


@pytest.mark.slow
def test_high_ess_holds_the_explorers_share_and_it_still_ends_at_zero(held: Path) -> None:
    assert positions(held) == [1, 1, 1, 1, 2, 3, 4]
    assert_exact(held)


@pytest.mark.slow
def test_few_dead_groups_end_the_annealing_sooner_with_rollouts_in_flight(root: Path) -> None:
    words = arguments(root, root / "hurried", algorithm__lookahead=1, **settings("zero_variance"))
    run_dir = train_here(words)
    assert [line["frac_reward_zero_std"] < 1 for line in training_lines(run_dir)] == [True] * 7
    assert positions(run_dir) == [1, 2, 4, 6, 8, 10, 12]
    assert_exact(run_dir)
    assert run_parts.ledger(run_dir)["explorer"]["trained"] == (4 + 3) * 8


@pytest.mark.slow
def test_a_driven_run_that_is_killed_has_the_bits_of_one_that_is_not(root: Path, held: Path) -> None:
    """kill -9 inside the second checkpoint: steps 3 and 4 happen again, at positions decided before and after it."""
    run_dir, log = root / "held-killed", root / "held-killed.log"
    words = arguments(root, run_dir, **settings("ess"))
    process = start(words, log=log, S2LPO_CRASH_AT="renamed")
    finish(process, log=log, code=-signal.SIGKILL)
    assert (run_dir / "checkpoints" / "step_2" / "trainer" / "anneal.json").exists()
    text = finish(start([*words, "--resume"], log=log), log=log)
    assert "continuing after step 2" in text
    assert_the_same_run(run_dir, held)


@pytest.mark.slow
def test_a_run_stopped_while_it_hurries_continues_where_it_was_and_not_by_another_horizon(root: Path) -> None:
    chosen = {**settings("zero_variance"), "algorithm__anneal_steps": 6, "algorithm__driver_high": 1.0}
    whole = train_here(arguments(root, root / "hurried-whole", **chosen))
    run_dir, log = root / "hurried-killed", root / "hurried-killed.log"
    words = arguments(root, run_dir, **chosen)
    finish(start(words, log=log, S2LPO_CRASH_AT="renamed"), log=log, code=-signal.SIGKILL)
    refused = finish(start([*words, "--resume", "explorer.ahead_steps=2"], log=log), log=log, code=2)
    assert "keep explorer.ahead_steps as it was" in refused
    finish(start([*words, "--resume"], log=log), log=log)
    assert positions(run_dir) == positions(whole) == [1, 3, 5, 7, 9, 11, 13]
    assert_the_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_replay_has_the_parameters_and_the_positions_of_the_run_even_where_it_measures_others(held: Path) -> None:
    replay = train_here(["--replay", str(held)])
    assert run_parts.weights_bytes(replay) == run_parts.weights_bytes(held)
    assert positions(replay) == positions(held)
    other = train_here(["--replay", str(held), f"run.dir={held}-other", "algorithm.driver_high=1"])
    assert run_parts.weights_bytes(other) == run_parts.weights_bytes(held)
    assert positions(other) == positions(held)
    assert_exact_quota_lines(other)


def assert_exact_quota_lines(run_dir: Path) -> None:
    for line in training_lines(run_dir):
        assert line["mix/explorer_quota"] == explorer_quota(line[POSITION], group_size=4, anneal_steps=4)


@pytest.mark.slow
def test_a_replay_without_the_record_of_positions_is_refused(held: Path, tmp_path: Path) -> None:
    from core.configfile import load_config

    config = load_config(None, ["algorithm.driver=ess", "algorithm.steps=7"], Config())
    assert recorded_positions(held, config) == {2: 1, 3: 1, 4: 1, 5: 2, 6: 3, 7: 4}
    with pytest.raises(ConfigError, match="lacks step 1"):
        recorded_positions(tmp_path, config)
