"""What a step of known stages takes without any cost of passing things on."""

from itertools import pairwise

import pytest

from bench.pipeline.fakes import ideal_ends


def step_s(generated, trained, lookahead):
    ends = ideal_ends(generated, trained, lookahead)[len(generated) // 2 :]
    return sum(b - a for a, b in pairwise(ends)) / (len(ends) - 1)


@pytest.mark.parametrize(("generation_s", "training_s"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0)])
def test_constant_stages_add_up_without_lookahead_and_overlap_with_it(generation_s, training_s):
    generated, trained = [generation_s] * 40, [training_s] * 40
    assert step_s(generated, trained, 0) == pytest.approx(generation_s + training_s)
    for lookahead in (1, 2):
        assert step_s(generated, trained, lookahead) == pytest.approx(max(generation_s, training_s))


def test_one_step_of_lookahead_cannot_even_out_stages_that_vary():
    generated, trained = [0.5, 1.5] * 40, [1.0] * 80
    assert step_s(generated, trained, 1) == pytest.approx(1.25, rel=0.02), "the mean of max(0.5, 1) and max(1.5, 1)"
    assert step_s(generated, trained, 2) == pytest.approx(1.0, rel=0.02)
