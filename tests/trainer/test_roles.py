"""A whole run whose explorers are handed over."""

from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, train_here

from rollout.store import read_rollouts


@pytest.mark.slow
def test_a_run_that_hands_its_explorer_over_trains_what_a_dedicated_one_trains(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Lookahead 0: a lease's completions do not depend on who takes it, so the same bits come from either."""
    root = tmp_path_factory.getbasetemp()
    settings = {"algorithm__steps": 5, "algorithm__anneal_steps": 2, "data__eval": "", "rollout__lease_prompts": 2}
    dedicated = train_here(arguments(root, tmp_path / "dedicated", **settings))
    handed = train_here(arguments(root, tmp_path / "handed", rollout__roles="handover", **settings))
    assert run_parts.weights_bytes(handed) == run_parts.weights_bytes(dedicated)
    assert run_parts.ledger(handed)["conserved"]
    rows = read_rollouts(handed, columns=["source", "worker", "step"]).to_pylist()
    workers = {row["worker"].rpartition(".")[0] for row in rows if row["source"] == "learner"}
    assert workers == {"learner-0", "explorer-0"}
    assert {row["worker"].rpartition(".")[0] for row in rows if row["source"] == "explorer"} == {"explorer-0"}
