import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.countdown import (
    EOS_ID,
    PAD_ID,
    TARGETS,
    WORDS,
    Problem,
    encode,
    parse_prompt,
    pretraining_traces,
    problems,
    solutions,
    verify,
)

PROMPT = "8 5 9 7 = 15 :"
RIGHT = "9 - 5 = 4 , 8 - 4 = 4 , 4 + 7 = 11"


def test_vocabulary_is_fixed():
    assert len(WORDS) == len(set(WORDS)) == 59
    assert (WORDS[PAD_ID], WORDS[EOS_ID]) == ("<pad>", "<eos>")
    assert encode("0 49 + - * / = , :") == [2, 51, 52, 53, 54, 55, 56, 57, 58]
    assert encode(PROMPT) == [10, 7, 11, 9, 56, 17, 58]
    with pytest.raises(ValueError, match="'50' is not one of the 59 words"):
        encode("1 50")


def test_prompt_round_trip():
    problem = Problem(numbers=(8, 5, 9, 7), target=15)
    assert problem.prompt == PROMPT
    assert parse_prompt(PROMPT) == problem


@pytest.mark.parametrize(
    "text", ["", "8 5", "= 3 :", "8 = 8 :", "8 5 9 7 = 15", "8 5 x 7 = 15 :", "8 5 9 7 : 15 =", "8 60 = 9 :"]
)
def test_text_that_is_no_prompt_is_refused(text):
    with pytest.raises(ValueError, match="not a countdown prompt"):
        verify(text, RIGHT)


@pytest.mark.parametrize(
    ("response", "reward", "kind"),
    [
        ("8 + 7 = 15 , 9 - 5 = 4 , 15 - 4 = 11", 0, "target"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 7 + 8 = 15", 1, "ok"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15", 1, "ok"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15 <eos>", 1, "ok"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15 <eos> <eos>", 0, "format"),
        ("<eos>", 0, "format"),
        ("", 0, "format"),
        ("5 + 9 = 14 , 14 - 7 = 7", 0, "format"),  # a number unused
        ("8 + 7 = 15", 0, "format"),  # the target reached by two of the four
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15 ,", 0, "format"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15 , 15 - 0 = 15", 0, "format"),
        ("5 + 9 = 14 14 - 7 = 7 , 8 + 7 = 15 ,", 0, "format"),
        ("5 * 9 = 45 , 45 - 7 = 38 , 38 + 8 = 46", 0, "format"),
        ("05 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = 15", 0, "format"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 = -15", 0, "format"),
        ("5 + 9 = 14 , 14 - 7 = 7 , 8 + 7 : 15", 0, "format"),
        ("5 + 6 = 11 , 11 - 7 = 4 , 8 + 4 = 12", 0, "operand"),
        ("5 + 5 = 10 , 10 - 7 = 3 , 8 + 3 = 11", 0, "operand"),  # one 5 given, used twice
        ("5 + 9 = 14 , 14 - 7 = 7 , 14 + 8 = 22", 0, "operand"),  # a result used twice
        ("5 + 9 = 13 , 13 - 7 = 6 , 8 + 6 = 14", 0, "arith"),
        ("5 - 9 = 4 , 4 + 7 = 11 , 8 + 11 = 19", 0, "arith"),  # 5 − 9 is not 4
        ("5 + 9 = 13 , 13 - 13 = 0 , 8 + 6 = 15", 0, "arith"),  # the first mistake names it
    ],
)
def test_verify_names_what_is_wrong(response, reward, kind):
    assert verify(PROMPT, response) == (reward, kind)


def test_a_number_given_twice_may_be_used_twice():
    assert verify("5 5 = 10 :", "5 + 5 = 10") == (1, "ok")
    assert verify("5 5 = 0 :", "5 - 5 = 0") == (1, "ok")


def brute_force(numbers, target):
    """Every right response, found without looking at how `solutions` searches."""

    def expand(available):
        if len(available) == 1:
            if available[0] == target:
                yield ()
            return
        for i, j in itertools.permutations(range(len(available)), 2):
            rest = [value for k, value in enumerate(available) if k not in (i, j)]
            a, b = available[i], available[j]
            for operator, c in (("+", a + b), ("-", a - b)):
                if 0 <= c <= 49:
                    for further in expand([*rest, c]):
                        yield (f"{a} {operator} {b} = {c}", *further)

    return {" , ".join(steps) for steps in expand(list(numbers))}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 49), st.randoms())
def test_solutions_are_complete_distinct_right_and_independent_of_order(numbers, target, random):
    found = list(solutions(tuple(numbers), target))
    assert set(found) == brute_force(numbers, target)
    assert len(found) == len(set(found))
    prompt = Problem(tuple(numbers), target).prompt
    assert all(verify(prompt, response) == (1, "ok") for response in found)
    random.shuffle(numbers)
    assert list(solutions(tuple(numbers), target)) == found


def test_solutions_refuse_numbers_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"within 0 … 49, got \(3, 50\)"):
        solutions((3, 50), 47)
    assert list(solutions((1, 1), 40)) == []


@pytest.mark.parametrize("seed", [0, 1, 2**70])
def test_splits_are_disjoint_solvable_and_as_large_as_said(seed):
    splits = {split: problems(split, seed) for split in ("pretrain", "train", "eval")}
    assert {split: len(found) for split, found in splits.items()} == {"pretrain": 700, "train": 1489, "eval": 256}
    everything = [(tuple(sorted(p.numbers)), p.target) for found in splits.values() for p in found]
    assert len(set(everything)) == len(everything)
    assert all(next(solutions(*p), None) for found in splits.values() for p in found)
    assert all(p.target in TARGETS and len(p.numbers) == 4 for p in splits["train"])


def test_problems_are_functions_of_split_and_seed():
    assert problems("train", 3) == problems("train", 3)
    assert problems("train", 3) != problems("train", 4)
    shown = [p.numbers for p in problems("train", 3)]
    assert sum(list(numbers) != sorted(numbers) for numbers in shown) > len(shown) // 2
    with pytest.raises(ValueError, match='"pretrain", "train" or "eval", got \'test\''):
        problems("test", 0)


def test_pretraining_traces_are_three_fixed_right_ones():
    traces = pretraining_traces(0)
    assert [problem for problem, _ in traces] == problems("pretrain", 0)
    assert traces == pretraining_traces(0)
    for problem, responses in traces:
        assert len(set(responses)) == 3
        assert all(verify(problem.prompt, response) == (1, "ok") for response in responses)


def test_everything_fits_the_lengths_of_the_default_configuration():
    for problem, responses in pretraining_traces(0):
        assert len(encode(problem.prompt)) == 7
        assert all(len(encode(response)) == 17 for response in responses)
