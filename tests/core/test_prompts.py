import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.prompts import PromptSchedule
from core.schema import Prompt


def prompts(count):
    return [Prompt(uid=f"{i:04}", token_ids=(i,), text=f"t{i}", answer="0") for i in range(count)]


def uids(schedule, steps):
    return [[prompt.uid for prompt in schedule.at(step)] for step in steps]


@st.composite
def sizes(draw):
    per_step = draw(st.integers(1, 12))
    return draw(st.integers(per_step, 40)), per_step


@settings(deadline=None)
@given(sizes(), st.integers(0, 2**64))
def test_every_epoch_holds_every_prompt_once_and_no_step_one_twice(size, seed):
    count, per_step = size
    steps = uids(PromptSchedule(prompts(count), seed=seed, per_step=per_step), range(1, 3 * count + 1))
    assert all(len(set(step)) == per_step for step in steps)
    walk = [uid for step in steps for uid in step]
    for start in range(0, len(walk) - count + 1, count):
        assert len(set(walk[start : start + count])) == count


@settings(deadline=None, max_examples=50)
@given(sizes(), st.randoms())
def test_a_step_does_not_depend_on_the_steps_asked_before(size, random):
    count, per_step = size
    forward = PromptSchedule(prompts(count), seed=5, per_step=per_step)
    expected = {step: forward.at(step) for step in range(1, 60)}
    asked = [random.randint(1, 59) for _ in range(40)]
    jumping = PromptSchedule(prompts(count), seed=5, per_step=per_step)
    assert [jumping.at(step) for step in asked] == [expected[step] for step in asked]
    assert PromptSchedule(prompts(count), seed=5, per_step=per_step).at(59) == expected[59]


def test_permutations_differ_by_seed_and_epoch():
    first, other = (PromptSchedule(prompts(64), seed=seed, per_step=32) for seed in (0, 1))
    walks = [uids(first, (1, 2)), uids(first, (3, 4)), uids(first, (5, 6)), uids(other, (1, 2))]
    epochs = [one + two for one, two in walks]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == [f"{i:04}" for i in range(64)] for epoch in epochs)


def test_prompts_that_the_tail_holds_come_right_after_the_head():
    schedule = PromptSchedule(prompts(100), seed=0, per_step=40)
    stream = np.random.SeedSequence([0, 1])
    raw = [f"{i:04}" for i in np.random.Generator(np.random.Philox(stream)).permutation(100)]
    tail = uids(schedule, [3])[0][:20]
    crossing, following = uids(schedule, [3, 4])
    waiting = [uid for uid in raw[:40] if uid in tail]
    fresh = [uid for uid in raw[:40] if uid not in tail]
    assert waiting, "this seed must make the case"
    assert crossing[20:] == fresh[:20]
    assert following == [*waiting, *fresh[20:], *raw[40:60]]


def test_one_step_can_be_the_whole_set():
    schedule = PromptSchedule(prompts(5), seed=0, per_step=5)
    assert all(sorted(step) == [f"{i:04}" for i in range(5)] for step in uids(schedule, range(1, 9)))


def test_a_far_step_of_an_awkward_size_is_reached_directly():
    schedule = PromptSchedule(prompts(97), seed=0, per_step=96)
    assert len({prompt.uid for prompt in schedule.at(10**6)}) == 96
    assert len(schedule._orders) <= 2


def test_golden_step_stays_what_it_was():
    # A changed order would silently change every run, and the steps of a resumed one.
    assert [int(uid) for uid in uids(PromptSchedule(prompts(20), seed=0, per_step=6), [4])[0]] == [18, 9, 15, 7, 13, 1]


def test_too_many_prompts_per_step_are_refused_with_the_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"prompts_per_step = 8 .* there are 5; lower it to at most 5 or give more"):
        PromptSchedule(prompts(5), seed=0, per_step=8)
    with pytest.raises(ValueError, match="prompts_per_step = 0"):
        PromptSchedule(prompts(5), seed=0, per_step=0)


def test_repeated_prompts_and_step_zero_are_refused():
    with pytest.raises(ValueError, match="1 of 4 prompts repeat"):
        PromptSchedule([*prompts(3), prompts(1)[0]], seed=0, per_step=2)
    with pytest.raises(ValueError, match="count from 1, got 0"):
        PromptSchedule(prompts(3), seed=0, per_step=2).at(0)
