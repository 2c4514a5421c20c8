"""Models of one tokenizer whose embeddings differ in size: completions with an id that another model lacks.

Published families pad their embeddings, and not all alike: Qwen2.5 has 151,936 rows in its small models and 152,064 in
its large ones. No token has the ids between, but a model may draw one, and a model without it cannot score the row.
"""

from collections.abc import Callable, Mapping

from core.config import Config
from core.schema import Completion, Source

UNKNOWN_TOKEN = "unknown_token"


def id_bounds(config: Config, vocab_sizes: Mapping[Source, int]) -> dict[Source, int]:
    """Below which every token id of a row must lie, by the row's source: all models that score it have such ids.

    π_θ scores every row, π_ω the learner's where correction.learner.weight = "mixture". `vocab_sizes`: rows of each
    model's head; the explorer's is absent where the run has none.
    """
    smallest = min(vocab_sizes.values())
    mixture = config.correction.learner.weight == "mixture"
    return {Source.EXPLORER: smallest, Source.LEARNER: smallest if mixture else vocab_sizes[Source.LEARNER]}


def unknown_tokens(config: Config, vocab_sizes: Mapping[Source, int]) -> Callable[[Completion], str | None]:
    """Says UNKNOWN_TOKEN of a completion with an id outside the `id_bounds` of its source, None of all others.

    Example: Mixer(…, why_unfit=unknown_tokens(config, {Source.LEARNER: 152_064, Source.EXPLORER: 151_936}))
    """
    bounds = id_bounds(config, vocab_sizes)

    def why_unfit(completion: Completion) -> str | None:
        return UNKNOWN_TOKEN if int(completion.tokens.max()) >= bounds[completion.key.source] else None

    return why_unfit
