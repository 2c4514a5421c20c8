"""Final answers of mathematical questions: finding them in a response, and comparing them with math-verify."""

import logging
import re
from functools import lru_cache
from typing import Any

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_ANSWER_LINE = re.compile(r"answer\**\s*:\**[ \t]*(?P<answer>[^\n]*\S)", re.IGNORECASE)
# TeX takes a single digit without braces, and so do people; math-verify does not.
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d)")


def extract_answer(response: str) -> str | None:
    r"""The final answer: the last `\boxed{…}` or the rest of the last line that says `Answer:`, whichever comes later.

    Braces are balanced, so that `\boxed{\frac{1}{2}}` is `\frac{1}{2}`; a box that the length limit cut open does not
    count. None where there is neither. DAPO-Math-17k's prompts ask for an `Answer:` line, most others for a box.
    """
    found, start = None, -1
    for line in _ANSWER_LINE.finditer(response):
        found, start = line["answer"], line.start("answer")
    box = _last_box(response)
    if box is not None and box[0] >= start:
        found = box[1]
    return None if found is None else undelimited(found)


def _last_box(response: str) -> tuple[int, str] | None:
    opened: list[re.Match[str]] = []
    last = None
    for brace in _BRACES.finditer(response):
        if brace["box"] or brace["open"]:
            opened.append(brace)
        elif brace["close"] and opened:
            start = opened.pop()
            if start["box"] and (last is None or start.start() > last[0]):
                last = (start.start(), response[start.end() : brace.start()])
    return last


def undelimited(answer: str) -> str:
    r"""An answer without what surrounds it: `**$12$.**` and `\(12\)` are 12."""
    bare = answer.lstrip(" *$").rstrip(" *$.")
    if bare.startswith(("\\(", "\\[")) and bare.endswith(("\\)", "\\]")):
        bare = bare[2:-2]
    return bare.strip()


def answers_equal(gold: str, answer: str) -> bool:
    r"""Whether math-verify finds `answer` equal to `gold`; never by substring: 2 is not 12.

    The order matters: math-verify lets `3` answer `x = 3`. Its time-outs are off: they say False, which would be
    a reward of 0, and cannot stop C code: run this in a process that can be killed.
    Raises ValueError where `gold` cannot be read. An `answer` that cannot be read is not equal.
    """
    from math_verify import verify

    parsed_gold = _parsed_gold(gold)
    if not parsed_gold:
        raise ValueError(f"the gold answer {gold!r} cannot be read as an expression")
    return bool(verify(parsed_gold, _parsed(answer), timeout_seconds=None))


def require_gold(gold: str) -> None:
    r"""Raise ValueError, saying why, where no response to a question of this gold answer would be found right.

    Several lines without a box are a worked solution: math-verify compares it as a whole. For the rest the gold answer,
    boxed as a response has it, must equal itself. Like `answers_equal` this may take for ever.
    """
    if _last_box(gold) is None and "\n" in gold.strip():
        raise ValueError("several lines without a box are a worked solution, not a final answer")
    answer = extract_answer(gold if _last_box(gold) else rf"\boxed{{{gold}}}")
    if answer is None or not answers_equal(gold, answer):
        raise ValueError("in a box it does not equal itself")


@lru_cache(maxsize=1024)
def _parsed_gold(gold: str) -> list[Any]:
    box = _last_box(gold)
    return _parsed(undelimited(box[1] if box else gold))


def _parsed(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    # It warns, on every first call, that its time-outs are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if not answer:
        return []
    braced = _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_FRACTION.sub(r"\\frac{\1}{\2}", answer))
    strict = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all", equations=False
    )
    config = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=strict
    )
    found: list[Any] = parse(rf"\boxed{{{braced}}}", extraction_config=[config], parsing_timeout=None)
    return found
