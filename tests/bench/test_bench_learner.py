"""The cases of bench.learner train the same rows to the same loss, so their speeds can be compared."""

import pytest
import torch

from bench.kernel_times import phases, shares
from bench.learner import CASES, learner_step, make_config, make_groups, make_model, plain_step
from trainer.batch import pack_step
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, "tiny")
    found = {}
    for name in ("plain hugging face", "torch padded", "torch packed"):
        config = make_config(CASES[name], "tiny")
        step = learner_step if CASES[name] else plain_step
        case = step(config, directory, pack_step(make_groups("tiny"), config), WORLD)
        found[name] = [case.run() for _ in range(3)]
    return found


def test_every_case_makes_the_same_updates(losses):
    first, *others = losses.values()
    assert len(set(first)) == 3
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


def test_an_update_is_taken_apart_and_put_together_again(tmp_path):
    make_model(tmp_path, "tiny")
    config = make_config(CASES["torch packed"], "tiny")
    case = learner_step(config, tmp_path, pack_step(make_groups("tiny"), config), WORLD)
    methods = {name: getattr(case.backend, name) for name in ("forward", "backward", "step")}
    found = {row["phase"]: row for row in phases(case.run, case.backend)}
    assert set(found) == {"forward", "backward", "optimizer", "other"}
    assert sum(row["share"] for row in found.values()) == pytest.approx(1)
    assert all(row["s"] > 0 for row in found.values())
    assert {name: getattr(case.backend, name) for name in methods} == methods
    spent = shares(case.run)
    assert sum(row["share"] for row in spent) <= 1
    assert any("mm" in row["kernel"] for row in spent)


def test_packed_cases_have_no_padding():
    slots = {
        name: sum(
            micro.inputs["input_ids"].numel()
            for micro in pack_step(make_groups("tiny"), config).mini_batches[0].micro_batches
        )
        for name in ("torch padded", "torch packed", "torch packed, prompts shared")
        for config in [make_config(CASES[name], "tiny")]
    }
    rows = [len(g.prompt.token_ids) + len(row.completion.tokens) - 1 for g in make_groups("tiny") for row in g.rows]
    assert slots["torch packed, prompts shared"] < slots["torch packed"] == sum(rows) < slots["torch padded"]
