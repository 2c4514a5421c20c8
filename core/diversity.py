"""How often some completion of a prompt is right, and how much they differ: pass@k and the paper's Table 3 metrics."""

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from math import comb
from operator import index
from typing import NamedTuple, TypeVar

from core.math_answers import extract_answer

T = TypeVar("T")


class Sample(NamedTuple):
    """One completion as the diversity metrics see it.

    Example: Sample("9 - 5 = 4 , ...", token_ids=(11, 53))
    """

    text: str
    token_ids: Sequence[int]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(some of k completions is right) from n completions, c of them right.

        1 − C(n−c, k) / C(n, k)

    (arXiv:2107.03374, eq. 1.) Computed in integers and rounded once. Raises ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n:
    fewer completions than k cannot estimate it.
    """
    n, c, k = index(n), index(c), index(k)
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


def self_bleu(texts: Sequence[str]) -> float:
    """Mean over i of the sentence BLEU (sacreBLEU's defaults) of text i against all the others, 0 to 1 (all equal).

    Raises ValueError for fewer than two texts.
    """
    from sacrebleu import sentence_bleu

    _refuse_fewer("self_bleu", texts, 2)
    scores = [
        sentence_bleu(text, [*texts[:number], *texts[number + 1 :]]).score / 100 for number, text in enumerate(texts)
    ]
    # sacreBLEU's 100 is the exponential of a sum of logarithms: it may exceed 100 by a rounding error.
    return min(1.0, sum(scores) / len(scores))


def edit_diversity(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Mean over pairs of Levenshtein distance / longer length, 0 (all equal) to 1.

    A sequence is token ids (list, tuple, array) or a text, compared by character. Two empty ones do not differ.
    Raises ValueError for fewer than two sequences.
    """
    from rapidfuzz.distance import Levenshtein

    _refuse_fewer("edit_diversity", sequences, 2)
    distances = [Levenshtein.normalized_distance(one, other) for one, other in combinations(sequences, 2)]
    return float(sum(distances) / len(distances))


def unique_answer_ratio(answers: Sequence[Hashable]) -> float:
    """Distinct answers / answers, above 0 and at most 1; no answer (None) is one answer. ValueError for none at all."""
    _refuse_fewer("unique_answer_ratio", answers, 1)
    return len(set(answers)) / len(answers)


def group_diversity(
    groups: Sequence[Sequence[Sample]],
    *,
    rows: int,
    limit: int = 0,
    self_bleu_limit: int | None = 0,
    whole_texts: bool = False,
) -> dict[str, float]:
    """Means over groups (completions of one prompt) of `edit_diversity`, `unique_answer_ratio` and `self_bleu`.

    Self-BLEU and the unique ratio depend on how many completions there are, so that exactly the first `rows` (at least
    2) of each group are compared and smaller groups left out; {} where that leaves none. At most `limit` groups, evenly
    spaced, of them at most `self_bleu_limit` for Self-BLEU; 0: all, None: no Self-BLEU. Edit diversity is over token
    ids. An answer is the final answer that `extract_answer` finds (none is one answer), or the whole text with
    `whole_texts`.
    """
    if rows < 2:
        raise ValueError(f"rows = {rows}: diversity compares at least 2 completions of a prompt")
    chosen = spread([group[:rows] for group in groups if len(group) >= rows], limit)
    if not chosen:
        return {}
    answers = [[row.text if whole_texts else extract_answer(row.text) for row in group] for group in chosen]
    found = {
        "edit_diversity": _mean([edit_diversity([row.token_ids for row in group]) for group in chosen]),
        "unique_answer_ratio": _mean([unique_answer_ratio(group) for group in answers]),
    }
    if self_bleu_limit is not None:
        read = [[row.text for row in group] for group in spread(chosen, self_bleu_limit)]
        found["self_bleu"] = _mean([self_bleu(texts) for texts in read])
    return found


def without_answers(texts: Iterable[str]) -> bool:
    """True where no text has a final answer, as in the embedded task, so that whole texts are compared instead."""
    return all(extract_answer(text) is None for text in texts)


def spread(items: Sequence[T], limit: int) -> Sequence[T]:
    """At most `limit` items, evenly spaced from the first one on; 0: all."""
    if not limit or len(items) <= limit:
        return items
    return [items[place * len(items) // limit] for place in range(limit)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _refuse_fewer(name: str, values: Sequence[object], least: int) -> None:
    if isinstance(values, str) or len(values) < least:
        raise ValueError(f"{name} needs at least {least} of them in a list, got {values!r}")
