"""Finds the function that `reward.function` names: in a module, or in a file."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from core.reward_errors import described


def import_function(name: str, built_in: Iterable[str]) -> Any:
    """What `module:function` or `path/file.py:function` names; a relative path counts from the current folder.

    Raises ValueError, naming the key, for a name that leads nowhere and for a module that cannot be imported.
    """
    module, colon, path = name.rpartition(":")
    if not (module and colon and path):
        raise ValueError(
            f'reward.function = "{name}" is neither "countdown", "math" nor module:function or path/file.py:function'
            + _hint(name, built_in)
        )
    try:
        function: Any = _module(module)
    except Exception as error:  # whatever a user's module does as it is imported
        text = str(error) if isinstance(error, _NotFound) else f"importing {module} failed: {described(error)}"
        raise ValueError(f'reward.function = "{name}": {text}') from error
    for attribute in path.split("."):
        if not hasattr(function, attribute):
            raise ValueError(
                f'reward.function = "{name}": {module} has no {attribute}{_hint(attribute, dir(function))}'
            )
        function = getattr(function, attribute)
    return function


class _NotFound(Exception):
    pass


def _hint(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser().absolute())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and a module that it needs is not
        raise _NotFound(
            f"cannot import {name}: there is no module {error.name} in PYTHONPATH, among the installed packages or in "
            f"{Path.cwd()}; set PYTHONPATH, or name a file as path/file.py:function"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise _NotFound(f"there is no file {path}; a relative path counts from the folder where the run is started")
    # Behind everything else: it finds what lies beside it, and shadows nothing.
    sys.path.append(str(path.parent))
    # A name of its own: a file may be called as an installed module is.
    spec = importlib.util.spec_from_file_location(f"_reward_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
