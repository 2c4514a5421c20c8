from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.anneal import Quota, explorer_quota, explorer_share, quota_at
from core.config import Algorithm


def quotas(group_size, anneal_steps, steps):
    return [explorer_quota(i, group_size=group_size, anneal_steps=anneal_steps) for i in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("group_size", "anneal_steps", "expected"),
    [
        (8, 5, [8, 6, 4, 2, 0, 0, 0]),
        (16, 8, [16, 14, 12, 10, 7, 5, 3, 0, 0]),
        (8, 0, [0, 0, 0]),
        (8, 1, [8, 0, 0]),
        (8, 2, [8, 0, 0]),
        (14, 8, [14, 12, 10, 8, 6, 4, 2, 0]),  # the float form says 3 at step 7
        (7, 8, [7, 6, 5, 4, 3, 2, 1, 0]),  # the float form says 2 at step 7
    ],
)
def test_golden_tables(group_size, anneal_steps, expected):
    assert quotas(group_size, anneal_steps, len(expected)) == expected


@given(st.integers(1, 300), st.integers(2, 300), st.integers(1, 400))
def test_is_the_exact_rational_ceiling(group_size, anneal_steps, step):
    alpha = 1 - Fraction(step - 1, anneal_steps - 1) if step <= anneal_steps else Fraction(0)
    assert explorer_quota(step, group_size=group_size, anneal_steps=anneal_steps) == ceil(alpha * group_size)


@given(st.integers(1, 300), st.integers(0, 200))
def test_falls_from_the_whole_group_to_nothing(group_size, anneal_steps):
    table = quotas(group_size, anneal_steps, anneal_steps + 2)
    assert all(before >= after for before, after in pairwise(table))
    assert all(0 <= quota <= group_size for quota in table)
    assert table[0] == (group_size if anneal_steps else 0)
    assert table[-1] == 0
    if anneal_steps > 1:
        assert table[anneal_steps - 1] == 0


@pytest.mark.parametrize("step_size_anneal", [(0, 8, 5), (-1, 8, 5), (1, 0, 5), (1, 8, -1)])
def test_impossible_arguments_are_refused_with_their_values(step_size_anneal):
    step, size, anneal = step_size_anneal
    with pytest.raises(ValueError, match=f"step={step}, group_size={size}, anneal_steps={anneal}"):
        explorer_quota(step, group_size=size, anneal_steps=anneal)


def table(steps, **settings):
    algorithm = Algorithm(**settings)
    return [tuple(quota_at(step, algorithm)) for step in range(1, steps + 1)]


def test_in_group_linear_is_the_paper():
    assert table(9, group_size=16, anneal_steps=8) == [
        (16, 0), (14, 2), (12, 4), (10, 6), (7, 9), (5, 11), (3, 13), (0, 16), (0, 16),
    ]  # fmt: skip


def test_authors_code_has_a_surplus_row_on_fractional_shares():
    assert table(9, group_size=16, anneal_steps=8, mixing="authors_code") == [
        (16, 0), (14, 3), (12, 5), (10, 7), (7, 10), (5, 12), (3, 14), (0, 16), (0, 16),
    ]  # fmt: skip


def test_authors_code_has_no_surplus_on_whole_shares():
    assert table(6, group_size=8, anneal_steps=5, mixing="authors_code") == table(6, group_size=8, anneal_steps=5)
    assert table(3, group_size=8, anneal_steps=1, mixing="authors_code") == [(8, 0), (0, 8), (0, 8)]


@pytest.mark.parametrize("mixing", ["in_group", "authors_code"])
def test_abrupt_switches_after_the_last_annealed_step(mixing):
    assert table(5, group_size=8, anneal_steps=3, schedule="abrupt", mixing=mixing) == [(8, 0)] * 3 + [(0, 8)] * 2
    assert table(2, group_size=8, anneal_steps=0, schedule="abrupt", mixing=mixing) == [(0, 8)] * 2


@pytest.mark.parametrize(
    ("alpha", "group_size", "in_group", "authors_code"),
    [
        (1.0, 8, (8, 0), (8, 0)),
        (0.0, 8, (0, 8), (0, 8)),
        (0.5, 8, (4, 4), (4, 4)),
        (0.3, 8, (3, 5), (3, 6)),
        (0.7, 10, (7, 3), (7, 3)),
        (0.07, 100, (7, 93), (7, 93)),  # 0.07 * 100 is 7.000000000000001 in floats
        (0.29, 100, (29, 71), (29, 71)),  # 0.29 * 100 is 28.999999999999996 in floats
    ],
)
def test_constant_share_is_exact(alpha, group_size, in_group, authors_code):
    settings = {"schedule": "constant", "alpha": alpha, "group_size": group_size}
    assert table(2, **settings) == [in_group] * 2
    assert table(2, mixing="authors_code", **settings) == [authors_code] * 2


@given(st.integers(0, 1000), st.integers(1, 200))
def test_constant_shares_are_decimal_shares(thousandths, group_size):
    assert explorer_share(thousandths / 1000, group_size) == Fraction(thousandths * group_size, 1000)


@pytest.mark.parametrize("schedule", ["linear", "abrupt", "constant"])
def test_rescue_owes_the_whole_group_and_spares_at_every_step(schedule):
    settings = {"mixing": "rescue", "rescue_quota": 3, "group_size": 8, "anneal_steps": 2, "schedule": schedule}
    assert table(4, **settings) == [(3, 8)] * 4


@given(
    st.integers(1, 64), st.integers(0, 64), st.sampled_from(["linear", "abrupt", "constant"]),
    st.floats(0, 1), st.integers(1, 100),
)  # fmt: skip
def test_groups_are_exact_and_the_authors_groups_at_most_one_over(group_size, anneal_steps, schedule, alpha, step):
    settings = {"group_size": group_size, "anneal_steps": anneal_steps, "schedule": schedule, "alpha": alpha}
    quota = quota_at(step, Algorithm(**settings))
    authors = quota_at(step, Algorithm(mixing="authors_code", **settings))
    assert sum(quota) == group_size
    assert min(quota) >= 0
    assert authors.explorer == quota.explorer
    assert authors.learner - quota.learner in (0, 1)


@pytest.mark.parametrize("settings", [{"mixing": "rescue"}, {"schedule": "abrupt"}, {"schedule": "constant"}, {}])
def test_steps_count_from_one_under_every_schedule(settings):
    with pytest.raises(ValueError, match="step=0"):
        quota_at(0, Algorithm(**settings))
    assert isinstance(quota_at(1, Algorithm(**settings)), Quota)
