import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.checkpoint import newest_checkpoint, remove_stale, write_checkpoint
from trainer.manifest import MANIFEST, verify

REPOSITORY = Path(__file__).resolve().parents[2]

CRASH_POINTS = ("start", "part:model", "part:state", "written", "manifest", "renamed", "pruned")

WRITER = """
import sys
from pathlib import Path
from trainer.checkpoint import write_checkpoint

parts = {
    "model": lambda d: (d / "model.safetensors").write_bytes(b"weights of step 3" * 1000),
    "state": lambda d: ((d / "trainer").mkdir(), (d / "trainer" / "state.json").write_text("{}")),
}
write_checkpoint(Path(sys.argv[1]), 3, parts, keep=2, previous=2)
"""


def write(root, step, *, keep=2, previous=None):
    """A checkpoint with one file of each class, by default after all those that are there."""
    if previous is None:
        previous = max([int(path.name.removeprefix("step_")) for path in root.glob("step_*")], default=0)

    def model(directory):
        save_file({"weight": torch.full((64, 64), float(step))}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"step": step}))

    def state(directory):
        (directory / "trainer").mkdir()
        save_file({"exp_avg.weight": torch.ones(64)}, directory / "trainer" / "optimizer.safetensors")
        (directory / "trainer" / "state.json").write_text(json.dumps({"step": step}))
        (directory / "trainer" / "buffer.msgpack").write_bytes(b"\x90")

    return write_checkpoint(root, step, {"model": model, "state": state}, keep=keep, previous=previous)


FILES = (
    "model.safetensors",
    "config.json",
    "trainer/optimizer.safetensors",
    "trainer/state.json",
    "trainer/buffer.msgpack",
    MANIFEST,
)


def steps(root):
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_found(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (2, 9, 10):
        assert write(root, step, keep=5) == root / f"step_{step}"
    lines = []
    assert newest_checkpoint(root, log=lines.append) == (10, root / "step_10")
    assert lines == []


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_the_manifest_lists_every_file(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 1
    assert manifest["files"].keys() == set(FILES) - {MANIFEST}
    assert manifest["files"]["trainer/state.json"]["bytes"] == (path / "trainer/state.json").stat().st_size
    assert verify(path, 1) is None


def test_everything_is_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []
    really_sync = os.fsync

    def sync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    path = write(tmp_path, 1)
    assert synced[-1] == tmp_path
    names = {str(file.relative_to(synced[0].parents[0])) for file in synced[:-1]}
    assert names >= {*FILES, "trainer", "."}
    assert all(file.is_relative_to(tmp_path) and path not in (file, *file.parents) for file in synced)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["step_10", "step_3"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
def test_a_corrupt_file_is_named_and_the_previous_checkpoint_used(tmp_path, name, how):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = file.read_bytes()
    match how:
        case "flip":
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "truncate":
            file.write_bytes(content[:-1])
        case "empty":
            file.write_bytes(b"")
        case "remove":
            file.unlink()
    lines = []
    found = newest_checkpoint(tmp_path, log=lines.append)
    if name == MANIFEST and how == "truncate":  # only its last line break: still the same manifest
        assert (found.step, lines) == (2, [])
        return
    assert found == (1, tmp_path / "step_1")
    (line,) = lines
    assert "step_2" in line
    assert Path(name).name in line


def test_a_file_that_nobody_wrote_is_refused(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "adapter_config.json").write_text("{}")
    lines = []
    assert newest_checkpoint(tmp_path, log=lines.append).step == 1
    assert "adapter_config.json is not in the manifest" in lines[0]


def test_a_directory_under_another_steps_name_is_refused(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2).rename(tmp_path / "step_7")
    lines = []
    assert newest_checkpoint(tmp_path, log=lines.append).step == 1
    assert f"{MANIFEST} is of step 2" in lines[0]


def test_an_error_if_none_verifies(tmp_path, capsys):
    for step in (1, 2):
        (write(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .*step_2.*step_1"):
        newest_checkpoint(tmp_path)
    assert capsys.readouterr().err.count("CHECKPOINT SKIPPED") == 2


def test_a_checkpoint_is_written_once(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="already there and complete"):
        write(tmp_path, 1)


def test_a_corrupt_checkpoint_of_the_same_step_is_set_aside(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "config.json").unlink()
    write(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2
    assert [name.split("-")[0] for name in steps(tmp_path)] == ["corrupt", "step_1", "step_2"]


@pytest.mark.parametrize(("keep", "kept"), [(1, ["step_5"]), (2, ["step_3", "step_5"])])
def test_damaged_ones_that_a_resumed_run_left_behind_are_none_of_the_kept(tmp_path, capsys, keep, kept):
    """Continued from step 3, since steps 4 and 6 are damaged; its next checkpoint is of step 5."""
    for step in (1, 3, 4, 6):
        write(tmp_path, step, keep=9)
    for step in (4, 6):
        (tmp_path / f"step_{step}" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    write(tmp_path, 5, keep=keep, previous=newest_checkpoint(tmp_path, log=[].append).step)
    assert capsys.readouterr().err.count("is not of this run's course any more: kept as") == 2
    lines = []
    assert newest_checkpoint(tmp_path, log=lines.append) == (5, tmp_path / "step_5")
    assert lines == []
    aside = ["abandoned-step_4", "abandoned-step_6"]
    assert [name.rpartition("-")[0] or name for name in steps(tmp_path)] == aside + kept


@pytest.mark.parametrize("label", CRASH_POINTS)
def test_a_crash_at_any_point_leaves_a_verified_checkpoint(tmp_path, label):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        write(root, step)
    environment = os.environ | {"S2LPO_CRASH_AT": label, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", WRITER, str(root)], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    lines = []
    found = newest_checkpoint(root, log=lines.append)
    assert found.step == (3 if label in ("renamed", "pruned") else 2)
    assert lines == []
    write(root, 4)  # the next writer clears what the killed one left
    assert steps(root) == ["step_3" if found.step == 3 else "step_2", "step_4"]


def test_half_pruned_and_half_written_directories_are_removed(tmp_path):
    for name in ("tmp-step_9-aa", "tmp-pruned-step_1"):
        (tmp_path / name / "inner").mkdir(parents=True)
    remove_stale(tmp_path)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path, error):
    write(tmp_path, 1)

    def fill(directory):
        (directory / "half").write_bytes(b"x")
        raise error

    with pytest.raises(OSError, match=r"disk full while writing checkpoint step_2: \d+ MB free") as caught:
        write_checkpoint(tmp_path, 2, {"model": fill}, keep=1, previous=1)
    assert caught.value.errno == errno.ENOSPC
    assert steps(tmp_path) == ["step_1"]
    assert newest_checkpoint(tmp_path).step == 1


def test_another_error_of_a_part_passes_through(tmp_path):
    def fail(directory):
        raise RuntimeError("broken part")

    with pytest.raises(RuntimeError, match="broken part"):
        write_checkpoint(tmp_path, 1, {"model": fail}, keep=1, previous=0)
    assert steps(tmp_path) == []


def test_directories_that_others_may_write_to_are_refused(tmp_path):
    path = write(tmp_path, 1)
    path.chmod(0o777)
    with pytest.raises(ValueError, match="writable by every user"):
        newest_checkpoint(tmp_path)
    path.chmod(0o755)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="writable by every user"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="writable by every user"):
        write(tmp_path, 2)
    tmp_path.chmod(0o755)


def test_directories_of_another_user_are_refused(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="belongs to user"):
        newest_checkpoint(tmp_path)
