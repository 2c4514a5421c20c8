"""What core.memory counts is what transformers makes, and what the kernels hold."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core import memory
from core.memory import head_bytes, model_shape
from kernels import row_triton
from kernels.autograd import backend, default_chunk_rows
from trainer.batch import pack_step
from trainer.objective import Scores

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama", {}),
        ("mistral", {"head_dim": 8}),
    ],
)
def test_parameters_are_counted_exactly(kind: str, extra: dict[str, object]) -> None:
    config = AutoConfig.for_model(kind, **TINY, **extra)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model_shape(config.to_dict()).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_head_s_chunk_is_the_kernels_own() -> None:
    assert (memory.HEAD_CHUNK_BYTES, memory.HEAD_CHUNK_ROWS) == (row_triton.CHUNK_BYTES, row_triton.CHUNK_ROWS)
    shape = model_shape({"model_type": "llama", **TINY} | {"vocab_size": 400_000})
    rows = default_chunk_rows(backend("triton"), 400_000, 2)
    assert head_bytes(shape, tokens=0, width=2) == rows * 400_000 * 2 + 4 * 400_000 * 32


def test_the_rows_of_a_step_take_what_is_counted(tiny_config, made_up_groups) -> None:
    """Per completion token; prompts that rows share are little beside them."""
    config = tiny_config({"rollout.max_response_tokens": 4000, "learner.micro_batch_tokens": 40_000})
    batch = pack_step(made_up_groups(longest=4000), config)
    micro_batches = [micro_batch for part in batch.mini_batches for micro_batch in part.micro_batches]
    values = [value for m in micro_batches for value in (*vars(m).values(), *m.inputs.values())]
    held = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    scores = len(Scores._fields) * torch.float32.itemsize
    tokens = sum(len(micro_batch.target_T) for micro_batch in micro_batches)
    assert memory.STEP_TOKEN_BYTES * 0.9 < held / tokens + scores < memory.STEP_TOKEN_BYTES * 1.02
