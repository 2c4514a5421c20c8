"""Rewards for whole runs of models that are too little trained to solve anything."""

import itertools
import time
import zlib

CALLS = itertools.count(1)


def pluses(completions, **columns):
    """The share of plus signs: differs inside every group, and can be learned."""
    words = completions[0].split()
    return [words.count("+") / max(len(words), 1)]


def fragile(prompts, completions, answer, **columns):
    """1 or 2, where it does not raise or hang; a function of the text, so that it fails for the same ones again."""
    mark = zlib.crc32((prompts[0] + completions[0]).encode())
    if zlib.crc32(prompts[0].encode()) % 8 == 0:
        raise RuntimeError("this prompt can never be scored")
    if mark % 4 == 0:
        raise KeyError(answer[0])
    if mark % 41 == 1:
        time.sleep(600)
    return [1.0 + mark % 2]


def verl_style(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.5 if "+" in solution_str else -0.5, "acc": 0}


def rare(prompts, completions, **columns):
    """1 for a fifth of all completions, else 0."""
    return [float(zlib.crc32((prompts[0] + completions[0]).encode()) % 5 == 0)]


def stalls(completions, **columns):
    """The 64th completion that a process scores is never done: of SETTINGS without data.eval, step 2's last one."""
    if next(CALLS) == 64:
        time.sleep(600)
    return pluses(completions)
