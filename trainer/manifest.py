"""The files of a checkpoint, with their sizes and hashes.

A bit that flips in a safetensors file loads without an error, so every file is hashed. The manifest's own hash is over
the rest of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rollout.fingerprint import file_sha256

MANIFEST = "manifest.json"
FORMAT = 1
HASHERS = 8


def manifest_of(directory: Path, step: int) -> str:
    """What MANIFEST is to hold, of the files that are in the directory now."""
    found = files_in(directory)
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(found, _hashed(found))
    }
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _own_digest(manifest)
    return json.dumps(manifest, indent=1) + "\n"


def verify(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint directory: the file and the reason; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError as error:
        return f"{MANIFEST} is not JSON ({error})"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"{MANIFEST} is not of format {FORMAT}"
    if manifest.get("sha256") != _own_digest(manifest):
        return f"{MANIFEST} does not have the SHA-256 it records for itself"
    if manifest["step"] != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    present = {str(file.relative_to(path)) for file in files_in(path)} - {MANIFEST}
    for name in sorted(present - manifest["files"].keys()):
        return f"{name} is not in the manifest"
    for name, expected in manifest["files"].items():
        if name not in present:
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, {expected['bytes']} were written"
    hashed = zip(manifest["files"].items(), _hashed([path / name for name in manifest["files"]]))
    for (name, expected), digest in hashed:
        if digest != expected["sha256"]:
            return f"{name} does not have the SHA-256 that was written"
    return None


def files_in(directory: Path) -> list[Path]:
    """At any depth, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _hashed(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each, several at a time: hashlib lets other threads run, and one takes a second for a GB or two."""
    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(file_sha256, files))


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
