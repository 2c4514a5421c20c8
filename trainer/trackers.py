"""Where a run's numbers go beside metrics.jsonl (`run.log_to`): TensorBoard, Weights & Biases. One door for each.

The libraries are the user's to install; each is imported when it is asked for.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from core.config import Config
from trainer.run_directory import IDENTITY_FILE, flatten

PROJECT = "s2l-po"
_FLUSH_S = 10


class Tracker(Protocol):
    """One library. `resumed`: the step that training continues from; what it has of later ones is void."""

    def __init__(self, path: Path, config: Config, resumed: int | None) -> None: ...

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one line of metrics.jsonl."""

    def close(self, *, done: bool) -> None:
        """`done`: the run reached its last step."""


class TensorBoard:
    """Event files in the run directory's `tensorboard/`; a curve per metric."""

    def __init__(self, path: Path, config: Config, resumed: int | None) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        purge = None if resumed is None else resumed + 1
        self._writer = writer(str(path / "tensorboard"), purge_step=purge, flush_secs=_FLUSH_S)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, done: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of project `s2l-po` (or $WANDB_PROJECT), the same one at every start; WANDB_MODE=offline needs no network.

    Its axis is our `step`: wandb's own only grows, and a resumed run goes back to its checkpoint.
    """

    def __init__(self, path: Path, config: Config, resumed: int | None) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=path.name,
            id=json.loads((path / IDENTITY_FILE).read_text())["run_id"],
            resume="allow",
            dir=str(path),
            config=flatten(msgspec.to_builtins(config)),
            settings=wandb.Settings(console="off"),  # the terminal is ours
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, *, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


_DOORS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a library that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.log_to: {name} is not installed; pip install {name}, or leave it out of the list")


class Trackers:
    """All that `run.log_to` names. One that fails is left out from then on, with a warning.

    Raises ValueError where one cannot start.
    """

    def __init__(self, path: Path, config: Config, resumed: int | None, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.run.log_to):
            try:
                self._open[name] = _DOORS[name](path, config, resumed)
            except Exception as error:
                hint = " (WANDB_MODE=offline needs neither account nor network)" if name == "wandb" else ""
                raise ValueError(f"run.log_to: {name} does not start: {error}{hint}") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand on the numbers of a line of metrics.jsonl; null is left out."""
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        self._each(lambda tracker: tracker.log(step, numbers))

    def close(self, *, done: bool) -> None:
        """Wait until everything is written or sent."""
        self._each(lambda tracker: tracker.close(done=done))

    def _each(self, use: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                use(tracker)
            except Exception as error:
                del self._open[name]
                self._warn(
                    f"run.log_to: {name} failed and gets nothing more ({type(error).__name__}: {error}); "
                    "metrics.jsonl has every line"
                )
