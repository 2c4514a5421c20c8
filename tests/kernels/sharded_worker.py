"""One of two ranks that train a tiny model whose parameters are sharded; run by test_sharded_head.py.

    sharded_worker.py {fsdp2,zero3}        (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them)

Prints on rank 0 one JSON object per model, tied and untied: the largest gradient difference from the whole batch on one
unsharded model, and the ratio's largest distance from 1 on policy.
"""

import json
import sys

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from kernels.head import LogprobModel

TOKENS = 9


def build(tied):
    torch.manual_seed(3)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=67, tie_word_embeddings=tied,
    )  # fmt: skip
    return LogprobModel(Qwen3ForCausalLM(config))


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 67, (2, TOKENS), generator=generator)
    rows = torch.tensor([2, 3, 4, TOKENS + 3, TOKENS + 4])
    return {"input_ids": ids}, rows, ids.flatten()[rows + 1], torch.randn(5, generator=generator)


def step(forward, backward, rank):
    """Scores, then trains on the same rows; the ratio's distance from 1."""
    inputs, rows, targets, advantage = batch(rank)
    with torch.no_grad():
        anchor, _ = forward(inputs, rows, targets)
    loss, _, _, metrics = forward(inputs, rows, targets, anchor, advantage)
    backward(loss)
    return float((metrics["ratio"] - 1).abs().max())


def whole_gradients(tied, ranks):
    """Mean over the ranks' losses on one model: what either sharding must reduce to."""
    model = build(tied)
    for rank in range(ranks):
        step(model, lambda loss: (loss / ranks).backward(), rank)
    return {name: p.grad for name, p in model.named_parameters()}


def fsdp2(tied, rank):
    from torch.distributed.fsdp import fully_shard

    model = build(tied)
    for layer in model.model.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard(model.model.lm_head)
    fully_shard(model)
    drift = step(model, torch.Tensor.backward, rank)
    return drift, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def zero3(tied, rank):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # Its JIT build takes minutes and only speeds up reductions in shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = build(tied)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert model.model.lm_head.weight.numel() == 0, "the weight is not sharded outside of its module's forward"
    drift = step(engine, engine.backward, rank)
    return drift, {name: safe_get_full_grad(p) for name, p in model.named_parameters()}


def report(sharding, tied, rank, ranks):
    drift, gradients = {"fsdp2": fsdp2, "zero3": zero3}[sharding](tied, rank)
    wanted = whole_gradients(tied, ranks)
    assert wanted.keys() == gradients.keys()
    error = max(float((gradients[name] - wanted[name]).abs().max()) for name in wanted)
    scale = max(float(w.abs().max()) for w in wanted.values())
    return {"tied": tied, "drift": drift, "error": error, "scale": scale, "parameters": len(wanted)}


def main(sharding):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for tied in (True, False):
        row = report(sharding, tied, rank, ranks)
        if rank == 0:
            print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
