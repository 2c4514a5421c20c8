"""Selective recomputation: the gradients of a plain backward pass, with no product and no attention computed twice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.attention import use_packed_attention
from trainer.models import load_model
from trainer.recompute import changes_products, enable_gradient_checkpointing

PRODUCTS = 7  # q, k, v, o, gate, up, down
BOUNDS = torch.tensor([0, 5, 6, 14], dtype=torch.int32)


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def load(learner_dir):
    return load_model(learner_dir, dtype=torch.float32, device=torch.device("cpu"), key="learner.model")


def run(model, *, packed):
    """Gradients by name, and how often products and attention ran in forward and backward together."""
    ids = torch.randint(2, 50, (1, 14), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    if packed:
        lengths = BOUNDS.diff().tolist()
        inputs |= {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "cu_seq_lens_q": BOUNDS,
                   "cu_seq_lens_k": BOUNDS, "max_length_q": max(lengths), "max_length_k": max(lengths)}  # fmt: skip
    with Calls() as calls:
        model(**inputs).logits.log_softmax(-1)[..., 3].square().sum().backward()
    attention = sum(
        count for name, count in calls.counts.items() if "scaled_dot_product" in name and "back" not in name
    )
    return {name: p.grad.clone() for name, p in model.named_parameters()}, calls.counts["aten::mm"], attention


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_is_cheap_is_computed_twice(learner_dir, packed):
    found = {}
    for mode in ("none", "full", "selective"):
        model = load(learner_dir).train()
        if packed:
            use_packed_attention(model)
        if mode != "none":
            enable_gradient_checkpointing(model, selective=mode == "selective")
        found[mode] = run(model, packed=packed)
    layers = model.config.num_hidden_layers
    plain, products, attention = found["none"]
    assert attention == layers
    assert found["full"][1:] == (products + layers * (PRODUCTS - 1), 2 * layers)  # a layer's last product is not needed
    assert found["selective"][1:] == (products, attention)
    for mode in ("full", "selective"):
        for name, gradient in found[mode][0].items():
            assert torch.equal(gradient, plain[name]), (mode, name)


def test_gradient_checkpointing_refuses_dropout(learner_dir):
    model = load(learner_dir)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout.*0\.1"):
        enable_gradient_checkpointing(model, selective=False)


def test_a_rotary_embedding_in_place_is_told_apart_by_the_norms_before_it(learner_dir):
    assert not changes_products(load(learner_dir))
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert changes_products(LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape)))
