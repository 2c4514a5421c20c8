"""Checkpoints that are complete and verified, or not there.

    tmp-step_N-…/   files written, fsynced and hashed → manifest.json → directories fsynced
    step_N/         the same directory, renamed; its parent fsynced; older ones pruned

A resumed run begins after the newest step_N that verifies. Later ones are of a course that was given up: damaged, and
once the run has a newer checkpoint of its own, set aside as abandoned-step_N-…, for people to look at.

A reader only ever sees step_N.
"""

import errno
import os
import shutil
import signal
import stat
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.manifest import MANIFEST, files_in, manifest_of, verify

CRASH_AT = "S2LPO_CRASH_AT"

Part = Callable[[Path], None]
Log = Callable[[str], None]  # takes a line; None: to stderr


class Found(NamedTuple):
    """A checkpoint whose every file has the hash in its manifest.

    Example: Found(step=20, path=Path("runs/tiny/checkpoints/step_20"))
    """

    step: int
    path: Path


def write_checkpoint(
    root: Path, step: int, parts: Mapping[str, Part], *, keep: int, previous: int, log: Log | None = None
) -> Path:
    """Write checkpoint `root/step_N`, then remove all but the `keep` newest; returns its path.

    `previous`: the step of this run's checkpoint before, which it continued from or wrote; 0 where there is none. Any
    other of a later step is set aside and counts for nothing.

    Each part is called with the temporary directory and writes its files under it; its name is for messages and crash
    points. Left-over temporary directories of a killed writer are removed first. If anything fails, earlier
    checkpoints stay as they were; OSError for a full disk says how much space is left. Once step_N has its name it is
    written: a disk that is full then is a line of `log`, and earlier ones stay until the next is written. ValueError
    if step_N is there and verifies; one that does not is kept beside it as `corrupt-step_N-…`.

    Crash points (environment variable S2LPO_CRASH_AT, for tests): start, part:NAME, written, manifest, renamed, pruned.
    """
    assert keep >= 1
    root.mkdir(parents=True, exist_ok=True)
    require_private(root)
    remove_stale(root)
    target = root / f"step_{step}"
    if target.exists():
        _set_aside(target)
    temporary = root / f"tmp-step_{step}-{uuid.uuid4().hex[:8]}"
    try:
        _write(temporary, step, parts)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and _is_disk_full(error):
            free = shutil.disk_usage(root).free
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing checkpoint step_{step}: {free / 1e6:.0f} MB free at {root}; earlier "
                f"checkpoints are intact. Free some space, or lower checkpoint.keep ({error})",
            ) from error
        raise
    os.rename(temporary, target)
    _settle(root, step, previous, keep, log or _to_stderr)
    crash_point("pruned")
    return target


def newest_checkpoint(root: Path, *, log: Log | None = None) -> Found | None:
    """The newest checkpoint that verifies, or None where there never was one; changes nothing on disk.

    Each one that does not verify is skipped with a line that names the file and what is wrong with it. ValueError if
    there are checkpoints and none verifies, and for directories that others may write to.
    """
    say = log or _to_stderr
    candidates = _checkpoints(root)
    if not candidates:
        return None
    require_private(root)
    problems = []
    for step, path in candidates:
        require_private(path)
        problem = verify(path, step)
        if problem is None:
            return Found(step, path)
        problems.append(f"{path.name}: {problem}")
        say(f"CHECKPOINT SKIPPED {path}: {problem}")
    raise ValueError(
        f"none of the {len(candidates)} checkpoints in {root} verifies ({'; '.join(problems)}); "
        "restore one from a copy, or start anew with --clean"
    )


def require_private(directory: Path) -> None:
    """Raise ValueError unless the directory is this user's and not writable by everybody: its content is trusted."""
    status = directory.stat()
    if status.st_uid != os.getuid():
        raise ValueError(
            f"{directory} belongs to user {status.st_uid}, not to you ({os.getuid()}); "
            "use a checkpoint of your own, or copy it"
        )
    if status.st_mode & stat.S_IWOTH:
        raise ValueError(f"{directory} is writable by every user; run chmod o-w {directory} if you trust what is in it")


def remove_stale(root: Path) -> None:
    """Remove what a killed writer left: temporary directories, and pruned ones that were only half deleted."""
    for path in root.glob("tmp-*"):
        shutil.rmtree(path)


def crash_point(label: str) -> None:
    """Kill this process as by kill -9 if S2LPO_CRASH_AT names this point: how tests stop it at an exact place."""
    if os.environ.get(CRASH_AT) == label:
        os.kill(os.getpid(), signal.SIGKILL)


def _write(temporary: Path, step: int, parts: Mapping[str, Part]) -> None:
    temporary.mkdir(mode=0o755)
    crash_point("start")
    for name, part in parts.items():
        part(temporary)
        crash_point(f"part:{name}")
    for file in files_in(temporary):
        _fsync(file)
    manifest = manifest_of(temporary, step)
    crash_point("written")
    (temporary / MANIFEST).write_text(manifest)
    _fsync(temporary / MANIFEST)
    for directory in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        _fsync(directory)
    crash_point("manifest")


def _set_aside(target: Path) -> None:
    step = int(target.name.removeprefix("step_"))
    if verify(target, step) is None:
        raise ValueError(f"{target} is already there and complete; a run writes a step's checkpoint once")
    target.rename(target.with_name(f"corrupt-{target.name}-{uuid.uuid4().hex[:8]}"))


def _settle(root: Path, written: int, previous: int, keep: int, log: Log) -> None:
    """What comes after the new checkpoint has its name. It is one by then, so that a full disk is no error."""
    try:
        _fsync(root)
        crash_point("renamed")
        _set_abandoned_aside(root, written, previous, log)
        _prune(root, keep)
    except OSError as error:  # some file systems need room to delete
        if not _is_disk_full(error):
            raise
        log(
            f"checkpoint step_{written} is written, but the disk at {root} is full ({error}): earlier checkpoints stay "
            "until the next one is written. Free some space"
        )


def _set_abandoned_aside(root: Path, written: int, previous: int, log: Log) -> None:
    for step, path in _checkpoints(root):
        if step > previous and step != written:
            aside = path.rename(path.with_name(f"abandoned-{path.name}-{uuid.uuid4().hex[:8]}"))
            log(
                f"checkpoint {path.name} is not of this run's course any more: kept as {aside}, delete it if not needed"
            )


def _prune(root: Path, keep: int) -> None:
    """A complete one has a manifest. Renamed before it is deleted, so that no step_N is ever half deleted."""
    complete = [(step, path) for step, path in _checkpoints(root) if (path / MANIFEST).is_file()]
    for _, path in complete[keep:]:
        doomed = path.with_name(f"tmp-pruned-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Directories step_N, newest first."""
    found = [(path.name.removeprefix("step_"), path) for path in root.glob("step_*") if path.is_dir()]
    return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: Exception) -> bool:
    """safetensors reports it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
