"""Whether a Hugging Face directory is whole, found from its files' names, sizes and headers: no weight is read."""

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from rollout.fingerprint import TOKENIZER_FILES
from rollout.torch_weights import AGAIN, read_object, weight_files

CONFIG = "config.json"
_SIZE_BYTES = 8  # a safetensors file begins with its header's length, little-endian


def check_model_files(directory: Path, key: str) -> None:
    """Raise ValueError, naming the setting `key`, unless weights, configuration and tokenizer are there and whole."""
    read_config(directory, key)
    files = weight_files(directory, named=_named(directory, key))
    try:
        for file in files:
            _check_size(file)
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"no tokenizer there (none of {', '.join(TOKENIZER_FILES)}): {AGAIN}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{_named(directory, key)}: {error}") from error


def read_config(directory: Path, key: str) -> PretrainedConfig:
    """The directory's configuration; ValueError, naming the setting `key`, where there is none that is valid."""
    where = _named(directory, key)
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{where}: no Hugging Face model directory there (no {CONFIG}): {AGAIN}")
    content = read_object(file, where)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has classes of its own for what a configuration can be wrong about
        remedy = f"{AGAIN}, or a transformers that knows it"
        if "auto_map" in content:
            remedy = (
                "it has code of its own, which nothing here runs: convert it, as docs/install.md does for InternLM2.5"
            )
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: {CONFIG} cannot be used ({text}): {remedy}") from error


def _named(directory: Path, key: str) -> str:
    return f'{key} = "{directory}"'


def _check_size(file: Path) -> None:
    """Refuse a file that is not as long as its header says."""
    found = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_SIZE_BYTES), "little")
        header = stream.read(length) if _SIZE_BYTES + length <= found else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        expected = _SIZE_BYTES + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{file.name} has no readable safetensors header ({found:,} bytes): {AGAIN}") from None
    if expected != found:
        raise ValueError(f"{file.name} has {found:,} bytes and its header says {expected:,}: {AGAIN}")
