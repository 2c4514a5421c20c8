"""What a model answered to a benchmark, on disk: written as it is drawn, so that a killed evaluation continues."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from core.schema import CompletionKey, Prompt, Source
from core.seeds import completion_seed
from core.whole_file import whole_file
from rollout.engine import Engine, Request
from trainer.penalty import PenalisedSampling

SETTINGS_FILE = "settings.json"
FILE_ROWS = 512
SCHEMA = pa.schema(
    [
        ("prompt_uid", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish", pa.string()),  # "stop" or "length"
    ]
)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides a benchmark's completions but how many there are. Fingerprints are SHA-256 (hex).

    Example: Settings(benchmark="aime24", model="3f6c…", prompts="91ab…", sampling=..., seed=0, engine="vllm", ...)
    """

    benchmark: str
    model: str
    prompts: str  # prompts_fingerprint
    sampling: PenalisedSampling
    seed: int
    engine: str
    dtype: str


class Generation(NamedTuple):
    """One completion: sample number `sample` of a problem.

    Example: Generation("7f3a", 0, text="9 - 5 = 4 , ...", token_ids=[11, 53], finish="stop")
    """

    prompt_uid: str
    sample: int
    text: str
    token_ids: Sequence[int]
    finish: str


class Generations:
    """The completions of one benchmark in one directory. Files appear whole or not at all and are never changed.

    Raises ValueError where the directory holds completions of other settings, or a file that cannot be read.

    Example: kept = Generations(Path("out/aime24"), settings); kept.missing(prompts, samples=16)
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        _claim(directory / SETTINGS_FILE, settings)
        self._rows = {(row.prompt_uid, row.sample): row for row in read_generations(directory)}

    def missing(self, prompts: Sequence[Prompt], samples: int) -> list[tuple[int, int]]:
        """(place of the prompt, sample) of the completions that are not there yet, in order."""
        return [
            (place, sample)
            for place, prompt in enumerate(prompts)
            for sample in range(samples)
            if (prompt.uid, sample) not in self._rows
        ]

    def add(self, rows: Sequence[Generation]) -> None:
        """Write one file."""
        names = "\n".join(f"{row.prompt_uid}/{row.sample}" for row in rows)
        path = self.directory / f"{hashlib.blake2b(names.encode(), digest_size=12).hexdigest()}.parquet"
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in SCHEMA}
        write_whole(path, pa.table(columns, schema=SCHEMA))
        self._rows |= {(row.prompt_uid, row.sample): row for row in rows}

    def of(self, prompts: Sequence[Prompt], samples: int) -> list[list[Generation]]:
        """The completions of each prompt, by sample; all must be there."""
        return [[self._rows[prompt.uid, sample] for sample in range(samples)] for prompt in prompts]


def draw(
    engine: Engine,
    prompts: Sequence[Prompt],
    kept: Generations,
    settings: Settings,
    *,
    samples: int,
    batch_rows: int,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int, int], None],
) -> None:
    """Generate what is missing, `batch_rows` completions at a time, and keep it.

    The seeds are those of the evaluation that a run of this seed makes before it trains.
    `on_progress(done, wanted)` counts completions.
    """
    missing = kept.missing(prompts, samples)
    wanted = len(prompts) * samples
    done = wanted - len(missing)
    for first in range(0, len(missing), batch_rows):
        numbers: dict[int, list[int]] = {}
        for place, sample in missing[first : first + batch_rows]:
            numbers.setdefault(place, []).append(sample)
        places = list(numbers)
        requests = [
            Request(prompts[place].token_ids, [_seed(settings.seed, place, sample) for sample in numbers[place]])
            for place in places
        ]
        rows: list[Generation] = []
        for drawn in engine.generate(requests, settings.sampling):
            place, ids = places[drawn.request], drawn.token_ids.tolist()
            sample = numbers[place][drawn.sample]
            rows.append(Generation(prompts[place].uid, sample, decode(ids), ids, drawn.finish))
            done += 1
            if len(rows) == FILE_ROWS:
                kept.add(rows)
                rows = []
                on_progress(done, wanted)
        if rows:
            kept.add(rows)
        on_progress(done, wanted)


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 (hex) over the token ids and gold answers of all problems."""
    return hashlib.sha256(msgspec.json.encode([(p.uid, p.token_ids, p.answer, p.columns) for p in prompts])).hexdigest()


def read_generations(directory: Path) -> list[Generation]:
    """Every completion kept in a directory. ValueError for a file that cannot be read."""
    rows: list[Generation] = []
    for file in sorted(directory.glob("*.parquet")):
        try:
            table = pq.read_table(file, columns=SCHEMA.names)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}); delete it: it is made again") from error
        rows += map(Generation, *(table[name].to_pylist() for name in SCHEMA.names))
    return rows


def write_whole(path: Path, table: pa.Table) -> None:
    """Write a parquet file that appears whole or not at all."""
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _seed(seed: int, place: int, sample: int) -> int:
    key = CompletionKey(source=Source.LEARNER, step=0, slot=place, sample=sample)
    return completion_seed(seed, "eval", key)


def _claim(file: Path, settings: Settings) -> None:
    """Write the settings of an empty directory; refuse those of another evaluation."""
    if not file.exists():
        with whole_file(file) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")
    try:
        theirs = msgspec.json.decode(file.read_bytes(), type=Settings)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file} cannot be read ({error}): use another --out") from error
    differences = [
        f"their {name} is {getattr(theirs, name)!r}, now it is {getattr(settings, name)!r}"
        for name in Settings.__struct_fields__
        if getattr(theirs, name) != getattr(settings, name)
    ]
    if differences:
        raise ValueError(
            f"{file.parent} holds completions of other settings: {'; '.join(differences)}. "
            "Use another --out, or the settings that it was begun with"
        )
