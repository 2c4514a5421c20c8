"""The embedded task: countdown with written steps, one token per number.

    prompt    8 5 9 7 = 15 :
    response  9 - 5 = 4 , 8 - 4 = 4 , ...      n − 1 steps for n numbers; every number and every result is used once

Numbers are digits 1 … 9, operations + and −, results and targets at most 49 and never negative.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import Literal, NamedTuple

import numpy as np

LARGEST = 49
# The id of a word is its index. `*` and `/` are there for harder variants of the task; `verify` refuses them.
WORDS: tuple[str, ...] = ("<pad>", "<eos>", *map(str, range(LARGEST + 1)), "+", "-", "*", "/", "=", ",", ":")
PAD_ID, EOS_ID = 0, 1
IDS = {word: index for index, word in enumerate(WORDS)}

NUMBERS_PER_PROBLEM = 4
TARGETS = range(1, 21)
PRETRAIN_PROBLEMS, EVAL_PROBLEMS = 700, 256
TRACES_PER_PROBLEM = 3

Split = Literal["pretrain", "train", "eval"]
Kind = Literal["ok", "format", "operand", "arith", "target"]
_VALUES = {str(value): value for value in range(LARGEST + 1)}


class Problem(NamedTuple):
    """Numbers in the order they are shown, and what to reach with them.

    Example: Problem(numbers=(8, 5, 9, 7), target=15)
    """

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """The prompt's words, separated by spaces."""
        return f"{' '.join(map(str, self.numbers))} = {self.target} :"


def encode(text: str) -> list[int]:
    """Ids of words separated by whitespace; a word outside the vocabulary is a ValueError."""
    unknown = [word for word in text.split() if word not in IDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of the {len(WORDS)} words of countdown")
    return [IDS[word] for word in text.split()]


def parse_prompt(text: str) -> Problem:
    """The problem a prompt states; ValueError where it is not a countdown prompt."""
    words = text.split()
    numbers = [_VALUES.get(word) for word in (*words[:-3], *words[-2:-1])]
    if len(numbers) < 3 or None in numbers or words[-3::2] != ["=", ":"]:
        raise ValueError(f"not a countdown prompt (such as '8 5 9 7 = 15 :'): {text!r}")
    *given, target = [value for value in numbers if value is not None]
    return Problem(tuple(given), target)


def verify(prompt_text: str, response_text: str) -> tuple[int, Kind]:
    """Reward 0 or 1 of a response, and what is wrong with it.

    Checked in this order: `format` (not exactly n − 1 steps `a + b = c` or `a - b = c` joined by commas, over words of
    the vocabulary; one final `<eos>` may stand), then step by step `operand` (neither given nor an unused earlier
    result) and `arith` (wrong result), then `target` (the last result is another number).
    Raises ValueError where the prompt is not a countdown prompt.
    """
    problem = parse_prompt(prompt_text)
    steps = _steps(response_text, len(problem.numbers) - 1)
    if steps is None:
        return 0, "format"
    available = list(problem.numbers)
    for left, operator, right, result in steps:
        for operand in (left, right):
            if operand not in available:
                return 0, "operand"
            available.remove(operand)
        if result != (left + right if operator == "+" else left - right):
            return 0, "arith"
        available.append(result)
    return (1, "ok") if available == [problem.target] else (0, "target")


def _steps(response_text: str, count: int) -> list[tuple[int, str, int, int]] | None:
    words = response_text.split()
    if words[-1:] == [WORDS[EOS_ID]]:
        words.pop()
    words.append(",")
    if len(words) != 6 * count:
        return None
    steps = []
    for start in range(0, len(words), 6):
        left, operator, right, equals, result, comma = words[start : start + 6]
        numeric = left in _VALUES and right in _VALUES and result in _VALUES
        if not numeric or operator not in ("+", "-") or equals != "=" or comma != ",":
            return None
        steps.append((_VALUES[left], operator, _VALUES[right], _VALUES[result]))
    return steps


def solutions(numbers: tuple[int, ...], target: int) -> Iterator[str]:
    """Every response that `verify` accepts, once each, in an order that the order of numbers does not change."""
    if not numbers or not all(0 <= number <= LARGEST for number in numbers):
        raise ValueError(f"countdown needs numbers within 0 … {LARGEST}, got {numbers}")
    return _solve(tuple(sorted(numbers)), target)


def _solve(available: tuple[int, ...], target: int) -> Iterator[str]:
    for step, rest in _moves(available):
        if len(rest) == 1:
            if rest[0] == target:
                yield step
        elif target in _reachable(rest):
            for further in _solve(rest, target):
                yield f"{step} , {further}"


def _moves(available: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each distinct step on sorted numbers, with the sorted numbers it leaves."""
    for low, high in sorted(set(combinations(available, 2))):
        rest = list(available)
        rest.remove(low)
        rest.remove(high)
        added, left = tuple(sorted((*rest, high + low))), tuple(sorted((*rest, high - low)))
        if high + low <= LARGEST:
            yield f"{high} + {low} = {high + low}", added
            if low != high:
                yield f"{low} + {high} = {high + low}", added
        yield f"{high} - {low} = {high - low}", left


@cache
def _reachable(available: tuple[int, ...]) -> frozenset[int]:
    """Results that some order of steps ends on, for sorted numbers."""
    if len(available) == 1:
        return frozenset(available)
    return frozenset().union(*(_reachable(rest) for rest in {rest for _, rest in _moves(available)}))


def problems(split: Split, seed: int) -> list[Problem]:
    """Solvable problems of one split; the splits of a seed share no pair of (numbers as a multiset, target).

    All (multiset, target) pairs are permuted by the seed; the first 256 are `eval`, the next 700 `pretrain` (for making
    the embedded models), the rest (1,489) `train`. The numbers of each problem are shown in a seeded order. A multiset
    recurs in other splits with other targets.
    """
    pool = [
        Problem(numbers, target)
        for numbers in combinations_with_replacement(range(1, 10), NUMBERS_PER_PROBLEM)
        for target in sorted(_reachable(numbers))
        if target in TARGETS
    ]
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permutation(len(pool))
    shown = rng.permuted([problem.numbers for problem in pool], axis=1).tolist()
    first_train = EVAL_PROBLEMS + PRETRAIN_PROBLEMS
    match split:
        case "eval":
            chosen = order[:EVAL_PROBLEMS]
        case "pretrain":
            chosen = order[EVAL_PROBLEMS:first_train]
        case "train":
            chosen = order[first_train:]
        case _:
            raise ValueError(f'split must be "pretrain", "train" or "eval", got {split!r}')
    return [Problem(tuple(shown[index]), pool[index].target) for index in chosen.tolist()]


def pretraining_traces(seed: int) -> list[tuple[Problem, tuple[str, ...]]]:
    """Each pretraining problem with 3 solutions drawn from all of its solutions (all of them where it has fewer).

    Few fixed traces, repeated over many epochs, make the larger model overconfident: that is what lets the smaller one
    be the more diverse.
    """
    rng = np.random.Generator(np.random.Philox([seed, 1]))
    drawn = []
    for problem in problems("pretrain", seed):
        traces = list(solutions(*problem))
        picked = rng.permutation(len(traces))[:TRACES_PER_PROBLEM].tolist()
        drawn.append((problem, tuple(traces[index] for index in picked)))
    return drawn
