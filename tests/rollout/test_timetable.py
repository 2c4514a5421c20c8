"""Learner processes explore while the learner owes little, and are back when it owes more."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.faults.parts import eventually, make_lease
from core.anneal import Quota, quota_at
from core.config import Algorithm, Config, Data, Explorer, Rollout
from core.schema import Source
from rollout.fingerprint import file_digest
from rollout.timetable import Timetable, learners_wanted


def timetable(evaluates="", roles="handover", explorers=1, learners=2, after=0, **algorithm):
    config = Config(
        algorithm=Algorithm(**({"steps": 20, "anneal_steps": 10} | algorithm)), data=Data(eval=evaluates),
        rollout=Rollout(processes=learners, roles=roles), explorer=Explorer(processes=explorers),
    )  # fmt: skip
    return Timetable(config, lambda step: quota_at(step, config.algorithm), after)


def test_each_process_is_back_for_the_first_step_that_needs_it():
    quotas = [quota_at(step, Algorithm(steps=20, anneal_steps=10)) for step in range(1, 11)]
    assert [quota.learner for quota in quotas] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert timetable().return_steps == (3, 5), "3 of 8 rows are more than one process of three makes"
    assert timetable(evaluates="embedded:countdown").return_steps == (1, 5)
    assert [timetable().learners(step) for step in (1, 2, 3, 4, 5, 20)] == [0, 0, 1, 1, 2, 2]
    assert timetable(schedule="constant", alpha=1.0).return_steps == (21, 21)
    assert timetable(anneal_steps=2).return_steps == (1, 1), "needed at step 2, they would go back at once"
    assert timetable(lookahead=1).return_steps == (1, 5), "steps 1 and 2 are asked for together"
    assert timetable(lookahead=3).return_steps == (1, 1)
    for same in ({"roles": "dedicated"}, {"explorers": 0}, {"anneal_steps": 0}):
        assert timetable(**same).return_steps == (1, 1)
        assert timetable(**same).line() == ""


def test_a_process_goes_back_a_step_early_and_once():
    plan = timetable(evaluates="embedded:countdown")
    assert plan.line().endswith("learner-1 until step 4")
    assert [plan.first_role(index) for index in (0, 1)] == [None, Source.EXPLORER]
    assert [plan.due(step) for step in (1, 2, 3, 4, 4, 5)] == [(), (), (), ("learner-1",), (), ()]


@pytest.mark.parametrize(
    ("after", "away"), [(0, {0: 3, 1: 5}), (1, {1: 5}), (2, {1: 5}), (3, {}), (4, {}), (9, {}), (15, {}), (20, {})]
)
def test_a_resumed_run_is_planned_from_the_step_it_continues_from(after, away):
    """A process that the next two steps need begins as the learner worker that it would become; after T_mix all do."""
    plan = timetable(after=after)
    assert plan.return_steps == tuple(away.get(index, 1) for index in (0, 1))
    assert [plan.first_role(index) for index in (0, 1)] == [Source.EXPLORER if i in away else None for i in (0, 1)]
    assert plan.due(after + 1) == (), "nobody changes back at once"


@given(st.integers(0, 16), st.integers(0, 16), st.integers(1, 8), st.integers(1, 8))
def test_what_is_owed_always_has_a_process(explorer, learner, explorers, learners):
    wanted = learners_wanted(Quota(explorer, learner), explorers, learners)
    assert (wanted > 0) == (learner > 0)
    assert wanted <= learners
    if learner and not explorer:
        assert wanted == learners


@pytest.mark.parametrize("killed", [False, True])
def test_a_learner_process_explores_until_it_is_named(make_pool, sink, model: Path, monkeypatch, killed):
    monkeypatch.setenv("QUICK_PACE_S", "0.02")
    pool = make_pool()
    weights = model / "model.safetensors"
    pool.publish_weights(2, weights, file_digest(weights))
    pool.spawn(Source.LEARNER, 1, first=Source.EXPLORER)
    pool.submit([make_lease(step=step) for step in (1, 2, 3, 4)])
    sink.wait(1, pool.check)
    pool.hand_over("learner-1")
    if killed:
        (worker,) = pool.counters()["workers"].values()
        import os
        import signal

        os.kill(worker["pid"], signal.SIGKILL)
    pool.submit([make_lease(source=Source.LEARNER, step=3, version=2)])
    eventually(lambda: any(row.key.source is Source.LEARNER for row in sink.completions), "learner rows")
    rows = list(sink.completions)
    assert {row.worker.rpartition(".")[0] for row in rows} == {"learner-1"}
    assert {row.version for row in rows if row.key.source is Source.EXPLORER} <= {0}
    explored = {row.key.step for row in rows if row.key.source is Source.EXPLORER}
    assert explored <= {1, 2}, "it held two leases, and got no more"
    roles = [worker["role"] for worker in pool.counters()["workers"].values()]
    assert roles[-1] == "learner"
    pool.spawn(Source.EXPLORER, 0)
    sink.wait(5 * 16, pool.check)
    assert pool.counters()["balanced"]
