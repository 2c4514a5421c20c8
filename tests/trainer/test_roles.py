"""A whole run whose processes change roles."""

from pathlib import Path

import pytest
import run_parts
from run_parts import arguments, train_here

from rollout.store import read_rollouts
from trainer.session import Session
from trainer.tracer import read_trace


@pytest.mark.slow
def test_a_run_whose_processes_change_roles_trains_what_a_dedicated_one_trains(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lookahead 0: a lease's completions do not depend on who takes it, so the same bits come from either."""
    root = tmp_path_factory.getbasetemp()
    settings = {"algorithm__steps": 5, "data__eval": "", "rollout__lease_prompts": 2, "rollout__processes": 2}
    dedicated = train_here(arguments(root, tmp_path / "dedicated", **settings))
    handed = train_here(arguments(root, tmp_path / "handed", rollout__roles="handover", **settings))
    assert run_parts.weights_bytes(handed) == run_parts.weights_bytes(dedicated)
    assert run_parts.ledger(handed)["conserved"]
    rows = read_rollouts(handed, columns=["source", "worker", "step"]).to_pylist()
    workers = {
        source: {row["worker"].rpartition(".")[0] for row in rows if row["source"] == source}
        for source in ("explorer", "learner")
    }
    assert workers["learner"] <= {"learner-0", "learner-1", "explorer-0"}
    joins = "is gone: its process joins the learner's rollouts"
    joined = {line.partition(".")[0] for line in capfd.readouterr().out.splitlines() if joins in line}
    assert "explorer-0" in joined  # when its own work was done
    # learner-0 begins as what it is; either of the others may be up late and find the explorer's work done.
    assert workers["explorer"]
    assert workers["explorer"] <= {"explorer-0", "learner-1"}
    counters = [event for event in read_trace(handed) if event["ph"] == "C" and event["name"] == "learner workers"]
    assert [event["args"]["planned"] for event in counters] == [1, 1, 2, 2, 2]  # quotas 4+0, 3+1, 2+2, 0+4, 0+4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rollout__roles": "handover"}, {"explorer-0", "learner-0", "learner-1"}),
        ({"rollout__roles": "dedicated"}, {"learner-0", "learner-1"}),
    ],
)
def test_what_is_resumed_after_the_annealing_explores_no_more(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, settings: dict[str, str], expected: set[str]
) -> None:
    """Explorers would load a model for nothing, and under handover a second one before the next step could end."""
    base = {"algorithm__anneal_steps": 2, "data__eval": "", "rollout__lease_prompts": 2, "rollout__processes": 2}
    root = tmp_path_factory.getbasetemp()
    train_here(arguments(root, tmp_path, algorithm__steps=2, **base, **settings))
    joined: dict[str, str] = {}

    def look(session: Session, step: int) -> None:
        workers = session.stream.rollouts.pool.counters()["workers"]
        joined.update({name: worker["role"] for name, worker in workers.items()})

    def who() -> set[str]:
        return {name.partition(".")[0] for name in joined}

    def wait_for_all(session: Session, step: int) -> None:
        look(session, step)
        if step == 3:
            run_parts.eventually(lambda: look(session, step) or who() >= expected, "every process has joined")

    train_here([*arguments(root, tmp_path, algorithm__steps=4, **base, **settings), "--resume"], on_step=wait_for_all)
    assert who() == expected
    assert set(joined.values()) == {"learner"}
    assert len(joined) == len(expected), "nobody joined twice"
    assert run_parts.ledger(tmp_path)["conserved"]
