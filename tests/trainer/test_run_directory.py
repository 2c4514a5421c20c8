"""A run directory is one run's, and is never overwritten without being told to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from core.config import Algorithm, Config, Learner, Run
from core.configkeys import ConfigError
from trainer.run_directory import RunDirectory


def config(path: Path, steps: int = 80, group_size: int = 8) -> Config:
    return Config(run=Run(dir=str(path)), algorithm=Algorithm(steps=steps, group_size=group_size))


def test_a_second_start_counts_and_keeps_the_run_id(tmp_path: Path) -> None:
    first = RunDirectory(config(tmp_path / "run"), resume=False, clean=False)
    first.close()
    second = RunDirectory(config(tmp_path / "run"), resume=True, clean=False)
    second.close()
    assert (first.run_id, first.incarnation, second.incarnation) == (second.run_id, 1, 2)


def test_a_directory_that_holds_a_run_is_refused_with_both_remedies(tmp_path: Path) -> None:
    for result in ("metrics.jsonl", "checkpoints/step_1/model.safetensors", "rollouts/step_000001.parquet"):
        path = tmp_path / result.partition(".")[0]
        RunDirectory(config(path), resume=False, clean=False).close()
        (path / result).parent.mkdir(exist_ok=True)
        (path / result).write_text("something")
        with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--clean"):
            RunDirectory(config(path), resume=False, clean=False)
        assert (path / result).read_text() == "something"


def test_a_start_that_came_to_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    RunDirectory(config(tmp_path), resume=False, clean=False).close()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "logs" / "explorer-0.log").write_text("it failed")
    second = RunDirectory(config(tmp_path, group_size=16), resume=False, clean=False)
    second.close()
    assert second.incarnation == 1
    assert not (tmp_path / "logs" / "explorer-0.log").exists()


def test_clean_deletes_the_run_and_nothing_but_runs(tmp_path: Path) -> None:
    RunDirectory(config(tmp_path / "run"), resume=False, clean=False).close()
    (tmp_path / "run" / "rollouts" / "old.parquet").write_text("x")
    RunDirectory(config(tmp_path / "run"), resume=False, clean=True).close()
    assert not (tmp_path / "run" / "rollouts" / "old.parquet").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(chapter.tex"):
        RunDirectory(config(tmp_path / "thesis"), resume=False, clean=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_two_processes_cannot_hold_one_directory_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trainer.run_directory import hold; "
        "hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
            RunDirectory(config(tmp_path), resume=False, clean=False)
        os.kill(other.pid, signal.SIGKILL)
    RunDirectory(config(tmp_path), resume=False, clean=False).close()
    assert json.loads((tmp_path / "run.json").read_text())["incarnation"] == 1


def test_resume_refuses_another_computation_and_allows_another_machine(tmp_path: Path) -> None:
    RunDirectory(config(tmp_path), resume=False, clean=False).close()
    with pytest.raises(ConfigError, match=r"algorithm\.group_size: 8 → 16"):
        RunDirectory(config(tmp_path, group_size=16), resume=True, clean=False)
    longer = msgspec.structs.replace(config(tmp_path, steps=100), run=Run(dir=str(tmp_path), threads=4))
    RunDirectory(longer, resume=True, clean=False).close()
    assert json.loads((tmp_path / "config.resolved.json").read_text())["algorithm"]["steps"] == 100


def test_resume_may_change_what_only_rounds_otherwise_and_says_so(tmp_path: Path) -> None:
    RunDirectory(config(tmp_path), resume=False, clean=False).close()
    less = Learner(micro_batch_tokens=100, gradient_checkpointing=True, backend="deepspeed", zero_stage=3)
    smaller = msgspec.structs.replace(config(tmp_path), learner=less)
    directory = RunDirectory(smaller, resume=True, clean=False)
    directory.close()
    [note] = directory.notes
    assert "but for rounding" in note
    assert all(part in note for part in ("micro_batch_tokens: 8192 → 100", "backend: 'torch' → 'deepspeed'"))
    other = msgspec.structs.replace(less, learning_rate=1.0, micro_batch_tokens=50)
    with pytest.raises(ConfigError, match=r"learning_rate") as refused:
        RunDirectory(msgspec.structs.replace(smaller, learner=other), resume=True, clean=False)
    assert "micro_batch_tokens" not in str(refused.value)  # it is not what stands in the way


def test_resume_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory(config(tmp_path), resume=True, clean=False)
