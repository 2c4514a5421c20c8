"""What the rounds of the real run say together."""

import pytest

from bench.pipeline.real import summary


def test_ratios_are_of_pairs_and_rewards_come_with_their_noise():
    def row(lookahead, seed, step_s, rewards):
        return {
            "updates": 2, "lookahead": lookahead, "round": seed, "step_s": step_s, "rewards": rewards,
            "train_cpu_s": 0.5, "generate_cpu_s": 0.25,
        }  # fmt: skip

    rows = [
        row(0, 0, 3.0, [0.2, 0.4]), row(1, 0, 2.0, [0.3, 0.4]),
        row(0, 1, 8.0, [0.2, 0.4]), row(1, 1, 4.0, [0.1, 0.5]),
        row(0, 2, 1.8, [0.2, 0.4]), row(1, 2, 1.0, [0.2, 0.6]),
    ]  # fmt: skip
    found = summary(rows)
    assert found["speed_ups"] == pytest.approx([1.5, 2.0, 1.8])
    assert found["speed_up"] == pytest.approx(1.8)
    assert found["cpu_bound_ratio"] == pytest.approx(1.5), "(0.5 + 0.25) / 0.5"
    assert found["reward_differences"] == pytest.approx([0.0, 0.1])
    assert found["reward_noise"] == pytest.approx([0.1 / 3**0.5, 0.1 / 3**0.5])
    assert summary(rows[:2])["reward_noise"] == [None, None], "one seed says nothing about noise"
