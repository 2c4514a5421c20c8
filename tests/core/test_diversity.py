from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.diversity import (
    Sample,
    edit_diversity,
    group_diversity,
    pass_at_k,
    self_bleu,
    spread,
    unique_answer_ratio,
    without_answers,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(1, 0, 1, 0.0), (1, 1, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 1, 4, 1.0), (8, 0, 8, 0.0),
     (128, 3, 64, 1 - 64 * 63 * 62 / (128 * 127 * 126))],
)  # fmt: skip
def test_golden_pass_at_k(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_exact_for_large_n_too(case):
    n, c, k = case
    assert pass_at_k(n, c, k) == float(1 - Fraction(comb(n - c, k), comb(n, k)))
    assert 0 <= pass_at_k(n, c, k) <= 1
    assert k == n or pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1)


def test_pass_at_one_is_the_mean():
    assert pass_at_k(np.int64(16), np.int32(5), 1) == 5 / 16


@pytest.mark.parametrize("case", [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(case):
    n, c, k = case
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)
    with pytest.raises(TypeError):
        pass_at_k(4.0, 2, 1)


def test_self_bleu_of_equal_and_unrelated_texts():
    text = "the cat sat on the mat today"
    assert self_bleu([text] * 3) == pytest.approx(1.0)
    assert self_bleu([text] * 3) <= 1.0
    assert self_bleu(["a b", "a b"]) == pytest.approx(1.0)
    assert self_bleu(["one two three four five", "six seven eight nine ten"]) < 0.1


def test_self_bleu_by_hand():
    # Text 0 against text 1: 4 of 5 words, 3 of 4, 2 of 3, 1 of 2 n-grams; equal lengths, so no brevity penalty.
    by_hand = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(by_hand)


def test_self_bleu_takes_all_the_others_as_references():
    assert self_bleu(["a b c d e", "a b c d e", "v w x y z"]) == pytest.approx(2 / 3, abs=0.05)


def test_edit_diversity_by_hand():
    assert edit_diversity(["kitten", "sitting"]) == pytest.approx(3 / 7)
    assert edit_diversity([[1, 2, 3], [1, 2, 4], [1, 2, 3]]) == pytest.approx((1 / 3 + 0 + 1 / 3) / 3)
    assert edit_diversity([(1, 2), (3, 4, 5)]) == 1.0
    assert edit_diversity(["", ""]) == 0.0
    assert edit_diversity(["", "abc"]) == 1.0


def test_edit_diversity_of_arrays_is_that_of_lists():
    rows = [[5, 6, 7, 8], [5, 7, 8], [9, 9]]
    assert edit_diversity([np.array(row, dtype=np.int32) for row in rows]) == edit_diversity(rows)


@given(st.lists(st.lists(st.integers(0, 300), max_size=8), min_size=2, max_size=5), st.randoms())
def test_edit_diversity_is_bounded_and_ignores_order(sequences, random):
    value = edit_diversity(sequences)
    random.shuffle(sequences)
    assert 0 <= value <= 1
    assert edit_diversity(sequences) == pytest.approx(value)
    assert (value == 0) == (len(set(map(tuple, sequences))) == 1)


def test_unique_answer_ratio():
    assert unique_answer_ratio(["12", "12", "13", None]) == 0.75
    assert unique_answer_ratio([None]) == 1.0


def test_too_few_are_refused():
    for measure, values in [(self_bleu, ["one"]), (edit_diversity, [[1]]), (self_bleu, []), (unique_answer_ratio, [])]:
        with pytest.raises(ValueError, match=f"{measure.__name__} needs at least"):
            measure(values)
    with pytest.raises(ValueError, match="in a list, got 'a text'"):
        self_bleu("a text")


def samples(*texts):
    return [Sample(text, text.split()) for text in texts]


def test_diversity_of_groups_is_the_mean_of_each():
    first, second = samples("a b c", "a b d", "x"), samples("a b c d e", "a b c d f")
    found = group_diversity([first, second, samples("alone")], rows=2, whole_texts=True)
    assert found == {
        "edit_diversity": pytest.approx((1 / 3 + 1 / 5) / 2),
        "unique_answer_ratio": 1.0,
        "self_bleu": pytest.approx((self_bleu(["a b c", "a b d"]) + self_bleu(["a b c d e", "a b c d f"])) / 2),
    }


def test_answers_are_compared_rather_than_texts():
    groups = [samples(r"so \boxed{2}", "Answer: 2", "none", "cut short")]
    assert group_diversity(groups, rows=4)["unique_answer_ratio"] == 0.5
    assert group_diversity(groups, rows=4, whole_texts=True)["unique_answer_ratio"] == 1.0


def test_groups_beyond_the_limit_are_left_out_evenly():
    same, other = samples("a b", "a b"), samples("a b", "c d")
    groups = [same, other, same, other, same, other]
    assert spread(list(range(6)), 3) == [0, 2, 4]
    assert spread(list(range(6)), 4) == [0, 1, 3, 4]
    assert spread([1, 2], 4) == [1, 2]
    found = group_diversity(groups, rows=2, limit=3, self_bleu_limit=None)
    assert found == {"edit_diversity": 0.0, "unique_answer_ratio": 0.5}
    found = group_diversity(groups, rows=2, self_bleu_limit=3, whole_texts=True)
    assert (found["edit_diversity"], found["self_bleu"]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_too_few_completions_have_no_diversity():
    assert group_diversity([samples("a b")], rows=2) == {}
    with pytest.raises(ValueError, match="rows = 1"):
        group_diversity([samples("a b")], rows=1)


def test_a_task_without_final_answers_is_noticed():
    assert without_answers(["3 + 4 = 7", "so 7"])
    assert not without_answers(["3 + 4 = 7", r"so \boxed{7}"])
