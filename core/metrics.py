"""metrics.jsonl: one JSON object a line, each with its step, written as it happens and cut back on resume."""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from core.whole_file import whole_file

FILE_NAME = "metrics.jsonl"
EVALUATION = "eval/"
# A completion counts as correct with a reward above this: right for rewards of 0 and 1, and of -1 and 1.
CORRECT_ABOVE = 0.5


class RunLog:
    """Appends lines to a run's metrics.jsonl; every line reaches the file before `write` returns.

    A NaN or infinite value is written as null, so that every line is standard JSON and a diverging loss is on record
    without ending the run (`learner.max_nonfinite_updates` ends it). `clock` is the wall time, a label only.

    Example: with RunLog(Path("runs/tiny")) as log: log.write({"step": 1, "reward": 0.31})
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        """`resume_step` is the step of the checkpoint that training continues from; later lines are cut off, since
        those steps happen again. None starts a new file and raises FileExistsError where there is one."""
        self.path = run_dir / FILE_NAME
        self.evaluated_steps: set[int] = set()
        if resume_step is not None:
            kept = read_metrics(run_dir, until=resume_step)
            _replace(self.path, kept)
            self.evaluated_steps = {line["step"] for line in kept if is_evaluation(line)}
        self._file = self.path.open("x" if resume_step is None else "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Append one line, return it as written. Raises TypeError for a value that is no number, bool or string."""
        step = line["step"]
        assert isinstance(step, int), f"a metrics line needs an integer step, got {step!r}"
        assert step >= 0, f"steps count from 0, got {step}"
        written = {name: _plain(name, value) for name, value in line.items()}
        written["clock"] = datetime.now(UTC).isoformat(timespec="seconds")
        if is_evaluation(written):
            self.evaluated_steps.add(step)
        self._file.write(json.dumps(written, allow_nan=False) + "\n")
        self._file.flush()
        return written

    def close(self) -> None:
        """Sync the file to disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """True for a line of held-out results, False for one of training."""
    return any(name.startswith(EVALUATION) for name in line)


def read_metrics(run_dir: Path, until: int | None = None) -> list[dict[str, Any]]:
    """Every complete line of a run, in order; empty where there is no file. `until`: of steps up to this one.

    A last line without its newline was cut by a kill and is left out. Raises ValueError for any other broken line.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    *complete, _torn = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number} is not JSON: {error}. Delete the line or restore the file"
            ) from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path} line {number} has no integer step: delete the line or restore the file")
        if until is None or line["step"] <= until:
            lines.append(line)
    return lines


def _plain(name: str, value: Any) -> int | float | str | bool | None:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metric {name} is a {type(value).__name__}: expected a number, a bool or a string")


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
