"""How much a prompt's completions differ, and how often some are right: `python -m trainer.diversity RUN_OR_FILE…`.

It reads runs (their rollouts), directories of trainer.evaluate, explorer stores, and parquet files with their columns.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from core.diversity import Sample, group_diversity, without_answers
from core.metrics import CORRECT_ABOVE
from rollout.store import FOLDER, rollout_file, stored_steps
from trainer.command import BAD_INPUT, OK, complain
from trainer.evaluate import pass_at

COLUMNS = ("source", "step", "prompt_uid", "sample", "number", "text", "token_ids", "reward")
METRICS = ("self_bleu", "edit_diversity", "unique_answer_ratio")


class Row(NamedTuple):
    """One stored completion; `correct` is None where it was not scored.

    Example: Row(sample=Sample("9 - 5 = 4 , ...", [11, 53]), correct=True)
    """

    sample: Sample
    correct: bool | None


Groups = dict[str, list[list[Row]]]  # per source, the completions of each prompt (and step)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.rows < 2 or options.groups < 0:
            raise ValueError(f"--rows {options.rows} must be at least 2, --groups {options.groups} at least 0")
        results = [
            {"of": str(place), "source": source, **measure(groups, rows=options.rows, limit=options.groups)}
            for place in options.places
            for source, groups in read_groups(place).items()
        ]
        if options.out:
            options.out.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    except (ValueError, OSError) as error:
        return complain(str(error), BAD_INPUT)
    print(table(results))
    print(f"diversity: of the first {options.rows} completions of a prompt; pass@k: per cent (groups of k or more)")
    return OK


def measure(groups: Sequence[Sequence[Row]], *, rows: int, limit: int) -> dict[str, Any]:
    """Counts, the metrics of `core.diversity.group_diversity`, and the pass@k curve of scored completions.

    `pass@k` for k = 1, 2, 4, … up to the largest group: mean, standard error, and of how many groups (those with at
    least k completions, which under an annealed quota are those of some steps only).
    """
    whole = without_answers(row.sample.text for group in groups for row in group)
    samples = [[row.sample for row in group] for group in groups]
    found: dict[str, Any] = {"groups": len(groups), "completions": sum(map(len, groups))}
    found |= group_diversity(samples, rows=rows, limit=limit, self_bleu_limit=limit, whole_texts=whole)
    scored = [[row.correct for row in group if row.correct is not None] for group in groups]
    sizes, correct = [len(group) for group in scored], [sum(group) for group in scored]
    curve = {}
    for power in range(max(sizes, default=0).bit_length()):
        estimate = pass_at(sizes, correct, 2**power)
        if estimate is not None:
            curve[2**power] = {**estimate._asdict(), "groups": sum(size >= 2**power for size in sizes)}
    return {**found, "pass@k": curve}


def read_groups(place: Path) -> Groups:
    """The completions in a run directory, a directory of parquet files or one file, by source and prompt.

    Raises ValueError where there are none or a file lacks the columns.
    """
    groups: dict[str, dict[tuple[Any, ...], list[tuple[int, Row]]]] = defaultdict(lambda: defaultdict(list))
    for file in _files(place):
        for source, key, order, row in _rows(file, place):
            groups[source][key].append((order, row))
    if not groups:
        raise ValueError(f"{place} holds no completions")
    return {
        source: [[row for _, row in sorted(group, key=lambda pair: pair[0])] for group in by_prompt.values()]
        for source, by_prompt in groups.items()
    }


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"{place}: no such file or directory")
    found = [rollout_file(place, step) for step in stored_steps(place)] or sorted(place.glob("*.parquet"))
    if not found:
        raise ValueError(f"{place} has no {FOLDER}/*.parquet and no *.parquet: give a run, an evaluation or a store")
    return found


def _rows(file: Path, place: Path) -> Iterator[tuple[str, tuple[Any, ...], int, Row]]:
    """Of each completion: its source, the key of its group, its place in it, and itself."""
    try:
        names = [name for name in COLUMNS if name in pq.read_schema(file).names]
        table = pq.read_table(file, columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    if "prompt_uid" not in names or not {"text", "token_ids"} & set(names):
        found = ", ".join(names) or "none of them"
        raise ValueError(f"{file} needs the columns prompt_uid and text or token_ids, and has {found}")
    # Files of an evaluation are benchmarks of one model; those of a run or a store are parts of one whole.
    label = f"{file.stem}: " if "step" not in names and "number" not in names else ""
    for index, row in enumerate(table.to_pylist()):
        text, reward = row.get("text"), row.get("reward")
        ids = row["token_ids"] if "token_ids" in row else [ord(letter) for letter in text]
        # A store keeps token ids only: they are the words of its completions.
        sample = Sample(" ".join(map(str, ids)) if text is None else text, ids)
        yield (
            f"{label}{row.get('source', place.resolve().name)}",
            (row.get("step", 0), row["prompt_uid"]),
            row.get("sample", row.get("number", index)),
            Row(sample, None if reward is None else reward > CORRECT_ABOVE),
        )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per source."""
    ks = sorted({k for result in results for k in result["pass@k"]})
    heads = ["of", "source", "groups", "Self-BLEU", "edit", "unique", *(f"pass@{k}" for k in ks)]
    lines = [heads]
    for result in results:
        spread = [f"{result[name]:.3f}" if name in result else "-" for name in METRICS]
        curve = [_cell(result["pass@k"].get(k)) for k in ks]
        lines.append([result["of"], result["source"], str(result["groups"]), *spread, *curve])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate['mean']:.1f} ± {196 * estimate['stderr']:.1f} ({estimate['groups']})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.diversity", description=__doc__)
    add = parser.add_argument
    add("places", nargs="+", type=Path, metavar="RUN_OR_FILE", help="run, evaluation or store, or parquet file")
    add("--rows", type=int, default=4, help="completions compared per prompt; prompts with fewer are left out (4)")
    add("--groups", type=int, default=256, help="at most so many prompts, evenly spaced; 0 is all (256)")
    add("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
