"""Norms and rotations with written-out gradients: those of transformers, and of finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trainer.closed_forms import RMSNorm, Rotation, use_closed_forms

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def make(config_class, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES), attn_implementation="sdpa").to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def run(model):
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3), (x, weight))
    angle = torch.randn(2, 3, 3, dtype=torch.float64).repeat(1, 1, 2)
    assert gradcheck(lambda x: Rotation.apply(x, angle.cos(), angle.sin()), (x,))


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_a_model_computes_what_it_did(config_class):
    expected, gradients = run(make(config_class))
    model = make(config_class)
    assert use_closed_forms(model)
    found, ours = run(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_half_precision_stays_as_transformers_has_it():
    expected, _ = run(make(Qwen3Config, torch.bfloat16))
    model = make(Qwen3Config, torch.bfloat16)
    assert use_closed_forms(model)
    assert torch.equal(run(model)[0], expected)


def test_a_family_with_other_norms_is_left_alone():
    model = make(GemmaConfig)
    assert not use_closed_forms(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_of_zeros_and_large_numbers_have_finite_norms():
    norm = Qwen3RMSNorm(8, eps=1e-6)
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e18), torch.full((8,), 1e-18)]).requires_grad_()
    found = RMSNorm.apply(x, norm.weight, 1e-6)
    torch.testing.assert_close(found, norm(x.detach()))
    found.sum().backward()
    assert x.grad.isfinite().all()
