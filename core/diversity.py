"""How often some completion of a prompt is right, and how much they differ: pass@k and the paper's Table 3 metrics."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb
from operator import index


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


def _refuse_fewer(name: str, values: Sequence[object], least: int) -> None:
    if isinstance(values, str) or len(values) < least:
        raise ValueError(f"{name} needs at least {least} of them in a list, got {values!r}")
