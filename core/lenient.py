r"""The answer check of the authors' evaluation, rebuilt from its description; for reports, never for training.

It pays for more than right answers: a gold answer inside a longer text counts (2 in `x = 12`), and a box ends at its
first closing brace. Scores made with it compare with the paper's tables, not with other papers'.
"""

import re

# Bounded, so that a response that opens thousands of braces and closes none does not take quadratic time.
_BOX = re.compile(r"\\boxed\{([^}]{1,1000})\}")
_FRACTION = re.compile(r"\\[dt]?frac\{[^}]{0,1000}\}\{[^}]{0,1000}\}")
_MARKED = re.compile(r"(?:answer\s*[:：]|答案\s*[:：是为]*|final answer is)[ \t]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|[,;!: ])|[\s$]|\\text(?=\{)|\\mathrm(?=\{)")
_TEXT = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")


def lenient_answer(response: str) -> str:
    r"""What the authors take for the answer; the first of these that is there.

    The last `\boxed{…}` up to its first closing brace; the last `\frac{…}{…}`; what follows the last `Answer:`, `答案`
    or `final answer is`; the last number; the last line.
    """
    for pattern in (_BOX, _FRACTION, _MARKED, _NUMBER):
        found = pattern.findall(response)
        if found:
            return str(found[-1]).strip()
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def lenient_equal(gold: str, answer: str) -> bool:
    """Equal after normalisation; where both are numbers, closer than 1e-6; else gold within the answer."""
    gold, answer = _normalised(gold), _normalised(answer)
    if gold == answer:
        return True
    numbers = _number(gold), _number(answer)
    if numbers[0] is not None and numbers[1] is not None:
        return abs(numbers[0] - numbers[1]) < 1e-6
    return bool(gold) and gold in answer


def lenient_score(response: str, gold: str) -> float:
    """1 or 0 as the authors' evaluation scores a response."""
    return float(lenient_equal(gold, lenient_answer(response)))


def _normalised(text: str) -> str:
    """Lower case; no spaces, dollar signs, sizes, text commands, thousands separators or final full stop."""
    text = _DROPPED.sub("", _TEXT.sub(r"\1", text)).replace("dfrac", "frac").replace("tfrac", "frac")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return text.rstrip(".。").lower()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
