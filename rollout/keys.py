"""CURVE keys: `python -m rollout.keys DIR` makes a trainer pair and a worker pair; every file is for its owner alone.

DIR/trainer.key, trainer.pub    the trainer's pair
DIR/worker.key, worker.pub      a worker's pair; the trainer allows every *.pub but its own
A worker on another machine needs trainer.pub, worker.key and worker.pub.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rollout.access import Keys
from rollout.wire import new_keypair

_KEY_BYTES = 40  # Z85 of 32 bytes


def make_keys(directory: Path, *, worker: str = "worker") -> list[Path]:
    """Write a trainer pair (unless there is one) and a pair for `worker`. ValueError where that worker has one."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    written = []
    for name in ("trainer", worker):
        if (directory / f"{name}.key").exists():
            if name == worker:
                raise ValueError(f"{directory / f'{name}.key'} exists: choose another --worker NAME or directory")
            continue
        public, secret = new_keypair()
        written += [_write(directory / f"{name}.pub", public), _write(directory / f"{name}.key", secret)]
    return written


def trainer_keys(directory: Path) -> Keys:
    """The trainer's keys, with every worker's public key that lies in the directory."""
    public = _read(directory / "trainer.pub")
    allowed = frozenset(_read(file) for file in directory.glob("*.pub") if file.name != "trainer.pub")
    return Keys(public=public, secret=_read(directory / "trainer.key"), trainer=public, allowed=allowed)


def worker_keys(directory: Path) -> Keys:
    """A worker's keys: trainer.pub and the one worker pair of the directory (worker.key, where there are several)."""
    secrets = sorted(file for file in directory.glob("*.key") if file.name != "trainer.key")
    chosen = next((file for file in secrets if file.name == "worker.key"), secrets[0] if len(secrets) == 1 else None)
    if chosen is None:
        raise ValueError(f"{directory}: no worker.key; others: {len(secrets)}. Make keys with `python -m rollout.keys`")
    return Keys(
        public=_read(chosen.with_suffix(".pub")), secret=_read(chosen), trainer=_read(directory / "trainer.pub")
    )


def _write(file: Path, key: bytes) -> Path:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(key + b"\n")
    return file


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise ValueError(f"{file} is missing: make keys with `python -m rollout.keys {file.parent}`")
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise ValueError(f"{file} has mode {mode:04o}; others may read or replace it: chmod 600 {file}")
    key = file.read_bytes().strip()
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{file} is not a key: {len(key)} bytes instead of {_KEY_BYTES}; make keys again")
    return key


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m rollout.keys`."""
    parser = argparse.ArgumentParser(prog="python -m rollout.keys", description="Make CURVE keys for the stream.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--worker", default="worker", metavar="NAME", help="name of the worker pair (default: worker)")
    options = parser.parse_args(arguments)
    try:
        written = make_keys(options.directory, worker=options.worker)
    except (ValueError, OSError) as error:
        print(f"s2l-po: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"wrote {file}" for file in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
