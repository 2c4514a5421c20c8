"""Models of one tokenizer whose embeddings differ in size: completions with an id that another model lacks.

Published families pad their embeddings, and not all alike: Qwen2.5 has 151,936 rows in its small models and 152,064 in
its large ones. No token has the ids between, but a model may draw one, and a model without it cannot score the row.
"""

from collections.abc import Mapping
from typing import Any

from core.config import Config
from core.schema import Completion, Source
from rollout.mixer import Mixer

UNKNOWN_TOKEN = "unknown_token"


def id_bounds(config: Config, vocab_sizes: Mapping[Source, int]) -> dict[Source, int]:
    """Below which every token id of a row must lie, by the row's source: all models that score it have such ids.

    π_θ scores every row, π_ω the learner's where correction.learner.weight = "mixture". `vocab_sizes`: rows of each
    model's head; the explorer's is absent where the run has none.
    """
    smallest = min(vocab_sizes.values())
    mixture = config.correction.learner.weight == "mixture"
    return {Source.EXPLORER: smallest, Source.LEARNER: smallest if mixture else vocab_sizes[Source.LEARNER]}


class SharedIdsMixer(Mixer):
    """A mixer that drops rows with an id outside `id_bounds` and replaces them as it replaces failed rewards.

    The engines cannot be asked again: the same lease gives the same completion.
    """

    def __init__(self, *parts: Any, id_bounds: Mapping[Source, int], **options: Any) -> None:
        self._id_bounds = id_bounds
        super().__init__(*parts, **options)

    def _enter(self, completion: Completion) -> None:
        key = completion.key
        if int(completion.tokens.max()) < self._id_bounds[key.source]:
            super()._enter(completion)
        elif self.buffer.insert(completion):
            self.buffer.fail_reward(key, UNKNOWN_TOKEN)
            with self._replacing:
                self._replace(key)
