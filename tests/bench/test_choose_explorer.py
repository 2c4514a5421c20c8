"""The choice of an explorer: its arithmetic by enumeration, its rules, and the command on tiny models."""

import json
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import pytest

from bench.choose_explorer import main
from bench.explorer_choice import (
    Counts,
    Difference,
    crossover,
    difference,
    fail_share,
    mixed_gain,
    mixed_share,
    pass_difference,
    recommend,
    rescue_gain,
)
from trainer.pretrain import Recipe, Shape, make_family


def groups(own: list[int], others: list[int], quota: int, size: int) -> list[tuple[int, ...]]:
    """Every group of `quota` of the others and the rest of the own."""
    return [a + b for a, b in product(combinations(others, quota), combinations(own, size - quota))]


@pytest.mark.parametrize("quota", [0, 1, 2, 4])
def test_the_share_with_a_gradient_is_that_of_all_groups(quota: int) -> None:
    own, others = [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]
    every = groups(own, others, quota, 4)
    expected = np.mean([0 < sum(group) < 4 for group in every])
    assert mixed_share(Counts(6, [sum(own)], [sum(others)]), quota, 4) == pytest.approx(expected)


def test_an_explorer_that_is_right_where_the_learner_is_not_gives_gradients() -> None:
    better, alike = Counts(8, [0, 8], [4, 4]), Counts(8, [0, 8], [0, 8])
    gain = mixed_gain(better, 4)
    assert gain.mean == pytest.approx(np.mean([mixed_share(better, quota, 4) for quota in (1, 2, 3, 4)]))
    assert gain.low > 0
    assert mixed_gain(alike, 4) == Difference(0.0, 0.0)


def test_rescue_is_measured_against_more_samples_of_the_learner() -> None:
    own, others, size, quota = [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], 2, 2
    rescued = [sum(a) == 0 and sum(b) > 0 for a, b in product(combinations(own, size), combinations(others, quota))]
    more = [sum(order[:2]) == 0 and sum(order) > 0 for order in permutations(own, size + quota)]
    expected = np.mean(rescued) - np.mean(more)
    assert rescue_gain(Counts(6, [1], [2]), size, quota).mean == pytest.approx(expected)


def test_curves_cross_where_the_candidate_stays_ahead() -> None:
    # The learner is right always or never, the candidate sometimes everywhere.
    counts = Counts(8, [8, 8, 0, 0], [3, 3, 3, 3])
    assert pass_difference(counts, 1).mean == pytest.approx(3 / 8 - 1 / 2)
    assert pass_difference(counts, 8).mean == pytest.approx(1 / 2)
    assert crossover(counts, [1, 2, 4, 8]) == 2
    assert crossover(counts, [1, 2, 4, 8], surely=True) is None  # four prompts are few
    assert crossover(Counts(8, [8, 0] * 10, [3, 3] * 10), [1, 2, 4, 8], surely=True) == 4
    assert crossover(Counts(8, [8], [1]), [1, 2, 4]) is None
    assert fail_share(8, [8, 8, 0, 0], 4) == 0.5


def test_a_difference_has_its_interval() -> None:
    found = difference([0.0, 0.2])
    assert found == pytest.approx((0.1, 0.1))
    assert (found.low, found.high) == pytest.approx((0.1 - 0.196, 0.1 + 0.196))
    assert str(found) == "+10.0 ± 19.6 points"


def candidate(gain: tuple[float, float], rescue: tuple[float, float] = (0, 0), **others: float) -> dict[str, object]:
    row = {"seconds_per_completion": 1.0, "cost_ratio": 0.5, "ess": 0.5, **others}
    return row | {"mixed_gain": Difference(*gain), "rescue_gain": Difference(*rescue)}


def test_the_cheapest_of_those_that_are_not_surely_worse_is_taken() -> None:
    rows = {
        "large": candidate((0.20, 0.02), seconds_per_completion=3.0),
        "small": candidate((0.18, 0.02), seconds_per_completion=1.0),
        "tiny": candidate((0.05, 0.01), seconds_per_completion=0.5),
    }
    settings, reasons = recommend(rows, 16)
    assert settings == {"explorer.model": "small", "algorithm.mixing": "in_group", "algorithm.anneal_steps": 8}
    assert "+18.0 ± 3.9 points" in reasons[0]
    low_ess = {name: {**row, "ess": 0.1} for name, row in rows.items()}
    assert recommend(low_ess, 16)[0]["algorithm.anneal_steps"] == 5


def test_rescue_or_nothing_where_mixing_does_not_help() -> None:
    row = candidate((0.01, 0.02), (0.05, 0.01))
    settings, reasons = recommend({"small": row}, 16)
    assert (settings["explorer.model"], settings["algorithm.mixing"]) == ("small", "rescue")
    assert "+5.0" in reasons[1]
    settings, reasons = recommend({"small": candidate((-0.1, 0.02), (0.01, 0.01))}, 16)
    assert (settings["explorer.model"], settings["algorithm.anneal_steps"]) == ("", 0)
    assert reasons == ["small: groups with a gradient -10.0 ± 3.9 points, rescued prompts +1.0 ± 2.0 points: "
                       "not surely above 0"]  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    small = Shape(layers=1, hidden=16, heads=1, intermediate=16, init_std=0.3)
    recipe = Recipe(learner=small, explorer=small, learner_steps=1, explorer_steps=30, batch=8, threads=1)
    make_family(folder, 0, recipe, lambda text, fraction: None)
    return folder


def test_the_command_measures_and_records(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learner, explorer = str(family / "learner"), str(family / "explorer")
    options = ["--problems", "6", "--samples", "8", "--group-size", "4", "--results", str(tmp_path)]
    assert main([learner, explorer, learner, *options]) == 0
    printed = capsys.readouterr().out
    assert "recommended: explorer.model = ''" in printed  # neither has learnt anything
    rows = [json.loads(line) for line in (tmp_path / "choose_explorer.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == [learner, explorer, f"{learner} (again)"]
    control, other = rows[2], rows[1]
    assert control["ess"] == pytest.approx(1.0, abs=1e-4)
    assert control["kl_k1"] == pytest.approx(0.0, abs=1e-4)
    assert other["ess"] < 0.9
    assert other["kl_k3"] > 0.01
    assert other["kl_k1"] > 0.01
    assert {"commit", "device", "self_bleu", "pass@8", "pass@8_difference", "recommended"} <= other.keys()
    assert all(row["seconds_per_completion"] > 0 for row in rows)
    assert "mixed_gain" not in rows[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "8"], "--samples 8: groups of 8 and 4 more"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--prompts", "nowhere.parquet"], "nowhere.parquet"),
    ],
)
def test_bad_input_is_explained(
    family: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(family / "learner"), str(family / "explorer"), *arguments]) == 2
    assert message in capsys.readouterr().err
