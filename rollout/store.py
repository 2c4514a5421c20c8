"""The rows that trained, on disk: rollouts/step_000001.parquet, one file per step, for people and for notebooks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.schema import Group
from core.whole_file import whole_file

FOLDER = "rollouts"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("slot", pa.int32()),  # position of the prompt inside the step
        ("sample", pa.int32()),
        ("source", pa.string()),  # "explorer" or "learner"
        ("prompt_uid", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),  # the gold answer
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # of the policy that sampled the row
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("finish", pa.string()),  # "stop" or "length"
        ("version", pa.int32()),  # optimizer steps behind the weights that sampled it; 0 for an explorer
        # Where weights changed on the way: (first token, version) of each stretch; empty where `version` made them all.
        ("spans", pa.list_(pa.struct([("first", pa.int32()), ("version", pa.int32())]))),
        ("worker", pa.string()),
    ]
)
# A dictionary of values that hardly ever repeat is written twice as slowly, and the file is a fifth larger.
REPEATED = ["source", "prompt_uid", "prompt", "answer", "finish", "worker"]


def write_rollouts(run_dir: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write the rows of one step, in the order of `groups`; an earlier file of that step (before a resume) is replaced.

    The file appears whole or not at all. Raises ValueError where a group belongs to another step.
    """
    strangers = {group.step for group in groups} - {step}
    if strangers:
        raise ValueError(
            f"rollouts of step {step} hold groups of steps {sorted(strangers)}: write each step to its file"
        )
    path = rollout_file(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        pq.write_table(_table(groups), partial, compression="zstd", use_dictionary=REPEATED)
    return path


def read_rollouts(run_dir: Path, step: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one step, or of all steps in order; `columns` reads only those.

    Raises FileNotFoundError for a step without a file. No files at all give an empty table.
    """
    steps = stored_steps(run_dir) if step is None else [step]
    names = list(columns) if columns is not None else SCHEMA.names
    tables = [pq.read_table(rollout_file(run_dir, number), columns=names) for number in steps]
    return pa.concat_tables([pa.schema([SCHEMA.field(name) for name in names]).empty_table(), *tables])


def stored_steps(run_dir: Path) -> list[int]:
    """Steps that have a file, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / FOLDER).glob("step_*.parquet"))


def cut_rollouts(run_dir: Path, last: int) -> None:
    """Delete the files of steps after `last`: a resumed run makes those steps again, or ends before them."""
    for step in stored_steps(run_dir):
        if step > last:
            rollout_file(run_dir, step).unlink()


def rollout_file(run_dir: Path, step: int) -> Path:
    """Where the rows of `step` stand."""
    return run_dir / FOLDER / f"step_{step:06d}.parquet"


def _table(groups: Sequence[Group]) -> pa.Table:
    pairs = [(group, place) for group in groups for place in range(len(group.rows))]
    scored = [group.rows[place] for group, place in pairs]
    completions = [row.completion for row in scored]
    columns = {
        "step": [group.step for group, _ in pairs],
        "slot": [group.slot for group, _ in pairs],
        "sample": [completion.key.sample for completion in completions],
        "source": [completion.key.source.value for completion in completions],
        "prompt_uid": [group.prompt.uid for group, _ in pairs],
        "prompt": [group.prompt.text for group, _ in pairs],
        "answer": [group.prompt.answer for group, _ in pairs],
        "text": [row.text for row in scored],
        "token_ids": _lists([completion.tokens for completion in completions], np.int32),
        "logprobs": _lists([completion.logprobs for completion in completions], np.float32),
        "reward": [row.reward for row in scored],
        "advantage": [group.advantages[place] for group, place in pairs],
        "finish": [completion.finish for completion in completions],
        "version": [completion.version for completion in completions],
        "spans": [[{"first": first, "version": version} for first, version in c.spans] for c in completions],
        "worker": [completion.worker for completion in completions],
    }
    return pa.table(columns, schema=SCHEMA)


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.ListArray:
    """One Arrow list per completion, without a Python object per token."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    values: np.ndarray = np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
