"""run.log_to, against stand-ins of the libraries."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from core.config import Config, Run
from core.configfile import load_config
from core.configkeys import ConfigError
from trainer.run_directory import IDENTITY_FILE
from trainer.trackers import Trackers, require_trackers

LINE = {"step": 3, "reward": 0.25, "kl": None, "explorer/rows": 8, "clock": "2026-01-01T00:00:00+00:00"}


class FakeBoard:
    made: "list[FakeBoard]" = []  # noqa: RUF012

    def __init__(self, log_dir: str, **options: Any) -> None:
        self.log_dir, self.options = log_dir, options
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = self.broken = False
        FakeBoard.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.broken:
            raise OSError("no space left")
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.metrics = options, [], []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[FakeBoard]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeBoard  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(FakeBoard, "made", [])
    return FakeBoard.made


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeRun]:
    runs: list[FakeRun] = []
    module = ModuleType("wandb")

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    module.init, module.Settings = init, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"run_id": "abc", "incarnation": 1}))
    return runs


def config(*names: Any) -> Config:
    return Config(run=Run(log_to=names))


def test_tensorboard_gets_the_numbers_of_a_line_and_forgets_the_steps_that_happen_again(
    board: list[FakeBoard], tmp_path: Path
) -> None:
    warnings: list[str] = []
    for resumed in (None, 2):
        trackers = Trackers(tmp_path, config("tensorboard"), resumed, warnings.append)
        trackers.log(LINE)
        trackers.close(done=True)
    assert [writer.options["purge_step"] for writer in board] == [None, 3]
    assert board[0].log_dir == str(tmp_path / "tensorboard")
    assert board[0].scalars == [("reward", 0.25, 3), ("explorer/rows", 8.0, 3)]
    assert board[0].closed
    assert warnings == []


def test_wandb_resumes_one_run_and_has_our_step_as_its_axis(
    wandb_runs: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trackers = Trackers(tmp_path, config("wandb"), 2, pytest.fail)
    trackers.log(LINE)
    trackers.close(done=False)
    [run] = wandb_runs
    assert run.options["id"] == "abc"
    assert run.options["resume"] == "allow"
    assert run.options["project"] == "mine"
    assert run.options["config"]["algorithm.steps"] == Config().algorithm.steps
    assert ("*", "step") in run.metrics
    assert run.logged == [{"step": 3, "reward": 0.25, "explorer/rows": 8.0}]
    assert run.exit_code == 1


def test_one_that_fails_later_warns_once_and_the_other_goes_on(
    board: list[FakeBoard], wandb_runs: list[FakeRun], tmp_path: Path
) -> None:
    warnings: list[str] = []
    trackers = Trackers(tmp_path, config("tensorboard", "wandb"), None, warnings.append)
    board[0].broken = True
    for _ in range(3):
        trackers.log(LINE)
    trackers.close(done=True)
    assert len(warnings) == 1
    assert "tensorboard failed" in warnings[0]
    assert "no space left" in warnings[0]
    assert len(wandb_runs[0].logged) == 3
    assert wandb_runs[0].exit_code == 0


def test_one_that_does_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import raises ModuleNotFoundError
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"run_id": "abc", "incarnation": 1}))
    with pytest.raises(ValueError, match=r"wandb does not start: .*WANDB_MODE=offline"):
        Trackers(tmp_path, config("wandb"), None, pytest.fail)


def test_a_library_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        require_trackers(["wandb"])
    require_trackers([])


def test_the_key_is_a_list_of_names() -> None:
    assert load_config(overrides=['run.log_to=["wandb"]']).run.log_to == ("wandb",)
    with pytest.raises(ConfigError, match=r'run.log_to = "wandb" .*a list of "tensorboard" and "wandb", such as'):
        load_config(overrides=["run.log_to=wandb"])
