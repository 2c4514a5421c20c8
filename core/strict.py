r"""Strict answer checks of the benchmarks that need more than math-verify: tolerances, units, choices.

Reward functions in TRL's signature, for scoring processes that can be killed (`core.strict:score_olympiad`). Each takes
the final answer that `extract_answer` finds; a response without one is wrong.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from core.math_answers import answers_equal, extract_answer, undelimited

_CHOICE = re.compile(r"\(?([A-Z])\)?(?:[.:,)\s].*)?", re.DOTALL)
_STYLE = re.compile(r"\\(?:mathrm|text|textrm|rm|mathbf)\b|\\[,;!: ]|[{}~$\s]")


def score_olympiad(
    completions: Sequence[str],
    answer: Sequence[str],
    golds: Sequence[str],
    tolerance: Sequence[str],
    unit: Sequence[str],
    **_: Any,
) -> list[float]:
    """1 where every gold answer of OlympiadBench is given and nothing else, in any order, the unit given or not.

    math-verify decides; where a tolerance is given, numbers may differ by as much from the gold ones.
    """
    return [
        _olympiad(response, gold, msgspec.json.decode(parts, type=list[str]), allowed, measure)
        for response, gold, parts, allowed, measure in zip(completions, answer, golds, tolerance, unit)
    ]


def score_choice(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the final answer is the label of the right choice: `B`, `(B)`, `B. bank`, but not `Bank`."""
    return [float(_choice(response) == label) for response, label in zip(completions, answer)]


def _choice(response: str) -> str | None:
    found = extract_answer(response)
    if found is None:
        return None
    label = _CHOICE.fullmatch(undelimited(re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", found)))
    return label[1] if label else None


def _olympiad(response: str, gold: str, golds: list[str], tolerance: str, unit: str) -> float:
    found = extract_answer(response)
    if found is None:
        return 0.0
    found = without_unit(found, unit) if unit else found
    if answers_equal(gold, found):
        return 1.0
    return float(bool(tolerance) and _within(golds, found, tolerance))


def without_unit(answer: str, unit: str) -> str:
    r"""An answer without the unit it ends with, however that is set: `5 \mathrm{~km}/s` without `km/s` is `5`."""
    bare = _STYLE.sub("", unit)
    for end in range(1, len(answer)):
        number = answer[:end]
        if number.count("{") == number.count("}") and _STYLE.sub("", answer[end:]) == bare:
            return undelimited(number)
    return answer


def _within(golds: list[str], found: str, tolerance: str) -> bool:
    """Whether the numbers of `found`, in order of size, lie within the tolerances of the gold ones."""
    allowed = [abs(float(part)) for part in tolerance.split(",") if part.strip()]
    parts = [part for gold in golds for part in gold.split(",")]
    # One answer may hold a comma that separates thousands.
    answers = found.split(",") if len(parts) > 1 else [found]
    wanted, given = [_number(part) for part in parts], [_number(part) for part in answers]
    if len(wanted) != len(given) or None in wanted or None in given:
        return False
    allowed = allowed * len(wanted) if len(allowed) == 1 else allowed
    if len(allowed) != len(wanted):
        raise ValueError(f"tolerances {tolerance!r} are {len(allowed)}, the gold answers {golds} are {len(wanted)}")
    pairs = sorted((gold, most) for gold, most in zip(wanted, allowed) if gold is not None)
    values = sorted(value for value in given if value is not None)
    # The last term forgives the rounding of a bound such as |0.3 - 0.2| <= 0.1.
    return all(abs(gold - value) <= most * (1 + 1e-9) + 1e-12 for (gold, most), value in zip(pairs, values))


def _number(text: str) -> float | None:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found = parse(rf"\boxed{{{undelimited(text)}}}", extraction_config=[config], parsing_timeout=None)
    try:
        return float(found[0].evalf()) if found else None
    except (AttributeError, TypeError):  # no number: text, a set, or an expression with unknowns
        return None
