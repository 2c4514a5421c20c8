"""An error of a user's reward function in one line that says where it happened."""

import importlib
import traceback
from pathlib import Path

MAX_DETAIL = 500
_OURS = (Path(__file__).parent, Path(importlib.__file__).parent)
# What a function meets that was written for TRL's conversational data.
_HINTS = {"string indices must be integers": "prompts and completions are text here, not lists of messages"}


def described(error: BaseException) -> str:
    """An error with its class, and file and line in the code of whoever is at fault, as far as that is not ours.

    Example: described(error) -> "KeyError: 'boom' (rewards.py:12)"
    """
    hint = next((f"; {hint}" for sign, hint in _HINTS.items() if sign in str(error)), "")
    end = f"{hint}{_place(error)}"
    return f"{type(error).__name__}: {error}"[: MAX_DETAIL - len(end)] + end


def _place(error: BaseException) -> str:
    """The innermost line of the first file outside of this package: the user's, not that of a library it calls."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [(file, line) for file, line in lines if not file.startswith("<") and Path(file).parent not in _OURS]
    if not theirs:
        return ""
    file = theirs[0][0]
    return f" ({Path(file).name}:{[line for name, line in theirs if name == file][-1]})"
