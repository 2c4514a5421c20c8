"""Runs that share a store of explorer completions."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_parts
from run_parts import arguments, train_here

from core.configkeys import ConfigError
from rollout.store import read_rollouts

OWED = 8 * (4 + 2)  # explorer completions of three steps, annealed over three
SETTINGS = {"algorithm__steps": 3, "algorithm__anneal_steps": 3, "data__eval": ""}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def content(store: Path) -> dict[tuple[str, int], tuple[object, ...]]:
    table = pa.concat_tables([pq.read_table(file) for file in store.glob("*.parquet")]).to_pylist()
    return {
        (row["prompt_uid"], row["number"]): (tuple(row["token_ids"]), tuple(row["logprobs"]), row["finish"])
        for row in table
    }


@pytest.mark.slow
def test_a_store_filled_without_a_learner_gives_the_run_that_generates(root: Path, tmp_path: Path) -> None:
    store, recorded = tmp_path / "store", tmp_path / "recorded"
    first = train_here(arguments(root, tmp_path / "first", explorer__store=store, **SETTINGS))
    account = run_parts.ledger(first)
    assert account["conserved"]
    assert (account["explorer"]["produced"], account["explorer"]["reused"]) == (OWED, 0)
    assert run_parts.training_lines(first)[-1]["store/generated"] == OWED

    words = arguments(root, tmp_path / "unused", **SETTINGS)
    command = [sys.executable, "-m", "rollout.explorer", "--record", str(recorded), *words]
    done = subprocess.run(
        command, cwd=run_parts.REPOSITORY, env=run_parts.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"0 of {OWED} completions are on record" in done.stdout
    assert content(recorded) == content(store)

    second = train_here(arguments(root, tmp_path / "second", explorer__store=recorded, **SETTINGS))
    assert run_parts.weights_bytes(second) == run_parts.weights_bytes(first)
    account = run_parts.ledger(second)
    assert account["conserved"]
    assert (account["explorer"]["produced"], account["explorer"]["reused"]) == (OWED, OWED)
    assert not (second / "logs" / "explorer-0.log").exists()  # nothing was missing: none was started
    rows = read_rollouts(second, columns=["source", "worker"]).to_pylist()
    assert {row["worker"] for row in rows if row["source"] == "explorer"} == {"store"}

    lines = run_parts.training_lines(second)
    assert (lines[-1]["store/reused"], lines[-1]["store/generated"]) == (OWED, 0)

    with pytest.raises(ConfigError, match=r"temperature=1.0.*temperature=0.7"):
        train_here(arguments(root, tmp_path / "third", explorer__store=store, explorer__temperature=0.7, **SETTINGS))


@pytest.mark.slow
def test_a_resumed_run_counts_on(root: Path, tmp_path: Path) -> None:
    short = SETTINGS | {"algorithm__steps": 2, "algorithm__anneal_steps": 2, "explorer__store": tmp_path / "store"}
    train_here(arguments(root, tmp_path / "fills", **short))
    run = train_here(arguments(root, tmp_path / "reads", **short))
    train_here([*arguments(root, run, **short | {"algorithm__steps": 3}), "--resume"])
    counts = [(line["step"], line["store/reused"], line["store/generated"]) for line in run_parts.training_lines(run)]
    assert counts == [(step, 8 * 4, 0) for step in (1, 2, 3)]


@pytest.mark.slow
def test_another_learner_with_larger_groups_generates_only_the_difference(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    train_here(arguments(root, tmp_path / "first", explorer__store=store, **SETTINGS))
    wider = SETTINGS | {"algorithm__group_size": 6}
    other = run_parts.tiny_family(root).explorer  # another learner of the family, with the same tokenizer
    second = train_here(arguments(root, tmp_path / "second", explorer__store=store, learner__model=other, **wider))
    account = run_parts.ledger(second)
    assert account["conserved"]
    assert (account["explorer"]["produced"], account["explorer"]["reused"]) == (8 * (6 + 3), OWED)
    assert len(content(store)) == 8 * (6 + 3)
