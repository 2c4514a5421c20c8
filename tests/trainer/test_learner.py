import json
import math

import msgspec
import numpy as np
import pytest
import torch
from run_parts import train_step
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.schema import Source
from trainer.batch import pack_step
from trainer.learner import Learner, NonFiniteUpdatesError
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))

RANK_PROGRAM = """
import sys
from pathlib import Path
import msgspec, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from core.config import Config
from core.schema import Group
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.world import World

model_dir, work = Path(sys.argv[1]), Path(sys.argv[2])
world = World.join("cpu", timeout_s=60)
config = msgspec.json.decode((work / "config.json").read_bytes(), type=Config)
steps = msgspec.msgpack.decode((work / "groups.msgpack").read_bytes(), type=list[list[Group]])
learner = Learner.load(config, model_dir=model_dir, explorer_dir=None, world=world)
for groups in steps:
    batch = pack_step(groups, config, rank=world.rank, world_size=world.size)
    learner.begin_step(batch)
    for mini_batch in batch.updates(config.algorithm.epochs):
        learner.update(mini_batch)
    metrics = learner.end_step()
save_file(dict(learner.backend.weights()), work / f"rank_{world.rank}.safetensors")
print(msgspec.json.encode(metrics).decode())
world.leave()
"""


def load(config, learner_dir, explorer_dir=None, checkpoint=None):
    return Learner.load(config, model_dir=learner_dir, explorer_dir=explorer_dir, world=WORLD, checkpoint=checkpoint)


def train_in_parts(learner, groups):
    """Mini-batch by mini-batch, as they would arrive; more passes follow."""
    config, seen = learner.config, []
    for start in range(0, len(groups), config.algorithm.mini_batch_prompts):
        index = sum(len(mini_batch.micro_batches) for mini_batch in seen)
        batch = pack_step(groups[start : start + config.algorithm.mini_batch_prompts], config, first_index=index)
        if seen:
            learner.score(batch)
        else:
            learner.begin_step(batch, in_parts=True)
        seen += batch.mini_batches
        learner.update(batch.mini_batches[0])
    for mini_batch in seen * (config.algorithm.epochs - 1):
        learner.update(mini_batch)
    return learner.end_step()


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))


def spoil(groups, slot=0):
    """The same groups with one advantage that is not a number."""
    group = groups[slot]
    bad = msgspec.structs.replace(group, advantages=(math.nan, *group.advantages[1:]))
    return [*groups[:slot], bad, *groups[slot + 1 :]]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"correction.learner.anchor": "sampler", "correction.learner.weight": "none"},  # no row needs π_old
        {"correction.learner.weight": "mixture", "loss.kl_rows": "all", "algorithm.epochs": 2},
        {"learner.micro_batch_tokens": 60},
    ],
)
def test_a_step_that_trains_part_by_part_makes_the_same_updates(
    tiny_config, made_up_groups, learner_dir, explorer_dir, overrides
):
    config = tiny_config(overrides)
    whole, parts = (load(config, learner_dir, explorer_dir) for _ in range(2))
    for seed in (1, 2):
        groups = made_up_groups(prompts=5, explorer=2, learner=2, seed=seed)
        expected, found = train_step(whole, groups), train_in_parts(parts, groups)
        assert len(pack_step(groups, config).mini_batches) == 3
        timings = {"time/score", "time/train"}
        assert {k: v for k, v in found.items() if k not in timings} == {
            k: v for k, v in expected.items() if k not in timings
        }
    assert same_bits(whole, parts)


def with_equal_rewards(groups, slots):
    """The same groups, some of them without an advantage."""
    return [
        msgspec.structs.replace(group, advantages=(0.0,) * len(group.rows)) if group.slot in slots else group
        for group in groups
    ]


@pytest.mark.parametrize(
    ("overrides", "computed"),
    [
        ({"loss.kl_coef": 0.0}, "live"),
        ({"loss.kl_coef": 0.0, "learner.micro_batch_tokens": 60}, "live"),
        ({"loss.kl_coef": 0.0, "learner.micro_batch_tokens": 60, "loss.ratio": "sequence"}, "live"),
        ({"loss.kl_coef": 0.1, "learner.micro_batch_tokens": 60}, "learner"),
        ({"loss.kl_coef": 0.1, "loss.kl_rows": "all"}, "all"),
    ],
)
def test_rows_without_a_gradient_are_left_out_of_the_same_updates(
    tiny_config, made_up_groups, learner_dir, overrides, computed
):
    def trained(skip):
        config = tiny_config({"learner.learning_rate": 1e-4, "learner.skip_zero_gradient": skip, **overrides})
        learner = load(config, learner_dir)
        # Of the second step's two updates, the second has no gradient but the penalty's: momentum moves it.
        for seed, slots in ((1, {0, 3}), (2, {2, 3})):
            groups = with_equal_rewards(made_up_groups(seed=seed), slots)
            metrics = train_step(learner, groups)
        return learner, groups, metrics

    (every, groups, whole), (some, _, metrics) = trained(skip=False), trained(skip=True)
    for a, b in zip(every.model.parameters(), some.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    rows = [(group, row) for group in groups for row in group.rows]
    kept = {
        "live": [row for group, row in rows if any(group.advantages)],
        "learner": [r for group, r in rows if any(group.advantages) or r.completion.key.source is Source.LEARNER],
        "all": [row for _, row in rows],
    }[computed]
    lengths = [sum(len(row.completion.tokens) for row in part) for part in (kept, [row for _, row in rows])]
    assert metrics["tokens/computed"] == pytest.approx(lengths[0] / lengths[1])
    assert whole["tokens/computed"] == 1.0
    for name in ("loss", "grad_norm", "learning_rate"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"learner.micro_batch_rows": 2, "rollout.temperature": 0.7},
        {"learner.dtype": "bfloat16"},
        {"learner.gradient_checkpointing": True},
        {"loss.ratio": "sequence"},
        {"learner.kernels": "reference"},
    ],
)
def test_the_first_ratio_on_policy_is_exactly_one(tiny_config, made_up_groups, learner_dir, overrides):
    config = tiny_config({"correction.explorer.anchor": "learner", "algorithm.mini_batch_prompts": 4, **overrides})
    metrics = train_step(load(config, learner_dir), made_up_groups())
    for source in Source:
        assert metrics[f"{source}/ratio_mean"] == 1.0
        assert metrics[f"{source}/ratio_max"] == 1.0
        assert metrics[f"{source}/clip_fraction"] == 0.0
    assert metrics["kl"] == 0.0


def test_metrics_of_a_step(tiny_config, made_up_groups, learner_dir):
    metrics = train_step(load(tiny_config(), learner_dir), made_up_groups())
    for source in Source:
        for name in (
            "ratio_mean",
            "ratio_max",
            "clip_fraction",
            "ess",
            "kl_k1",
            "kl_k3",
            "masked_fraction",
            "weight_mean",
        ):
            assert math.isfinite(metrics[f"{source}/{name}"])
    assert metrics["explorer/weight_mean"] == 1.0
    assert metrics["learning_rate"] == pytest.approx(2 / 4 * 1e-3)
    assert metrics["fault/skipped_updates"] == 0
    assert metrics["sampling/sampling_logp_difference/max"] >= metrics["sampling/sampling_logp_difference/mean"] > 0
    assert json.loads(msgspec.json.encode(metrics)) == metrics
    assert all(type(value) is float for value in metrics.values())


def test_each_micro_batch_is_a_sign_of_life(tiny_config, made_up_groups, learner_dir, monkeypatch):
    signs = []
    monkeypatch.setattr("trainer.learner.alive", signs.append)
    config = tiny_config({"learner.micro_batch_tokens": 0, "learner.micro_batch_rows": 1, "stream.starvation_s": 70.0})
    learner, batch = load(config, learner_dir), pack_step(made_up_groups(), config)
    learner.begin_step(batch)
    per_step = sum(len(mini_batch.micro_batches) for mini_batch in batch.mini_batches)
    assert signs == [70.0] * per_step
    mini_batch = batch.mini_batches[0]
    learner.update(mini_batch)
    assert len(mini_batch.micro_batches) > 1
    assert len(signs) == per_step + len(mini_batch.micro_batches)


def test_a_step_of_plain_grpo_has_no_explorer_metrics(tiny_config, made_up_groups, learner_dir):
    metrics = train_step(load(tiny_config(), learner_dir), made_up_groups(explorer=0, learner=4))
    assert not [name for name in metrics if name.startswith("explorer/")]


def test_explorer_rows_anchored_at_the_sampler_cost_no_scoring_pass(
    tiny_config, made_up_groups, learner_dir, monkeypatch
):
    scored = []
    monkeypatch.setattr(
        "trainer.scorer.score", lambda model, batch, **_: scored.append(batch) or torch.zeros_like(batch.sampler_T)
    )
    learner = load(tiny_config(), learner_dir)
    learner.begin_step(pack_step(made_up_groups(explorer=4, learner=0), learner.config))
    assert scored == []
    learner.begin_step(pack_step(made_up_groups(explorer=0, learner=4), learner.config))
    assert len(scored) == 2 * 4  # π_old and π_ref of four micro-batches


def test_mixture_scores_the_explorer_on_learner_rows(tiny_config, made_up_groups, learner_dir, explorer_dir):
    config = tiny_config(
        {
            "correction.learner.weight": "mixture",
            "correction.explorer.anchor": "learner",
            "correction.explorer.weight": "mixture",
        }
    )
    learner = load(config, learner_dir, explorer_dir)
    groups = made_up_groups(explorer=1, learner=3)
    learner.begin_step(pack_step(groups, config))
    for micro, scores in learner._scored.values():
        old = scores.old_T
        omega = micro.sampler_T.clone()
        for row, (start, stop) in enumerate(zip(micro.start_R1, micro.start_R1[1:])):
            if micro.source_T[start] == 1:
                width = micro.inputs["input_ids"].shape[1]
                first = int(micro.state_T[start]) - row * width
                ids = micro.inputs["input_ids"][row : row + 1, : first + 1 + stop - start]
                log_p = learner.explorer.model(input_ids=ids).logits[0].log_softmax(-1)[first:-1]
                omega[start:stop] = log_p.gather(1, ids[0, first + 1 :, None])[:, 0]
        expected = old.exp() / (0.25 * omega.exp() + 0.75 * old.exp())
        torch.testing.assert_close(scores.is_weight_T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kl_coef", "tied"), [(0.0, False), (1e-3, True)])
def test_two_ranks_make_the_update_of_one(
    kl_coef, tied, tiny_config, made_up_groups, write_tiny_model, run_ranks, tmp_path
):
    learner_dir = tmp_path / "learner"
    write_tiny_model(learner_dir, seed=1, tied=tied)
    config = tiny_config({"learner.learning_rate": 2e-4, "algorithm.epochs": 2, "loss.kl_coef": kl_coef})
    # The second step has an update without advantages; the third's loss is NaN in a row that only one rank holds: both
    # skip its updates.
    steps = [made_up_groups(seed=seed, explorer=1, learner=3) for seed in (1, 2)]
    steps[1] = with_equal_rewards(steps[1], {0, 1, 2})
    steps.append(spoil(made_up_groups(prompts=2, seed=3)))
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    (tmp_path / "groups.msgpack").write_bytes(msgspec.msgpack.encode(steps))
    outputs = [json.loads(output) for output in run_ranks(RANK_PROGRAM, 2, learner_dir, tmp_path)]
    alone = load(config, learner_dir)
    for groups in steps:
        metrics = train_step(alone, groups)
    ranks = [load_file(tmp_path / f"rank_{rank}.safetensors") for rank in range(2)]
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], parameter.detach(), rtol=0, atol=1e-6)
    assert (
        [output["fault/skipped_updates"] for output in outputs] == [2.0, 2.0] == [metrics["fault/skipped_updates"]] * 2
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_config, made_up_groups, learner_dir, tmp_path, dtype):
    config = tiny_config({"learner.dtype": dtype})
    whole, half = load(config, learner_dir), load(config, learner_dir)
    for seed in (1, 2):
        train_step(whole, made_up_groups(seed=seed))
    train_step(half, made_up_groups(seed=1))
    half.save_model(tmp_path)
    half.save_state(tmp_path / "trainer")
    resumed = load(config, learner_dir, checkpoint=tmp_path)
    assert (resumed.step, resumed.backend.optimizer.updates) == (1, 2)
    assert same_bits(resumed, half)
    assert not same_bits(resumed, whole)
    train_step(resumed, made_up_groups(seed=2))
    assert same_bits(resumed, whole)
    ours, theirs = resumed.backend.optimizer.tensors(), whole.backend.optimizer.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_before_the_first_update_resumes(tiny_config, made_up_groups, learner_dir, tmp_path):
    first = load(tiny_config(), learner_dir)
    first.save_model(tmp_path)
    first.save_state(tmp_path / "trainer")
    resumed = load(tiny_config(), learner_dir, checkpoint=tmp_path)
    for learner in (first, resumed):
        train_step(learner, made_up_groups())
    assert same_bits(first, resumed)


def test_resuming_in_another_dtype_is_refused(tiny_config, made_up_groups, learner_dir, tmp_path):
    learner = load(tiny_config(), learner_dir)
    train_step(learner, made_up_groups())
    learner.save_model(tmp_path)
    learner.save_state(tmp_path / "trainer")
    with pytest.raises(ValueError, match=r"learner\.dtype"):
        load(tiny_config({"learner.dtype": "bfloat16"}), learner_dir, checkpoint=tmp_path)


def test_the_reference_stays_the_starting_model_after_a_resume(tiny_config, made_up_groups, learner_dir, tmp_path):
    learner = load(tiny_config(), learner_dir)
    train_step(learner, made_up_groups())
    learner.save_model(tmp_path)
    learner.save_state(tmp_path / "trainer")
    resumed = load(tiny_config(), learner_dir, checkpoint=tmp_path)
    start = load(tiny_config(), learner_dir).model
    assert all(torch.equal(a, b) for a, b in zip(resumed.reference.model.parameters(), start.parameters()))


def test_a_saved_directory_loads_in_transformers_with_the_same_logits(
    tiny_config, made_up_groups, learner_dir, tmp_path
):
    learner = load(tiny_config(), learner_dir)
    train_step(learner, made_up_groups())
    learner.save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    ids = torch.tensor([[5, 9, 12, 3]])
    with torch.no_grad():
        # Its norms round otherwise (trainer.closed_forms); the weights are the same bits.
        torch.testing.assert_close(model(input_ids=ids).logits, learner.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    saved, trained = model.state_dict(), learner.model.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == learner.tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == 1


def test_written_weights_are_those_of_the_saved_model(tiny_config, made_up_groups, learner_dir, tmp_path):
    learner = load(tiny_config(), learner_dir)
    train_step(learner, made_up_groups())
    learner.save_model(tmp_path)
    file = tmp_path / "version_000001.safetensors"
    with file.open("wb") as stream:
        learner.write_weights(stream)
    published, saved = load_file(file), load_file(tmp_path / "model.safetensors")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name]) for name in saved)


def test_non_finite_updates_are_skipped_counted_and_then_stop_the_run(tiny_config, made_up_groups, learner_dir):
    config = tiny_config({"learner.max_nonfinite_updates": 3, "algorithm.mini_batch_prompts": 4})
    learner, untouched = load(config, learner_dir), load(config, learner_dir)
    good, bad = made_up_groups(), spoil(made_up_groups())
    for skipped in (1, 2):
        metrics = train_step(learner, bad)
        assert metrics["fault/skipped_updates"] == skipped
        assert same_bits(learner, untouched)
    train_step(learner, good)  # a good update starts the count anew
    train_step(learner, bad)
    train_step(learner, bad)
    with pytest.raises(NonFiniteUpdatesError, match="3 updates in a row were skipped at step 6"):
        train_step(learner, bad)


def test_gradient_checkpointing_gives_the_same_update(tiny_config, made_up_groups, learner_dir):
    learners = [load(tiny_config({"learner.gradient_checkpointing": on}), learner_dir) for on in (False, True)]
    for learner in learners:
        train_step(learner, made_up_groups())
    assert learners[1].model.is_gradient_checkpointing
    for a, b in zip(*(learner.model.parameters() for learner in learners)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_bfloat16_accumulates_updates_that_its_own_precision_would_lose(tiny_config, made_up_groups, learner_dir):
    config = tiny_config({"learner.dtype": "bfloat16", "learner.learning_rate": 1e-5, "learner.warmup_updates": 0})
    learner = load(config, learner_dir)
    before = {name: master.detach().clone() for name, master in learner.backend.optimizer.masters.items()}
    train_step(learner, made_up_groups())
    moved = [
        float((master.detach() - before[name]).abs().mean())
        for name, master in learner.backend.optimizer.masters.items()
    ]
    assert min(moved) > 0
    assert all(p.dtype == torch.bfloat16 for p in learner.model.parameters())
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, learner.backend.optimizer.masters[name].bfloat16())


def test_training_prefers_rewarded_tokens(tiny_config, made_up_groups, learner_dir):
    config = tiny_config({"correction.explorer.anchor": "learner", "correction.learner.weight": "none"})
    learner = load(config, learner_dir)
    groups = [msgspec.structs.replace(g, advantages=(1.0, -1.0, 1.0, -1.0)) for g in made_up_groups()]
    batch = pack_step(groups, config)
    learner.begin_step(batch)
    before = {index: scores.old_T for index, (_, scores) in learner._scored.items()}
    for _ in range(3):
        for mini_batch in batch.mini_batches:
            learner.update(mini_batch)
    learner.begin_step(batch)
    gain = {1.0: [], -1.0: []}
    for index, (micro, scores) in learner._scored.items():
        for advantage, change in zip(micro.advantage_T.tolist(), (scores.old_T - before[index]).tolist()):
            gain[advantage].append(change)
    assert np.mean(gain[1.0]) > 0 > np.mean(gain[-1.0])
