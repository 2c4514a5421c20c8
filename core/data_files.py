"""Files of questions, parquet or jsonl, as batches of named columns; what is wrong with one is said with its key."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8192


class DataFile(NamedTuple):
    """An open file. `key` is the setting that names it, such as data.train; `batches(names)` reads those columns.

    Example: open_data("data.train", "dapo.parquet").column("data.prompt_column", "auto", ("prompt", "problem"))
    """

    key: str
    name: str
    schema: "pa.Schema"
    batches: Callable[[Sequence[str]], Iterator["pa.RecordBatch"]]

    def column(self, key: str, wanted: str, candidates: Sequence[str]) -> str:
        """The dotted path of a column that is there: `wanted`, or the first of the candidates where that is "auto".

        Raises ValueError, naming `key` and the columns there are, where there is none.
        """
        paths = _paths(self.schema, "")
        for path in candidates if wanted == "auto" else (wanted,):
            if path in paths:
                return path
        columns = f"columns of {self.name}: {', '.join(paths)}"
        if wanted == "auto":
            raise ValueError(f"{key}: none of {', '.join(candidates)} is there; set {key}; {columns}")
        near = difflib.get_close_matches(wanted, paths, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise ValueError(f'{key} = "{wanted}" is not there{hint} ({columns})')

    def unfit(self, path: str, kind: object, wanted: str, key: str) -> ValueError:
        """The error of a column whose type is not what is wanted; `key` is the setting that chose it."""
        return ValueError(
            f'{self.key} = "{self.name}": column {path} has type {kind}: {wanted}; choose another column with {key}'
        )


def open_data(key: str, name: str) -> DataFile:
    """Open what the setting `key` names. Raises ValueError where it is missing, or neither parquet nor jsonl."""
    path = Path(name).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f'{key} = "{name}" {found}; give a parquet file, a .jsonl file or "embedded:countdown"')
    return _open_lines(key, name, path) if path.suffix == ".jsonl" else _open_parquet(key, name, path)


def _open_parquet(key: str, name: str, path: Path) -> DataFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f'{key} = "{name}" is not a parquet file ({error}); a file of JSON lines is named .jsonl'
        ) from error
    return DataFile(
        key, name, file.schema_arrow, lambda names: file.iter_batches(batch_size=BATCH_ROWS, columns=list(names))
    )


def _open_lines(key: str, name: str, path: Path) -> DataFile:
    import pyarrow as pa

    tables, rows = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(line, number))
                if len(rows) == BATCH_ROWS:
                    tables.append(_table(rows))
                    rows = []
        tables.append(_table(rows))
        # A column may be null, or hold whole numbers only, in one part of the file and not in another.
        table = pa.concat_tables(tables, promote_options="permissive")
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f'{key} = "{name}": {error}') from error
    return DataFile(key, name, table.schema, lambda names: iter(table.select(names).to_batches(BATCH_ROWS)))


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"line {number} is no JSON object: {error}") from error


def _table(rows: list[dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise ValueError(f"the values of column {name} are not of one type ({error}); write them alike") from error
    return pa.table(columns)


def _paths(fields: "pa.Schema | pa.StructType", prefix: str) -> list[str]:
    import pyarrow as pa

    found = []
    for field in fields:
        found.append(prefix + field.name)
        if pa.types.is_struct(field.type):
            found += _paths(field.type, f"{prefix}{field.name}.")
    return found
