"""The head's weight gradient goes straight into the flat fp32 buffer, beside what a tied embedding adds by autograd."""

import pytest
import torch
from run_parts import train_step

from kernels import ops
from kernels.ops import linear_policy_loss as policy_loss
from trainer.learner import Learner
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
ONE_UPDATE = {"learner.micro_batch_rows": 2, "algorithm.mini_batch_prompts": 4, "learner.warmup_updates": 0}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_dir(request, tmp_path, write_tiny_model):
    write_tiny_model(tmp_path / "model", seed=1, tied=request.param)
    return tmp_path / "model"


def load(config, model_dir):
    learner = Learner.load(config, model_dir=model_dir, explorer_dir=None, world=WORLD)
    return learner, learner.model.get_output_embeddings()


def place_of(learner, head):
    """The head's part of the flat gradient."""
    optimizer = learner.backend.optimizer
    (name,) = (name for name, parameter in learner.model.named_parameters() if parameter is head.weight)
    return optimizer.masters[name].grad


def record_losses(monkeypatch):
    """Arguments of every fused loss from now on."""
    seen = []
    monkeypatch.setattr(ops, "linear_policy_loss", lambda *a, **k: (seen.append((a, k)), policy_loss(*a, **k))[1])
    return seen


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_updates_equal_those_by_autograd(dtype, close, tiny_config, made_up_groups, model_dir, monkeypatch):
    config = tiny_config({**ONE_UPDATE, "learner.dtype": dtype})
    (ours, head), (plain, other) = load(config, model_dir), load(config, model_dir)
    other.main_grad = None
    seen = record_losses(monkeypatch)
    for seed in (1, 2, 3):
        train_step(ours, made_up_groups(seed=seed))
        into = [options["main_grad"].data_ptr() for _, options in seen]
        assert into == 8 * [place_of(ours, head).data_ptr()]  # micro-batches
        seen.clear()
        train_step(plain, made_up_groups(seed=seed))
        assert not any("main_grad" in options for _, options in seen)
        seen.clear()
        found, expected = ours.backend.optimizer, plain.backend.optimizer
        assert (found.gradient - expected.gradient).norm() <= close * expected.gradient.norm()
        for name, master in expected.masters.items():
            if dtype == "float32":
                torch.testing.assert_close(found.masters[name], master, rtol=0, atol=1e-6)
            # The same from here on: AdamW turns differences of tiny gradients into full-sized steps.
            master.data.copy_(found.masters[name])
            expected.parameters[name].data.copy_(found.parameters[name])


def test_bfloat16_gradients_of_an_update_are_rounded_less(
    tiny_config, made_up_groups, tmp_path, write_tiny_model, monkeypatch
):
    """Against float64 from the same hidden states; autograd's way rounds each micro-batch's gradient to bfloat16."""
    write_tiny_model(tmp_path, seed=1, tied=False)
    config = tiny_config({**ONE_UPDATE, "learner.dtype": "bfloat16", "learner.grad_clip": 1e9})
    seen, errors = record_losses(monkeypatch), []
    for in_place in (True, False):
        learner, head = load(config, tmp_path)
        weight = head.weight.detach().double().requires_grad_()
        if not in_place:
            head.main_grad = None
        train_step(learner, made_up_groups())
        for (hidden, _, *rest), options in seen:
            kept = {name: value for name, value in options.items() if name not in ("main_grad", "impl")}
            policy_loss(hidden.detach().double(), weight, *rest, impl="reference", **kept)[0].backward()
        seen.clear()
        errors.append(float((place_of(learner, head) - weight.grad).norm() / weight.grad.norm()))
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


@pytest.mark.parametrize("overrides", [{"learner.lora_rank": 4}, {"learner.kernels": "reference"}])
def test_a_frozen_head_and_the_reference_leave_gradients_to_autograd(
    overrides, tiny_config, made_up_groups, model_dir, monkeypatch
):
    learner, _ = load(tiny_config(overrides), model_dir)
    seen = record_losses(monkeypatch)
    train_step(learner, made_up_groups())
    assert seen
    assert not any("main_grad" in options for _, options in seen)
    assert learner.backend.updates == 2
