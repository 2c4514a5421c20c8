import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.advantages import group_advantages, source_baseline_advantages

REWARD = st.floats(-100, 100, allow_nan=False)


def by_hand(rewards, groups, scale="std", eps=1e-6):
    out = []
    for reward, group in zip(rewards, groups):
        mine = [r for r, g in zip(rewards, groups) if g == group]
        mean, std = (np.mean(mine), np.std(mine, ddof=1)) if len(mine) > 1 else (0.0, 1.0)
        out.append((reward - mean) / (std + eps) if scale == "std" else reward - mean)
    return np.array(out)


def test_golden_group_of_eight():
    advantages = group_advantages([1, 0, 0, 1, 0, 0, 0, 0], [0] * 8)
    # mean 1/4, sample std sqrt(12/7/8) = 0.4629100499
    np.testing.assert_allclose(advantages[0], 0.75 / (0.4629100498862757 + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(advantages[1], -0.25 / (0.4629100498862757 + 1e-6), rtol=1e-12)
    assert advantages.dtype == np.float64


def test_sample_std_not_population_std():
    np.testing.assert_allclose(group_advantages([0.0, 1.0], [5, 5], eps=0.0), [-(0.5**0.5), 0.5**0.5], rtol=1e-12)


def test_group_of_one_keeps_its_reward_as_in_verl():
    np.testing.assert_allclose(group_advantages([0.7, -2.0], [3, 9]), np.array([0.7, -2.0]) / (1 + 1e-6), rtol=1e-12)
    np.testing.assert_array_equal(group_advantages([0.7, -2.0], [3, 9], scale="none"), [0.7, -2.0])


def test_dr_grpo_only_centres():
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 3], [0, 0, 1, 1], scale="none"), [0.5, -0.5, -1.5, 1.5])


@pytest.mark.parametrize("value", [0.1, 1.0, -3.3, 1e17])
def test_equal_rewards_earn_exactly_nothing(value):
    assert (group_advantages([value] * 7, [0] * 7) == 0).all()
    assert (group_advantages([value] * 7, [0] * 7, eps=0.0) == 0).all()


def test_labels_may_be_unsorted_negative_and_sparse():
    groups, rewards = [10**12, -4, 10**12, 0, -4, 0, 0], [1, 2, 3, 4, 6, 6, 8]
    np.testing.assert_allclose(group_advantages(rewards, groups), by_hand(rewards, groups), rtol=1e-12)


def test_empty_in_empty_out():
    assert group_advantages([], []).shape == (0,)
    assert source_baseline_advantages([], [], np.zeros(0, bool)).shape == (0,)


@given(
    st.lists(st.tuples(REWARD, st.integers(-2, 3), st.booleans()), min_size=1, max_size=40),
    st.sampled_from(["std", "none"]),
)
def test_equals_the_definition_and_ignores_row_order(rows, scale):
    rewards, groups, _ = (np.array(column) for column in zip(*rows))
    advantages = group_advantages(rewards, groups, scale=scale)
    np.testing.assert_allclose(advantages, by_hand(rewards, groups, scale), rtol=1e-6, atol=1e-6)
    backwards = group_advantages(rewards[::-1], groups[::-1], scale=scale)[::-1]
    np.testing.assert_allclose(advantages, backwards, rtol=1e-6, atol=1e-6)


@given(st.lists(st.tuples(REWARD, st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_source_baseline_equals_the_definition(rows):
    rewards, groups, explorer = (np.array(column) for column in zip(*rows))
    whole, learners = by_hand(rewards, groups), ~explorer
    expected = whole.copy()
    for group in set(groups.tolist()):
        own = learners & (groups == group)
        if own.sum() > 1:
            expected[own] = by_hand(rewards[own], groups[own])
    advantages = source_baseline_advantages(rewards, groups, explorer)
    np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-6)


def test_explorer_rows_do_not_move_the_learner_rows_baseline():
    explorer = np.array([True, True, False, False])
    low = source_baseline_advantages([0, 0, 1, 0], [0] * 4, explorer)
    high = source_baseline_advantages([1, 1, 1, 0], [0] * 4, explorer)
    np.testing.assert_array_equal(low[2:], high[2:])
    np.testing.assert_array_equal(high[:2], group_advantages([1, 1, 1, 0], [0] * 4)[:2])


def test_lone_learner_row_takes_the_whole_groups_baseline():
    rewards, explorer = [0, 1, 1, 0], np.array([True, True, True, False])
    np.testing.assert_array_equal(
        source_baseline_advantages(rewards, [0] * 4, explorer), group_advantages(rewards, [0] * 4)
    )
    assert source_baseline_advantages([1.0], [0], np.array([False]), scale="none")[0] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_reward_that_is_not_finite_is_refused_with_its_row(bad):
    with pytest.raises(ValueError, match=r"reward 2 is .*(nan|inf)"):
        group_advantages([1.0, 0.0, bad, 1.0], [0, 0, 0, 0])


def test_shapes_labels_and_options_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        group_advantages([1, 2, 3], [0, 0])
    with pytest.raises(ValueError, match="1-D"):
        group_advantages([[1, 2]], [[0, 0]])
    with pytest.raises(ValueError, match="integer labels, got float64"):
        group_advantages([1, 2], [0.0, 0.5])
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages([1, 2], [0, 0], scale="var")
    with pytest.raises(ValueError, match="eps"):
        group_advantages([1, 2], [0, 0], eps=float("nan"))
    with pytest.raises(ValueError, match="is_explorer must be bool"):
        source_baseline_advantages([1, 2], [0, 0], [0, 1])
