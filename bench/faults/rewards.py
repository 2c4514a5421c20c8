"""Reward functions of the fault suite: quick, and each with one way to fail."""

import os
import time
import zlib
from pathlib import Path

POISON = "S2LPO_POISON"  # names a file; while it exists, rewards are poisoned


def pluses(completions: list[str], **columns: object) -> list[float]:
    """The share of plus signs: differs inside a group, so that every step has a gradient."""
    return [text.split().count("+") / max(len(text.split()), 1) for text in completions]


def poisoned(completions: list[str], **columns: object) -> list[float]:
    """Finite in float64 and infinite in the learner's precision, while the file of `POISON` exists."""
    if Path(os.environ[POISON]).exists():
        return [1e39 * len(text) for text in completions]
    return pluses(completions)


def fragile(completions: list[str], **columns: object) -> list[float]:
    """By the completion's text: raises, hangs, takes all memory, or kills its own process."""
    mark = zlib.crc32(completions[0].encode()) % 8
    if mark == 0:
        raise KeyError("answer")
    if mark == 1:
        time.sleep(3600)
    if mark == 2:
        return [float(len(bytearray(64 << 30)))]
    if mark == 3:
        os.abort()
    return [float(mark)]


def no_number(completions: list[str], **columns: object) -> list[float | None]:
    """What the text says."""
    return [None if text == "None" else float(text) for text in completions]


def slow(completions: list[str], **columns: object) -> list[float]:
    """A tenth of a second each."""
    time.sleep(0.1)
    return [1.0] * len(completions)
