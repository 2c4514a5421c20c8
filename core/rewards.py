"""Reward functions: exact countdown, math-verify, and a user's own in TRL's or verl's signature."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from core import countdown
from core.math_answers import answers_equal, extract_answer
from core.reward_import import import_function
from core.schema import Noun

WITH_MATH_VERIFY = ("math", "core.gold:readable", "core.strict:score_olympiad")
TRL_GIVEN = ("prompts", "completions", "completion_ids")
TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")


class RewardItem(Noun, frozen=True, kw_only=True):
    """What a reward function may know about one completion.

    Example: RewardItem(prompt="8 5 9 7 = 15 :", completion="9 - 5 = 4 , ...", completion_ids=(11, 53), answer="15")
    """

    prompt: str
    completion: str
    completion_ids: tuple[int, ...] = ()
    answer: str
    columns: dict[str, Any] = msgspec.field(default_factory=dict)  # the data set's other columns, as Question has them


Reward = Callable[[RewardItem], float | None]


def resolve_reward(name: str) -> Reward:
    """The function that `reward.function` names.

    `countdown` (1 or 0 by core.countdown.verify), `math` (1 or 0 by math-verify on the last box or `Answer:` line),
    `module:function` or `path/file.py:function`. A user's function (a UserReward; docs/rewards.md) has TRL's signature
    `f(prompts, completions, completion_ids, **columns) -> list[float | None]` with lists of one, prompts and
    completions as text, and `answer` among the columns; or verl's
    `f(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float}`. The parameter names decide.
    None from any of them means: no reward. Raises ValueError for a name that leads nowhere and for other signatures.
    """
    if name in WITH_MATH_VERIFY:
        answers_equal("1", "1")  # loads SymPy and the grammar now rather than in the first completion's time
    if name in BUILT_IN:
        return BUILT_IN[name]
    return _adapted(import_function(name, BUILT_IN), name)


def require_columns(function: str, needs: Collection[str], columns: Collection[str], key: str) -> None:
    """Raise ValueError where a function requires columns that the data of `key` (data.train) do not have."""
    missing = sorted(set(needs).difference(columns))
    if missing:
        raise ValueError(
            f'reward.function = "{function}" requires {", ".join(missing)}, and {key} has no such column. It is given '
            f"{', '.join(TRL_GIVEN)}, answer (the gold answer) and the columns there are: "
            f"{', '.join(sorted(columns)) or 'none'}. Rename the parameter or the column, or give it a default"
        )


@dataclass(frozen=True)
class UserReward:
    """A user's function as a Reward; `needs`: columns of the data without which it cannot be called."""

    call: Reward
    needs: tuple[str, ...]

    def __call__(self, item: RewardItem) -> float | None:
        """Its score of one completion."""
        return self.call(item)


def score_countdown(item: RewardItem) -> float:
    """1 for a right derivation of the target, else 0."""
    return float(countdown.verify(item.prompt, item.completion)[0])


def score_math(item: RewardItem) -> float:
    """1 where the final answer equals the gold one, else 0; a response without a final answer is wrong."""
    answer = extract_answer(item.completion)
    return float(answer is not None and answers_equal(item.answer, answer))


BUILT_IN: Mapping[str, Reward] = {"countdown": score_countdown, "math": score_math}


def _adapted(function: Any, name: str) -> UserReward:
    """A user's function as a Reward; the signature decides which way it is called."""
    if not callable(function) or inspect.iscoroutinefunction(function):
        kind = "an async function" if callable(function) else f"a {type(function).__name__}"
        raise ValueError(f'reward.function = "{name}" is {kind}; it must be a plain function')
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:  # a function written in C
        raise ValueError(f'reward.function = "{name}": {error}; wrap it in a Python function') from error
    names = [parameter.name for parameter in parameters]
    trl, verl = "completions" in names, "solution_str" in names
    if trl == verl:
        both = "both completions and solution_str" if trl else "neither completions nor solution_str"
        raise ValueError(
            f'reward.function = "{name}" takes ({", ".join(names)}), {both}: give it TRL\'s signature '
            "(prompts, completions, completion_ids, **columns) "
            "or verl's (data_source, solution_str, ground_truth, extra_info)"
        )
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unserved = required.intersection(TRL_ONLY) if trl else required - set(_verl_arguments(_EMPTY))
    unserved |= {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    if unserved:
        raise ValueError(
            f'reward.function = "{name}" needs {", ".join(sorted(unserved))}, which nobody here can give it'
        )
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def accepted(arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if anything else {key: value for key, value in arguments.items() if key in names}

    if verl:
        return UserReward(lambda item: _verl_score(function(**accepted(_verl_arguments(item)))), ())
    whose = f"{name}{_defined(function)}"
    needs = tuple(sorted(required.difference(TRL_GIVEN, ("answer",))))
    return UserReward(lambda item: _trl_score(function(**accepted(_trl_arguments(item))), whose), needs)


def _defined(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""


def _trl_arguments(item: RewardItem) -> dict[str, Any]:
    columns = {"answer": item.answer, **item.columns}
    return {
        **{key: [value] for key, value in columns.items()},
        "prompts": [item.prompt],
        "completions": [item.completion],
        "completion_ids": [list(item.completion_ids)],
    }


def _trl_score(scores: Any, whose: str) -> float | None:
    if not isinstance(scores, (list, tuple)) or len(scores) != 1:
        raise TypeError(
            f"{whose} returned {scores!r:.100}; TRL's signature returns a list of one score per completion, here 1"
        )
    return _number(scores[0])


def _verl_arguments(item: RewardItem) -> dict[str, Any]:
    return {
        "data_source": item.columns.get("data_source", ""),
        "solution_str": item.completion,
        "ground_truth": item.answer,
        "extra_info": item.columns.get("extra_info", {}),
    }


def _verl_score(score: Any) -> float | None:
    return _number(score["score"] if isinstance(score, dict) else score)


def _number(score: Any) -> float | None:
    if isinstance(score, (str, bytes)):
        raise TypeError(f"a score is a number or None, got {score!r}")
    return None if score is None else float(score)


_EMPTY = RewardItem(prompt="", completion="", answer="")
