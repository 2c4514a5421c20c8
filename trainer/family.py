"""The embedded family on disk: made once per recipe and seed, verified whenever it is used again."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec

import core.countdown
import trainer.pretrain
from rollout.fingerprint import file_sha256
from trainer.pretrain import Progress, Recipe, make_family

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
LOCK_POLL_S = 0.2
LOCK_TIMEOUT_S = 1800.0


class Family(NamedTuple):
    """Two Hugging Face directories with the same tokenizer.

    Example: Family(learner=Path("…/family-3f6c…/learner"), explorer=Path("…/family-3f6c…/explorer"))
    """

    learner: Path
    explorer: Path


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What made a family, and the SHA-256 of each of its files by path."""

    seed: int
    recipe: Recipe
    sources: dict[str, str]  # SHA-256 of the modules that make it
    libraries: dict[str, str]
    files: dict[str, str]


def default_cache_root() -> Path:
    """`$S2LPO_CACHE`, or `~/.cache/s2l-po`."""
    return Path(os.environ.get("S2LPO_CACHE") or Path.home() / ".cache" / "s2l-po")


def embedded_family(
    cache_root: Path,
    seed: int,
    *,
    recipe: Recipe | None = None,
    on_progress: Progress = lambda text, fraction: None,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Family:
    """The cached family of a seed, made first where there is none (about a minute on two cores).

    Its directory is named by a hash of all that decides its bytes: recipe, seed, the code that makes it and the
    versions of the libraries. It is made beside its place and renamed; a second process waits for the first one's lock.
    `on_progress(text, fraction)` is called after every training step and while waiting.
    Raises ValueError where a cached file is not the one that was made, TimeoutError where another process keeps the
    lock longer than `lock_timeout_s`.
    """
    made_of = _made_of(seed, recipe or Recipe())
    name = "family-" + hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:16]
    folder = cache_root / name
    if not folder.exists():
        cache_root.mkdir(parents=True, exist_ok=True)
        with _locked(cache_root / f"{name}.lock", lock_timeout_s, on_progress):
            if not folder.exists():
                _make(folder, made_of, on_progress)
    _verify(folder)
    return Family(folder / "learner", folder / "explorer")


def _made_of(seed: int, recipe: Recipe) -> Manifest:
    modules = (core.countdown, trainer.pretrain)
    return Manifest(
        seed=seed,
        recipe=recipe,
        sources={module.__name__: file_sha256(Path(str(module.__file__))) for module in modules},
        libraries={library: version(library) for library in LIBRARIES},
        files={},
    )


def _make(folder: Path, made_of: Manifest, on_progress: Progress) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():  # of a process that was killed: this one holds the lock
        shutil.rmtree(partial)
    make_family(partial, made_of.seed, made_of.recipe, on_progress)
    files = {str(file.relative_to(partial)): file_sha256(file) for file in sorted(partial.rglob("*")) if file.is_file()}
    manifest = msgspec.json.encode(msgspec.structs.replace(made_of, files=files))
    (partial / MANIFEST).write_bytes(msgspec.json.format(manifest, indent=2))
    partial.rename(folder)


def _verify(folder: Path) -> None:
    remedy = f"remove {folder} and it is made again"
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"the cached models have no readable manifest ({error}); {remedy}") from error
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"the cached models lack {file}; {remedy}")
        if file_sha256(file) != expected:
            raise ValueError(f"{file} is not the file that was made (its SHA-256 differs); {remedy}")


@contextmanager
def _locked(path: Path, timeout_s: float, on_progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock that the system frees when this process ends, however it ends."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process has held {path} for over {timeout_s:.0f} s while making the embedded models; "
                        "end it, or set S2LPO_CACHE to another directory"
                    ) from None
                on_progress("waiting for another process that makes the embedded models", 0.0)
                time.sleep(LOCK_POLL_S)
            else:
                break
        yield


if __name__ == "__main__":  # `python -m trainer.family SEED`: make or find the family, and say where it is
    print(json.dumps(embedded_family(default_cache_root(), int(sys.argv[1]))._asdict(), default=str))
