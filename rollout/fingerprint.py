"""What a model directory is, as SHA-256: equal fingerprints mean equal completions and equal token ids."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rollout.messages import Fingerprints

# A tokenizer without tokenizer.json is the bytes of those of these files that exist.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", *_SLOW_FILES)
# Settings of the caller, which saving writes along; they do not change what an id means.
_CALLER_KEYS = ("truncation", "padding")
_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
_CHUNK_BYTES = 1 << 20
_PIECE_BYTES, _THREADS = 64 << 20, 8


def fingerprints(model_dir: Path, *, weights: bool) -> Fingerprints:
    """Both fingerprints of a directory; `weights=False` leaves out the weights (those of learner rollouts move)."""
    return Fingerprints(
        tokenizer=tokenizer_fingerprint(model_dir), weights=weights_fingerprint(model_dir) if weights else ""
    )


def weights_fingerprint(model_dir: Path) -> str:
    """SHA-256 (hex) over names and contents of the safetensors files. ValueError where there are none."""
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model_dir}: no *.safetensors file: not a Hugging Face model directory?")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(model_dir: Path) -> str:
    """SHA-256 (hex) over vocabulary and rules, special tokens and chat template. ValueError where there is none."""
    directory = Path(model_dir)
    parts = {"vocabulary": _vocabulary(directory), **_special_tokens(directory)}
    return hashlib.sha256(_canonical(parts)).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 (hex) of a file's content, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digest(file: Path) -> str:
    """Of published weights: H(H(p₁) ‖ … ‖ H(pₙ)) in hex, H SHA-256 and pᵢ the file's pieces of 64 MiB.

    Pieces can be hashed beside each other, up to 8 at once (hashlib lets other threads run), where the SHA-256 of a
    whole file keeps one processor busy for a second and more per GB. OSError where the file cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        starts = range(0, os.fstat(stream.fileno()).st_size, _PIECE_BYTES)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            each = threads.map if len(starts) > 1 else map  # a thread for one piece would be waited for at once
            pieces = each(lambda start: _piece_sha256(stream.fileno(), start), starts)
            return hashlib.sha256(b"".join(pieces)).hexdigest()


def _piece_sha256(descriptor: int, start: int) -> bytes:
    digest, stop = hashlib.sha256(), start + _PIECE_BYTES
    while start < stop and (chunk := os.pread(descriptor, min(_CHUNK_BYTES, stop - start), start)):
        digest.update(chunk)
        start += len(chunk)
    return digest.digest()


def _vocabulary(directory: Path) -> str:
    fast = directory / "tokenizer.json"
    if fast.is_file():
        content = _read_json(fast)
        return hashlib.sha256(_canonical({k: v for k, v in content.items() if k not in _CALLER_KEYS})).hexdigest()
    slow = [directory / name for name in _SLOW_FILES if (directory / name).is_file()]
    if not slow:
        raise ValueError(f"{directory}: no tokenizer.json and none of {', '.join(_SLOW_FILES)}: not a model directory?")
    return hashlib.sha256(_canonical({file.name: file_sha256(file) for file in slow})).hexdigest()


def _special_tokens(directory: Path) -> dict[str, object]:
    path = directory / "tokenizer_config.json"
    content = _read_json(path) if path.is_file() else {}
    parts = {key: _token_text(content.get(key)) for key in _SPECIAL_KEYS}
    template = directory / "chat_template.jinja"
    parts["chat_template"] = template.read_text("utf-8") if template.is_file() else content.get("chat_template")
    return {key: value for key, value in parts.items() if value}  # an absent and an empty setting mean the same


def _token_text(token: object) -> object:
    """A special token stands as text, or as a table with its text under `content`."""
    if isinstance(token, list):
        return [_token_text(item) for item in token]
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download or save the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(content).__name__}")
    return content


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
