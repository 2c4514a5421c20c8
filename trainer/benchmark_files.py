"""Rows of a benchmark from the files it is published as: NAME.parquet, NAME.jsonl, or a folder NAME of such files."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl")


class Rows(NamedTuple):
    """Rows in the order of the files, and the files.

    Example: read_rows("aime25", Path("data"), part="test").rows[0]["problem"]
    """

    rows: list[dict[str, Any]]
    files: list[Path]


def read_rows(name: str, data: Path, *, part: str) -> Rows:
    """The rows of benchmark `name` below the directory `data`.

    A folder NAME may be a downloaded repository: of its parquet and jsonl files, those with `part` (a split or a
    configuration) in their path are read, in order of their names; all of them where none has it. Raises ValueError
    where there is no such file, or one that cannot be read.
    """
    if not data.is_dir():
        raise ValueError(f"--data {data}: there is no such directory; it holds {name}.parquet, {name}.jsonl or {name}/")
    places = places_of(name, data)
    if len(places) != 1:
        found = f"both {places[0].name} and {places[1].name}" if places else "nothing"
        raise ValueError(
            f"--data {data}: {name} needs one of {name}.parquet, {name}.jsonl or a folder {name}/, and {found} is there"
        )
    files = [places[0]] if places[0].is_file() else _files_below(places[0], part)
    return Rows([row for file in files for row in _rows(file)], files)


def places_of(name: str, data: Path) -> list[Path]:
    """The files NAME.parquet and NAME.jsonl and the folder NAME that are there."""
    places = [path for suffix in SUFFIXES if (path := data / f"{name}{suffix}").is_file()]
    return [*places, data / name] if (data / name).is_dir() else places


def _files_below(folder: Path, part: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no parquet or jsonl file: download the data set's files there")
    named = [file for file in files if part in str(file.relative_to(folder))]
    return named or files


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return _json_rows(file)
    try:
        # Pictures are not read: the answers of text-only problems do not need them.
        schema = pq.read_schema(file)
        names = [field.name for field in schema if not field.name.startswith("image")]
        rows: list[dict[str, Any]] = pq.read_table(file, columns=names).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file ({error})") from error
    return rows


def _json_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number} is no JSON object")
        rows.append(row)
    return rows
