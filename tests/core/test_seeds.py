"""Seeds are a pure function of what they are for."""

import itertools

from core.schema import CompletionKey, Source
from core.seeds import completion_seed

KEY = CompletionKey(source=Source.EXPLORER, step=3, slot=17, sample=2)


def test_a_seed_is_a_constant_of_its_key() -> None:
    """A changed value would make completions of a resumed run differ from those of the run it continues."""
    assert completion_seed(0, "train", KEY) == 15112046582590889027
    assert completion_seed(7, "eval", KEY) == 3771962371500180746


def test_every_part_of_the_identity_counts() -> None:
    keys = [
        CompletionKey(source=source, step=step, slot=slot, sample=sample)
        for source, step, slot, sample in itertools.product(Source, range(12), range(12), range(12))
    ]
    seeds = {completion_seed(run, purpose, key) for run in (0, 1) for purpose in ("train", "eval") for key in keys}
    assert len(seeds) == 4 * len(keys)


def test_seeds_are_unsigned_64_bit_and_use_all_of_them() -> None:
    seeds = [
        completion_seed(0, "train", CompletionKey(source=Source.LEARNER, step=1, slot=slot, sample=0))
        for slot in range(512)
    ]
    assert all(0 <= seed < 2**64 for seed in seeds)
    for bit in range(64):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert 0.35 < share < 0.65, bit
