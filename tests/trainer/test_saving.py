"""A full disk costs a checkpoint on all ranks alike: they make the same collectives, and agree on what was saved."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest

from trainer import checkpoint, saving
from trainer.saving import Saver


class Recorder:
    def __init__(self):
        self.warned = []
        self.console = self

    def warn(self, text):
        self.warned.append(text)

    def stage(self, *_):
        return nullcontext()

    def ledger(self, report):
        pass


class Rollouts:
    def save(self, directory):
        pass

    def report(self):
        return {}


class World:
    """Rank 0 runs first here, and says what it broadcasts to the other."""

    def __init__(self, said, *, is_main):
        self.said, self.is_main = said, is_main

    def broadcast_bytes(self, payload):
        assert (payload is not None) == self.is_main
        if payload is not None:
            self.said.append(payload)
        return self.said[-1]


class Learner:
    step = 0

    def __init__(self, world):
        self.collectives, self.world = [], world

    def save_model(self, directory):
        self.collectives.append("model")

    def save_state(self, directory):
        self.collectives.append("optimizer")


@pytest.mark.parametrize("full_at", ["start", "model", "optimizer", "rollouts", "rename", None])
def test_every_rank_makes_the_same_collectives_whatever_the_disk_does(monkeypatch, full_at):
    full = [full_at]

    def write(root, step, parts, *, keep, previous, log):
        def check(where):
            if full[0] == where:
                raise OSError(errno.ENOSPC, "disk full")

        check("start")
        for name, part in parts.items():
            part(Path())
            check(name)
        check("rename")

    monkeypatch.setattr(saving, "write_checkpoint", write)
    said: list[bytes] = []
    main, other = (Learner(World(said, is_main=is_main)) for is_main in (True, False))
    recorder = Recorder()
    savers = [
        Saver(Path(), main, Rollouts(), recorder, keep=1),
        Saver(Path(), other, None, None, keep=1),
    ]
    for saver in savers:
        saver.save(4)
    assert main.collectives == other.collectives == ["model", "optimizer"]
    assert [saver.saved_step for saver in savers] == ([0, 0] if full_at else [4, 4])
    assert len(recorder.warned) == (1 if full_at else 0)
    full[0] = None  # there is room again when the run is stopped: it saves itself, once
    for saver in savers:
        saver.save(4)
    assert main.collectives == other.collectives == ["model", "optimizer"] * (2 if full_at else 1)
    assert [saver.saved_step for saver in savers] == [4, 4]


@pytest.mark.parametrize("full_at", ["_fsync", "_prune"])
def test_a_checkpoint_that_has_its_name_is_one_whatever_the_disk_does_then(tmp_path, monkeypatch, full_at):
    """Said, not called missing, nor written a second time; the next one clears up."""
    real = getattr(checkpoint, full_at)

    def fill(path, *rest):
        if path == tmp_path and (tmp_path / "step_4").exists():
            raise OSError(errno.EDQUOT, "quota exceeded")
        real(path, *rest)

    recorder, learner = Recorder(), Learner(World([], is_main=True))
    saver = Saver(tmp_path, learner, Rollouts(), recorder, keep=1)
    saver.save(2)
    with monkeypatch.context() as full:
        full.setattr(checkpoint, full_at, fill)
        saver.save(4)
        saver.save(4)
    assert (saver.saved_step, saver.failed) == (4, 0)
    (said,) = recorder.warned
    assert said.startswith("checkpoint step_4 is written, but the disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_4"]
    saver.save(6)
    assert [path.name for path in tmp_path.iterdir()] == ["step_6"]
