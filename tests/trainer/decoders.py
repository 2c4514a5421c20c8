"""Small decoders of two families, and how near two tensors are."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SHAPE = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Always the same weights."""
    torch.manual_seed(4)
    model_class, config_class = FAMILIES[family]
    return model_class(config_class(**SHAPE)).eval().to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Relative L2 error."""
    return bool((found - expected).norm() <= tolerance * expected.norm())
