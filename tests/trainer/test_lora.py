"""Adapters on the plain learner: what trains, what is saved, and what a resumed run goes on with."""

import json
from pathlib import Path

import pytest
import run_parts
import torch
from run_parts import train_step
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.memory import model_shape
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
LORA = {"learner.lora_rank": 4, "learner.lora_alpha": 8}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.tensor([[5, 9, 12, 3, 7]])


def load(config, model_dir, checkpoint=None):
    return Learner.load(config, model_dir=model_dir, explorer_dir=None, world=WORLD, checkpoint=checkpoint)


def save(learner, directory):
    learner.save_model(directory)
    learner.save_state(directory / "trainer")


def weights(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"learner.dtype": "bfloat16"},
        {"learner.gradient_checkpointing": True},
        {"learner.micro_batch_tokens": 60},
        {"learner.kernels": "reference"},
    ],
)
def test_only_adapters_train(tiny_config, made_up_groups, learner_dir, overrides):
    learner = load(tiny_config(LORA | overrides), learner_dir)
    before = weights(learner)
    metrics = train_step(learner, made_up_groups())
    assert metrics["fault/skipped_updates"] == 0
    after = weights(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 2 * 2 * len(LINEAR)  # A and B, two layers
    shape = model_shape(json.loads((learner_dir / "config.json").read_text()))
    assert sum(before[name].numel() for name in changed) == shape.adapter_parameters(4)
    assert len(learner.backend.optimizer.gradient) == shape.adapter_parameters(4)


def publish(learner, file):
    with file.open("wb") as stream:
        learner.write_weights(stream)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_the_merged_model(tiny_config, made_up_groups, write_tiny_model, tmp_path, tied):
    write_tiny_model(tmp_path / "start", seed=1, tied=tied)
    learner = load(tiny_config(LORA), tmp_path / "start")
    publish(learner, tmp_path / "version_0.safetensors")
    start, first = load_file(tmp_path / "start" / "model.safetensors"), load_file(tmp_path / "version_0.safetensors")
    assert start.keys() == first.keys()
    assert all(torch.equal(start[name], first[name]) for name in start)  # B = 0
    for seed in (1, 2):
        train_step(learner, made_up_groups(seed=seed))
    learner.save_model(tmp_path / "saved")
    publish(learner, tmp_path / "version_1.safetensors")
    saved, published = (
        load_file(tmp_path / "saved" / "model.safetensors"),
        load_file(tmp_path / "version_1.safetensors"),
    )
    assert saved.keys() == published.keys() == start.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    moved = {name for name in start if not torch.equal(start[name], saved[name])}
    assert moved == {name for name in start if name.split(".")[-2] in LINEAR}
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(model), logits(learner.model), rtol=0, atol=1e-5)
    assert float((logits(model) - logits(load(tiny_config(), tmp_path / "start").model)).abs().max()) > 1e-3
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


def test_the_reference_is_the_model_without_its_adapter(tiny_config, made_up_groups, learner_dir):
    settings = {"loss.kl_rows": "all", "correction.explorer.anchor": "learner"}
    config = tiny_config(LORA | settings)
    learner, plain = load(config, learner_dir), load(tiny_config(settings), learner_dir)
    train_step(learner, made_up_groups())
    required = [parameter.requires_grad for parameter in learner.model.parameters()]
    step = pack_step(made_up_groups(seed=2), config)
    for each in (learner, plain):
        each.begin_step(step)
    for index, (_, scores) in learner._scored.items():
        assert torch.equal(scores.ref_T, plain._scored[index][1].ref_T)
        assert not torch.equal(scores.ref_T, scores.old_T)
    assert required == [parameter.requires_grad for parameter in learner.model.parameters()]
    learner.update(step.mini_batches[0])
    assert learner.backend.updates == 3  # the adapter is back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_config, made_up_groups, learner_dir, tmp_path, dtype):
    config = tiny_config({**LORA, "learner.dtype": dtype})
    whole, half = load(config, learner_dir), load(config, learner_dir)
    for seed in (1, 2):
        train_step(whole, made_up_groups(seed=seed))
    train_step(half, made_up_groups(seed=1))
    save(half, tmp_path)
    resumed = load(config, learner_dir, checkpoint=tmp_path)
    train_step(resumed, made_up_groups(seed=2))
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = dict(resumed.backend.state()), dict(whole.backend.state())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(".lora_" in name for name in theirs)


def test_an_adapter_of_other_weights_is_refused(tiny_config, made_up_groups, learner_dir, write_tiny_model, tmp_path):
    learner = load(tiny_config(LORA), learner_dir)
    train_step(learner, made_up_groups())
    save(learner, tmp_path / "checkpoint")
    write_tiny_model(tmp_path / "other", seed=7)
    with pytest.raises(ValueError, match=r"was trained beside other weights than learner\.model"):
        load(tiny_config(LORA), tmp_path / "other", checkpoint=tmp_path / "checkpoint")


def test_without_peft_the_way_out_is_named(tiny_config, learner_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"peft>=.*learner\.lora_rank=0"):
        load(tiny_config(LORA), learner_dir)


@pytest.mark.slow
def test_a_whole_run_and_its_continuation(tmp_path_factory, tmp_path):
    root = tmp_path_factory.getbasetemp()
    settings = {"learner__lora_rank": 4, "algorithm__steps": 4, "algorithm__anneal_steps": 3, "data__eval": ""}
    whole = run_parts.train_here(run_parts.arguments(root, tmp_path / "whole", **settings))
    words = run_parts.arguments(root, tmp_path / "stopped", **{**settings, "algorithm__steps": 3})
    stopped = run_parts.train_here(words)
    run_parts.train_here([*run_parts.arguments(root, stopped, **settings), "--resume"])
    assert run_parts.weights_bytes(stopped) == run_parts.weights_bytes(whole)
    lines = run_parts.training_lines(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in lines[1:])  # merged as published
    start = load_file(Path(run_parts.tiny_family(root).learner) / "model.safetensors")
    final = load_file(whole / "model" / "model.safetensors")
    assert final.keys() == start.keys()
    assert torch.equal(final["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not torch.equal(final["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
