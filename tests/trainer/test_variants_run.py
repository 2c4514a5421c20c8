"""Algorithm variants by configuration: whole short runs for what asks for other rows, one learner for other losses."""

import math
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest
import run_parts
import torch
from run_parts import arguments, train_here

from core.config import Config
from core.configfile import parse_command
from core.schema import Group, Source
from rollout.store import read_rollouts
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def recorded(root: Path) -> list[list[Group]]:
    """Groups of a run's three steps (2 + 2 rows of each source), and the run itself: small-only at half strength."""
    steps: list[list[Group]] = []
    train_here(
        arguments(
            root, root / "recorded", algorithm__schedule="constant", algorithm__alpha=0.5, algorithm__steps=3,
            data__eval="",
        ),
        on_step=lambda session, step: steps.append(list(session.updates.groups)),
    )  # fmt: skip
    return steps


@pytest.mark.slow
def test_constant_keeps_its_share_at_every_step(recorded: list[list[Group]], root: Path) -> None:
    assert [run_parts.group_counts(root / "recorded", step) for step in (1, 2, 3)] == [{(2, 2)}] * 3
    assert len(recorded) == 3
    assert run_parts.evaluation_lines(root / "recorded") == []  # data.eval is empty


@pytest.mark.slow
def test_abrupt_with_a_hot_learner_and_a_sequence_ratio(root: Path, tmp_path: Path) -> None:
    run_dir = train_here(arguments(
        root, tmp_path / "run", algorithm__schedule="abrupt", algorithm__anneal_steps=1, algorithm__steps=2,
        rollout__temperature=1.5, loss__ratio="sequence", loss__aggregation="dr_grpo", algorithm__epochs=2,
        data__eval="",
    ))  # fmt: skip
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2)] == [{(4, 0)}, {(0, 4)}]
    line = run_parts.training_lines(run_dir)[1]
    # Trained at the temperature it sampled at: the engine's log-probs are the learner's.
    assert line["sampling/sampling_logp_difference/max"] < 1e-3
    assert line["learner/ratio_mean"] == 1.0
    assert line["grad_norm"] > 0


@pytest.mark.slow
def test_rescue_replaces_learner_rows_of_failed_groups_only(root: Path, tmp_path: Path) -> None:
    run_dir = train_here(arguments(
        root, tmp_path / "run", algorithm__mixing="rescue", algorithm__rescue_quota=3, algorithm__steps=2,
        reward__function="run_rewards:rare", data__eval="", algorithm__prompts_per_step=16,
    ))  # fmt: skip
    groups: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for row in read_rollouts(run_dir, columns=["step", "slot", "source", "reward"]).to_pylist():
        groups[row["step"], row["slot"]].append(row)
    assert len(groups) == 32
    rescued = 0
    for rows in groups.values():
        assert len(rows) == 4
        explorer = [row for row in rows if row["source"] == "explorer"]
        learner = [row for row in rows if row["source"] == "learner"]
        assert all(row["reward"] > 0 for row in explorer)
        assert not (explorer and any(row["reward"] > 0 for row in learner))
        rescued += len(explorer)
    assert rescued > 0
    report = run_parts.ledger(run_dir)
    assert report["conserved"]
    assert report["explorer"]["trained"] == report["learner"]["dropped"]["rescued"] == rescued
    assert report["explorer"]["dropped"] == {"spare": 2 * 16 * 3 - rescued}


@pytest.mark.slow
def test_plain_grpo_starts_no_explorer_and_needs_no_explorer_model(root: Path, tmp_path: Path) -> None:
    words = arguments(root, tmp_path / "run", algorithm__anneal_steps=0, algorithm__steps=2, data__eval="")
    run_dir = train_here([*words, "explorer.model=/nowhere"])
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2)] == [{(0, 4)}] * 2
    assert sorted(file.name for file in (run_dir / "logs").glob("*.log")) == ["learner-0.log"]


@pytest.mark.slow
def test_a_mixture_needs_both_policies_and_source_baselines_leave_explorer_rows_out(root: Path, tmp_path: Path) -> None:
    run_dir = train_here(arguments(
        root, tmp_path / "run", algorithm__baseline="source", algorithm__steps=2, algorithm__anneal_steps=2,
        algorithm__schedule="constant", algorithm__alpha=0.5, correction__learner__weight="mixture",
        correction__explorer__weight="mixture", correction__explorer__anchor="learner", data__eval="",
        algorithm__advantage_scale="none", explorer__temperature=0.8,
    ))  # fmt: skip
    for row in run_parts.training_lines(run_dir):
        assert 0 < row["learner/weight_mean"] <= 2.0  # 1 / (1 − α)
    groups = defaultdict(list)
    for row in read_rollouts(run_dir, columns=["step", "slot", "source", "reward", "advantage"]).to_pylist():
        if row["source"] == "learner":
            groups[row["step"], row["slot"]].append(row)
    for rows in groups.values():
        mean = sum(row["reward"] for row in rows) / 2
        assert [row["advantage"] for row in rows] == pytest.approx([row["reward"] - mean for row in rows])


CORRECTIONS = ["none", "token_tis", "icepop", "sequence_tis", "geometric_mask", "mixture", "luffy", "topr"]
LOSSES: list[dict[str, object]] = [
    {},
    {"loss.ratio": "sequence"},
    {"loss.ratio": "cispo"},
    {"loss.aggregation": "sequence_mean"},
    {"loss.aggregation": "dr_grpo"},
    {"loss.kl_rows": "all"},
    {"loss.kl_coef": 0.0},
    {"loss.entropy_coef": 0.01},
    {"loss.overlong": "mask"},
    {"loss.clip_low": 0.01, "loss.clip_high": 0.01},
    {"algorithm.epochs": 2},
    {"correction.explorer_negatives": "drop"},
    {"rollout.temperature": 1.5},
    *({"correction.explorer.anchor": "learner", "correction.explorer.weight": weight} for weight in CORRECTIONS),
    *({"correction.learner.weight": weight} for weight in CORRECTIONS),
    {"correction.learner.anchor": "sampler", "correction.learner.weight": "none"},
]


def config_of(root: Path, overrides: dict[str, object]) -> Config:
    words = arguments(root, root / "unused", algorithm__schedule="constant", algorithm__alpha=0.5)
    return parse_command([*words, *(f"{name}={value}" for name, value in overrides.items())]).config


def weights_after(root: Path, groups: list[Group], overrides: dict[str, object]) -> tuple[torch.Tensor, dict]:
    config, family = config_of(root, overrides), run_parts.tiny_family(root)
    learner = Learner.load(config, model_dir=family.learner, explorer_dir=family.explorer, world=WORLD)
    metrics = run_parts.train_step(learner, groups)
    return torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()]), metrics


@pytest.fixture(scope="module")
def plain(root: Path, recorded: list[list[Group]]) -> torch.Tensor:
    return weights_after(root, recorded[1], {})[0]


DEFAULT = ({}, {"correction.learner.weight": "token_tis"})


@pytest.mark.parametrize("overrides", LOSSES, ids=lambda overrides: " ".join(map(str, overrides.values())) or "default")
def test_every_loss_and_correction_trains_on_the_same_groups(
    root: Path, recorded: list[list[Group]], plain: torch.Tensor, overrides: dict[str, object]
) -> None:
    weights, metrics = weights_after(root, recorded[1], overrides)
    assert metrics["grad_norm"] > 0
    assert metrics["fault/skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    for source in Source:
        assert metrics[f"{source}/weight_mean"] >= 0
        assert 0 <= metrics[f"{source}/masked_fraction"] <= 1
        assert 0 < metrics[f"{source}/ess"] <= 1 + 1e-6
    distance = float((weights - plain).abs().max())
    assert (distance > 1e-6) != (overrides in DEFAULT), distance  # the groups are one version off-policy


def test_explorer_negatives_leave_the_loss_but_not_the_baseline(root: Path, recorded: list[list[Group]]) -> None:
    groups = recorded[1]
    config = config_of(root, {"correction.explorer_negatives": "drop", "learner.skip_zero_gradient": "false"})
    batch = pack_step(groups, config)
    weights = torch.cat([micro.token_weight_T for mini in batch.mini_batches for micro in mini.micro_batches])
    sources = torch.cat([micro.source_T for mini in batch.mini_batches for micro in mini.micro_batches])
    advantages = torch.cat([micro.advantage_T for mini in batch.mini_batches for micro in mini.micro_batches])
    left_out = weights == 0
    assert left_out.any()
    assert torch.equal(left_out, (sources == 0) & (advantages < 0))
    assert all(sum(group.advantages) == pytest.approx(0, abs=1e-5) for group in groups)
    assert msgspec.to_builtins(config)["correction"]["explorer_negatives"] == "drop"
