"""Reward functions: exact countdown, math-verify, and a user's own in TRL's or verl's signature."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from core import countdown
from core.math_answers import answers_equal, extract_answer
from core.schema import Noun

TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")


class RewardItem(Noun, frozen=True, kw_only=True):
    """What a reward function may know about one completion.

    Example: RewardItem(prompt="8 5 9 7 = 15 :", completion="9 - 5 = 4 , ...", completion_ids=(11, 53), answer="15")
    """

    prompt: str
    completion: str
    completion_ids: tuple[int, ...] = ()
    answer: str
    columns: dict[str, str] = msgspec.field(default_factory=dict)  # the data set's other columns, as Question has them


Reward = Callable[[RewardItem], float | None]


def resolve_reward(name: str) -> Reward:
    """The function that `reward.function` names.

    `countdown` (1 or 0 by core.countdown.verify), `math` (1 or 0 by math-verify on the last box or `Answer:` line), or
    `module:function`. A user's function has TRL's signature `f(prompts, completions, completion_ids, **columns) ->
    list[float | None]` with lists of one, prompts and completions as text, and `answer` among the columns; or verl's
    `f(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float}`. The parameter names decide.
    None from any of them means: no reward. Raises ValueError for a name that leads nowhere and for other signatures.
    """
    if name == "math":
        answers_equal("1", "1")  # loads SymPy and the grammar now rather than in the first completion's time
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'reward.function = "{name}" is neither "countdown", "math" nor module:function{hint}')
    function: Any
    try:
        function = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'reward.function = "{name}": cannot import {module} ({error})') from error
    for attribute in path.split("."):
        if not hasattr(function, attribute):
            near = difflib.get_close_matches(attribute, dir(function), n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ValueError(f'reward.function = "{name}": {module} has no {attribute}{hint}')
        function = getattr(function, attribute)
    return _adapted(function, name)


def score_countdown(item: RewardItem) -> float:
    """1 for a right derivation of the target, else 0."""
    return float(countdown.verify(item.prompt, item.completion)[0])


def score_math(item: RewardItem) -> float:
    """1 where the final answer equals the gold one, else 0; a response without a final answer is wrong."""
    answer = extract_answer(item.completion)
    return float(answer is not None and answers_equal(item.answer, answer))


BUILT_IN: Mapping[str, Reward] = {"countdown": score_countdown, "math": score_math}


def _adapted(function: Any, name: str) -> Reward:
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
        return lambda item: _verl_score(function(**accepted(_verl_arguments(item))))
    return lambda item: _trl_score(function(**accepted(_trl_arguments(item))))


def _trl_arguments(item: RewardItem) -> dict[str, Any]:
    columns = {"answer": item.answer, **item.columns}
    return {
        **{key: [value] for key, value in columns.items()},
        "prompts": [item.prompt],
        "completions": [item.completion],
        "completion_ids": [list(item.completion_ids)],
    }


def _trl_score(scores: Any) -> float | None:
    if not isinstance(scores, (list, tuple)) or len(scores) != 1:
        raise TypeError(
            f"a reward function of TRL's signature returns one score per completion, here 1; got {scores!r}"
        )
    return _number(scores[0])


def _verl_arguments(item: RewardItem) -> dict[str, Any]:
    extra = item.columns.get("extra_info")
    return {
        "data_source": item.columns.get("data_source", ""),
        "solution_str": item.completion,
        "ground_truth": item.answer,
        "extra_info": msgspec.json.decode(extra) if extra else None,
    }


def _verl_score(score: Any) -> float | None:
    return _number(score["score"] if isinstance(score, dict) else score)


def _number(score: Any) -> float | None:
    if isinstance(score, (str, bytes)):
        raise TypeError(f"a score is a number or None, got {score!r}")
    return None if score is None else float(score)


_EMPTY = RewardItem(prompt="", completion="", answer="")
