"""What a backward pass computes again instead of keeping it (learner.gradient_checkpointing, learner.recompute)."""

import importlib.util
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_PRODUCTS_AND_ATTENTION = (
    "aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip


def enable_gradient_checkpointing(model: PreTrainedModel, *, selective: bool) -> None:
    """Recompute layers in backward; transformers does so only in training mode, so dropout must be 0.

    `selective`: the outputs of products and attention are kept, which are nearly all of a layer's time (as torchtitan's
    selective mode); what is computed again are norms, rotary embeddings and activation functions.
    """
    dropout = {name: value for name, value in model.config.to_dict().items() if "dropout" in name and value}
    if dropout:
        raise ValueError(
            f"learner.gradient_checkpointing with a model that drops out: {dropout}; set them to 0 in config.json"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()


def changes_products(model: PreTrainedModel) -> bool:
    """Whether Liger's rotary embedding, which works in place, would turn the outputs of products themselves.

    It turns what it is given: without norms of queries and keys that is what the products wrote, and where those
    outputs are kept they would be turned again.
    """
    return not any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())


def _kept_operations() -> list[Any]:
    """Those of the names above that this process can call."""
    for module in ("torch.nn.attention.varlen", "flash_attn"):  # they register their operations when imported
        if torch.cuda.is_available() and importlib.util.find_spec(module):
            importlib.import_module(module)
    found = []
    for name in _PRODUCTS_AND_ATTENTION:
        space, _, operation = name.partition("::")
        if packet := getattr(getattr(torch.ops, space), operation, None):
            found.append(packet.default)
    return found
