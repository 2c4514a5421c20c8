"""Explorer completions kept for other runs: a directory of parquet files and the identity of what sampled them.

A completion is known by its prompt and its number (docs/store.md), and its seed is a function of the two. So the store
of a given identity has only one content, whichever runs fill it and in whatever order.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.schema import Sampling
from core.seeds import recorded_seed
from core.storefolder import IDENTITY_FILE, folder_problem, made_by_store
from core.whole_file import whole_file

FORMAT = 1
SCHEMA = pa.schema(
    [
        ("prompt_uid", pa.string()),
        ("number", pa.int64()),
        ("seed", pa.uint64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # log μ of the kind that the identity's sampling names
        ("finish", pa.string()),  # "stop" or "length"
    ]
)
_OPEN_FILES = 8


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What sampled every completion of a store, and what their prompts were made with; fingerprints are SHA-256 (hex).

    Example: Identity(model="3f6c…", tokenizer="91ab…", template="chat", suffix="", sampling=Sampling(...))
    """

    format: int = FORMAT
    model: str
    tokenizer: str  # with its chat template
    template: str
    suffix: str
    sampling: Sampling


class Recorded(NamedTuple):
    """One completion on record; arrays as in core.schema.Completion.

    Example: Recorded("7f3a", number=0, tokens=np.int32([5, 1]), logprobs=np.float32([-1.2, 0]), finish="stop")
    """

    prompt_uid: str
    number: int
    tokens: np.ndarray  # int32 [L]
    logprobs: np.ndarray  # float32 [L]
    finish: str


class CompletionStore:
    """Completions by (prompt uid, number). Files are written whole and never changed, so that runs may share a store.

    What other runs add after this one opened the store is not seen.

    Raises ValueError where the directory holds other files and is no store, or cannot be written; where the store holds
    completions of another identity, or a file that cannot be read.

    Example: store = CompletionStore(Path("stores/countdown"), identity); ("7f3a", 0) in store
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self.directory, self.identity = directory, identity
        if problem := folder_problem(directory):
            raise ValueError(problem)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _claim(directory / IDENTITY_FILE, identity)
        except OSError as error:
            raise ValueError(f"explorer.store: {error}: choose another folder") from error
        self._places: dict[tuple[str, int], tuple[Path, int]] = {}
        self._tables: OrderedDict[Path, pa.Table] = OrderedDict()
        for file in sorted(directory.glob("*.parquet")):
            keys = _read(file, ["prompt_uid", "number"])
            pairs = zip(keys["prompt_uid"].to_pylist(), keys["number"].to_pylist())
            self._places |= {pair: (file, row) for row, pair in enumerate(pairs)}

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, prompt_uid: str, number: int) -> Recorded:
        """A completion that the store had when it was opened."""
        file, row = self._places[prompt_uid, number]
        table = self._table(file)
        return Recorded(
            prompt_uid,
            number,
            table["token_ids"][row].values.to_numpy(),
            table["logprobs"][row].values.to_numpy(),
            table["finish"][row].as_py(),
        )

    def add(self, rows: Sequence[Recorded]) -> Path:
        """Write one file, named by what it holds: the same completions recorded twice are one file."""
        names = "\n".join(f"{row.prompt_uid}/{row.number}" for row in rows)
        path = self.directory / f"{hashlib.blake2b(names.encode(), digest_size=12).hexdigest()}.parquet"
        with whole_file(path) as partial:
            pq.write_table(_to_table(rows), partial, compression="zstd")
        return path

    def _table(self, file: Path) -> pa.Table:
        table = self._tables.pop(file, None)
        self._tables[file] = _read(file) if table is None else table
        if len(self._tables) > _OPEN_FILES:
            self._tables.popitem(last=False)
        return self._tables[file]


def _claim(file: Path, identity: Identity) -> None:
    """Write the identity of an empty store; refuse a store of another."""
    if not file.exists():
        with whole_file(file) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(identity), indent=2))
    try:
        theirs = msgspec.json.decode(file.read_bytes(), type=Identity)
    except msgspec.DecodeError as error:
        raise ValueError(f"explorer.store: {file} cannot be read ({error}): use another directory") from error
    differences = [
        f"its {name} is {getattr(theirs, name)!r}, this run's is {getattr(identity, name)!r}"
        for name in Identity.__struct_fields__
        if getattr(theirs, name) != getattr(identity, name)
    ]
    if differences:
        raise ValueError(
            f"explorer.store = {str(file.parent)!r} holds completions that this run's explorer would not make: "
            f"{'; '.join(differences)}. Use another directory, or the settings that filled this one"
        )


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        table = pq.read_table(file, columns=columns or SCHEMA.names)
    except (pa.ArrowInvalid, OSError) as error:
        if not made_by_store(file.name):
            raise ValueError(f"explorer.store: {file} is no file that a store writes: move it out of there") from error
        raise ValueError(f"explorer.store: {file} cannot be read ({error}); delete it: it is made again") from error
    return table.combine_chunks()


def _to_table(rows: Sequence[Recorded]) -> pa.Table:
    columns = {
        "prompt_uid": [row.prompt_uid for row in rows],
        "number": [row.number for row in rows],
        "seed": pa.array([recorded_seed(row.prompt_uid, row.number) for row in rows], pa.uint64()),
        "token_ids": [row.tokens for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "finish": [row.finish for row in rows],
    }
    return pa.table(columns, schema=SCHEMA)
