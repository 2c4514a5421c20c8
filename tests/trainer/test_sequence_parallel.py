"""Ranks that share lines of tokens make the updates of one rank that holds whole ones."""

import json
import socket
from pathlib import Path

import msgspec
import pytest
import torch
from ranks import start_ranks
from safetensors.torch import load_file

from core.configcheck import check_config
from core.configkeys import ConfigError
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.micro_batch import NO_SOURCE
from trainer.models import load_model
from trainer.sequence_parallel import part_of, share_attention
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
PROGRAM = Path(__file__).with_name("deepspeed_ranks.py")
SETTINGS = {
    "learner.learning_rate": 2e-4, "learner.warmup_updates": 2, "learner.micro_batch_tokens": 60,
    "correction.explorer.anchor": "learner", "correction.explorer.weight": "token_tis",
}  # fmt: skip
TORCH, ZERO = {"learner.backend": "torch"}, {"learner.backend": "deepspeed"}
JOBS = {  # by the number of ranks
    2: {
        "torch": TORCH | {"learner.sequence_parallel": 2},
        "zero_1": ZERO | {"learner.zero_stage": 1, "learner.sequence_parallel": 2},
        "zero_3": ZERO | {"learner.zero_stage": 3, "learner.sequence_parallel": 2},
        "recompute": TORCH | {"learner.sequence_parallel": 2, "learner.gradient_checkpointing": True},
        "selective": TORCH
        | {"learner.sequence_parallel": 2, "learner.gradient_checkpointing": True, "learner.recompute": "selective"},
        "prompts_apart": TORCH | {"learner.sequence_parallel": 2, "learner.share_prompts": False},
    },
    4: {
        "two_lines": TORCH | {"learner.sequence_parallel": 2},
        "two_lines_zero_2": ZERO | {"learner.zero_stage": 2, "learner.sequence_parallel": 2},
        "heads_repeated": TORCH | {"learner.sequence_parallel": 4, "learner.micro_batch_tokens": 15},
        "heads_repeated_zero_3": ZERO | {"learner.zero_stage": 3, "learner.sequence_parallel": 4},
    },
}
NAMES = [(size, name) for size, jobs in JOBS.items() for name in jobs]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


@pytest.fixture
def trained(work, write_tiny_model, tiny_config, made_up_groups):
    """Every job done once; (folder, weights and metrics of one rank that trains alone)."""
    if not (work / "alone.json").exists():
        write_tiny_model(work / "model", seed=1, heads=4, kv_heads=2)
        steps = [made_up_groups(seed=seed, explorer=1, learner=3) for seed in (1, 2)]
        (work / "groups.msgpack").write_bytes(msgspec.msgpack.encode(steps))
        for size, jobs in JOBS.items():
            described = []
            for name, overrides in jobs.items():
                (work / name).mkdir()
                config = msgspec.to_builtins(tiny_config(SETTINGS | overrides))
                described.append({"out": str(work / name), "config": config, "save": 0, "poisoned": None,
                                  "checkpoint": None, "model": None, "persistent": 0})  # fmt: skip
            (work / f"jobs_{size}.json").write_text(json.dumps(described))
            start_ranks(PROGRAM, [work / "model", work], size, work)
        alone(work, tiny_config(SETTINGS), steps)
    return work, load_file(work / "alone.safetensors"), json.loads((work / "alone.json").read_text())


def alone(work, config, steps):
    learner = Learner.load(config, model_dir=work / "model", explorer_dir=None, world=WORLD)
    metrics = []
    for groups in steps:
        batch = pack_step(groups, config)
        learner.begin_step(batch)
        for mini_batch in batch.updates(1):
            learner.update(mini_batch)
        metrics.append(learner.end_step())
    with (work / "alone.safetensors").open("wb") as stream:
        learner.write_weights(stream)
    (work / "alone.json").write_text(json.dumps(metrics))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "name"), NAMES)
def test_shared_lines_make_the_updates_of_whole_ones(trained, size, name):
    work, weights, metrics = trained
    found, facts = load_file(work / name / "weights.safetensors"), json.loads((work / name / "facts.json").read_text())
    start = load_file(work / "model" / "model.safetensors")
    assert max(float((found[key] - weights[key]).abs().max()) for key in weights) <= 1e-5
    assert max(float((start[key] - weights[key]).abs().max()) for key in weights) > 1e-4
    for mine, theirs in zip(facts["metrics"], metrics, strict=True):
        for key, value in theirs.items():
            if not key.startswith("time/"):
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "name"), NAMES)
def test_ratios_on_policy_are_exactly_one(trained, size, name):
    work, _, _ = trained
    facts = json.loads((work / name / "facts.json").read_text())
    # Stage 0 of a step: both sources are anchored at the learner, and nothing has been updated yet.
    assert all(step[f"{source}/ratio_max"] == 1.0 for step in facts["metrics"] for source in ("explorer", "learner"))


def test_parts_hold_every_token_and_every_prediction_once(tiny_config, made_up_groups):
    config = tiny_config(SETTINGS)
    for whole in pack_step(made_up_groups(explorer=1, learner=3), config).mini_batches[0].micro_batches:
        for parts in (2, 3, 4, 7):
            pieces = [part_of(whole, part, parts) for part in range(parts)]
            ids = torch.cat([piece.inputs["input_ids"] for piece in pieces], dim=1)
            length = whole.inputs["input_ids"].shape[1]
            assert torch.equal(ids[:, :length], whole.inputs["input_ids"])
            assert len({piece.inputs["input_ids"].shape for piece in pieces}) == 1
            assert ids.shape[1] - length < parts
            for piece in pieces:
                assert piece.inputs["cu_seq_lens_q"][-1] == ids.shape[1]
                assert piece.inputs["cu_seq_lens_k"][-1] == len(piece.inputs.get("key_index", ids[0]))
                assert int(piece.start_R1[-1]) == len(piece.target_T)
            real = [piece for piece in pieces if NO_SOURCE not in piece.source_T]
            for name in ("target_T", "sampler_T", "advantage_T", "row_T", "token_weight_T"):
                assert torch.equal(torch.cat([getattr(piece, name) for piece in real]), getattr(whole, name))
            width = pieces[0].inputs["input_ids"].shape[1]
            places = [piece.state_T + i * width for i, piece in enumerate(pieces) if NO_SOURCE not in piece.source_T]
            assert torch.equal(torch.cat(places), whole.state_T)


def test_a_part_of_prompt_tokens_predicts_nothing_that_counts(tiny_config, made_up_groups):
    [group] = made_up_groups(prompts=1, explorer=0, learner=1)
    config = tiny_config({"learner.micro_batch_tokens": 60, "algorithm.group_size": 1})
    long = msgspec.structs.replace(group, prompt=msgspec.structs.replace(group.prompt, token_ids=tuple(range(2, 42))))
    [whole] = pack_step([long], config).mini_batches[0].micro_batches
    first = part_of(whole, 0, 4)
    assert first.source_T.tolist() == [NO_SOURCE]
    assert first.token_weight_T.tolist() == [0.0]
    assert first.state_T.tolist() == [0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learner.micro_batch_tokens": 0}, r"sequence_parallel = 2 shares packed lines.*set learner\.micro_batch_tok"),
        ({"loss.ratio": "sequence"}, r'loss\.ratio = "sequence" needs all tokens of a row on one rank'),
        ({"correction.learner.weight": "sequence_tis"}, r'correction\.learner\.weight = "sequence_tis" needs all'),
        (
            {"correction.explorer.weight": "geometric_mask"},
            r"correction\.explorer\.weight = .*use a ratio or weight by",
        ),
        (
            {"correction.explorer.anchor": "learner", "correction.explorer.weight": "topr"},
            r"learner\.sequence_parallel=1",
        ),
        ({"learner.micro_batch_tokens": 13}, r"micro_batch_tokens = 13 cannot hold a row: use 14 or more on each of 2"),
    ],
)
def test_what_needs_whole_rows_is_refused(tiny_config, overrides, message):
    base = {"learner.sequence_parallel": 2, "learner.micro_batch_tokens": 14, "learner.micro_batch_rows": 64}
    check_config(tiny_config(base))
    with pytest.raises(ConfigError, match=message):
        check_config(tiny_config(base | overrides))


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path, write_tiny_model):
    write_tiny_model(tmp_path, seed=1, heads=4, kv_heads=2)
    model = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"), key="learner.model")
    world = World(rank=0, size=12, device=torch.device("cpu"), line_size=3)
    with pytest.raises(
        ValueError, match=r"sequence_parallel = 3 .* 4 query and 2 key-value heads of explorer.*\[2, 4\] or 1"
    ):
        share_attention(model, world, "explorer.model")


def test_ranks_that_do_not_fill_lines_are_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"sequence_parallel = 2 ranks share a line of tokens, and there are 3"):
        World.join("cpu", line_size=2)
