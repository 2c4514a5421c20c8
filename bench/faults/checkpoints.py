"""Rows about checkpoints: cut short at every point, spoilt in every file, written to a full disk."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench.faults.rows import NotHere, Verdict, row
from bench.faults.runs import Run, difference, reference
from trainer.checkpoint import CRASH_AT, newest_checkpoint

CRASH_POINTS = ("start", "part:model", "part:optimizer", "part:rollouts", "written", "manifest", "renamed", "pruned")


@row("F21", f"kill -9 at each of the {len(CRASH_POINTS)} labelled points of a checkpoint, each time resumed")
def crash_points(seed: int) -> Verdict:
    run = Run("crashes")
    for number, point in enumerate(CRASH_POINTS):
        run.start(*(["--resume"] if number else []), **{CRASH_AT: point})
        run.finish(-signal.SIGKILL)
        partial = [name for name in run.checkpoints() if not name.startswith("step_")]
        assert len(partial) == (point not in ("renamed", "pruned")), run.checkpoints()
    run.complete("--resume")
    lost, duplicated = difference(run)
    assert "CHECKPOINT SKIPPED" not in run.text(), "a partial checkpoint was looked at"
    return Verdict("tolerated", "a partial one is never seen; final parameters bit-equal", None, lost, duplicated)


def _spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()


@row("F22", "every file of the newest checkpoint flipped, truncated, missing; then a resume")
def spoilt(seed: int) -> Verdict:
    run = Run("spoilt")
    shutil.copytree(reference().dir, run.dir)
    root = run.dir / "checkpoints"
    newest = newest_checkpoint(root)
    assert newest is not None
    files = sorted(file for file in newest.path.rglob("*") if file.is_file())
    said: list[str] = []
    tried, start = 0, time.monotonic()
    for file in files:
        for how in ("flipped", "truncated", "missing"):
            whole = file.read_bytes()
            if not whole:
                continue
            _spoil(file, how)
            found = newest_checkpoint(root, log=said.append)
            assert found is not None
            assert found.step == newest.step - 1, f"{file.name} {how} was not noticed"
            file.write_bytes(whole)
            tried += 1
    seconds = (time.monotonic() - start) / tried
    assert len(said) == tried, said
    _spoil(newest.path / "model.safetensors", "flipped")
    shutil.rmtree(run.dir / "model")
    (run.dir / "config.resolved.json").write_text(_own_config(run))
    run.complete("--resume")
    assert "CHECKPOINT SKIPPED" in run.text(), run.tail()
    lost, duplicated = difference(run)
    text = f"{len(files)} files × 3, each named and skipped for the one before it; resumed run bit-equal"
    return Verdict("tolerated", text, seconds, lost, duplicated)


def _own_config(run: Run) -> str:
    """The reference's settings, in the directory of its copy."""
    text = (run.dir / "config.resolved.json").read_text()
    return text.replace(json.dumps(str(reference().dir)), json.dumps(str(run.dir)))


@row("F20", "disk full while checkpointing")
def disk_full(seed: int) -> Verdict:
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise NotHere(f"no mount namespaces for this user ({probe.stderr.strip()})")
    run = Run("disk-full", algorithm__steps=400)
    run.start(**{CRASH_AT: "start"})
    run.finish(-signal.SIGKILL)
    folder = run.dir / "checkpoints"
    small = f'mount -t tmpfs -o size=100k,mode=755 tmpfs "{folder}" && exec "$@"'
    run.start("--resume", prefix=["unshare", "-rm", "sh", "-c", small, "sh"])
    assert run.process is not None
    run.wait_for("it is said", lambda: run.text().count("NO CHECKPOINT of step") >= 3)
    begun = len(run.lines())
    inside = ["nsenter", "-U", "--preserve-credentials", "-m", "-t", str(run.process.pid)]
    subprocess.run([*inside, "mount", "-o", "remount,size=50m", str(folder)], check=True)
    there = Path(f"/proc/{run.process.pid}/root{folder}")
    seconds = run.wait_for("a checkpoint", lambda: any(path.name.startswith("step_") for path in there.iterdir()))
    run.signal(signal.SIGTERM)
    run.finish(143)
    failed = run.text().count("NO CHECKPOINT of step")
    assert "disk full while writing checkpoint" in run.text(), run.tail()
    assert len(run.lines()) > begun >= 3
    text = f"{failed} checkpoints failed, each said; training went on; the first one with room was written"
    return Verdict("tolerated", text, seconds)
