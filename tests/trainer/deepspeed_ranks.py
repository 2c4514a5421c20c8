"""One of the ranks of test_deepspeed_backend.py and test_sequence_parallel.py.

    deepspeed_ranks.py MODEL WORK        (RANK, WORLD_SIZE, ... as torchrun sets them)

WORK/jobs.json lists what to do one after the other: train the steps of WORK/groups.msgpack with the configuration of
the job, from its beginning or from a checkpoint, save where it says so, and write the weights and what was measured.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from core.config import Config
from core.schema import Group
from rollout.shared_weights import SharedWeights, require_whole
from trainer import deepspeed_backend
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.weight_buffers import WeightBuffers
from trainer.world import World


def poison(learner):
    """From now on the gradient of this rank is not finite, while its loss is."""

    def forward_hook(module, inputs, hidden):
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("inf"))

    return learner.model.get_decoder().norm.register_forward_hook(forward_hook)


def train(learner, groups, world):
    """By mini-batches, as they would arrive: π_old is scored after updates too."""
    config, index = learner.config, 0
    size = config.algorithm.mini_batch_prompts if config.algorithm.in_parts else len(groups)
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        batch = pack_step(part, config, rank=world.rank, world_size=world.size, first_index=index)
        index += sum(len(mini_batch.micro_batches) for mini_batch in batch.mini_batches)
        if start:
            learner.score(batch)
        else:
            learner.begin_step(batch, in_parts=size < len(groups))
        for mini_batch in batch.mini_batches:
            learner.update(mini_batch)
    return learner.end_step()


def in_lines(world, size):
    """The same ranks, in lines of `size`, as World.join makes them."""
    return replace(world, line=dist.new_subgroups(size)[0], line_size=size) if size > 1 else world


def from_buffer(learner, world):
    """Rank 0's third version in its buffers, as a rollout worker reads it; the other ranks take part."""
    buffers = WeightBuffers(learner.weights_bytes, world.device) if world.is_main else None
    for version in (1, 2, 3):
        if buffers is None:
            learner.write_weights(None)
        else:
            file, digest = buffers.write(version, learner.write_weights)
    if buffers is None:
        return {}
    with SharedWeights(file, version=3, digest=digest, device=world.device) as weights:
        tensors = dict(weights.tensors())
        require_whole([weights.outcome()], version=3)
    buffers.close()
    return tensors


def run(job, model_dir, work, world, steps):
    out = Path(job["out"])
    deepspeed_backend.PERSISTENT_ELEMENTS = job["persistent"]
    config = msgspec.convert(job["config"], Config)
    world = in_lines(world, config.learner.sequence_parallel)
    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    model_dir = Path(job["model"] or model_dir)
    learner = Learner.load(config, model_dir=model_dir, explorer_dir=None, world=world, checkpoint=checkpoint)
    engine = getattr(learner.backend, "engine", None)  # DeepSpeed's
    bucket = engine.zero_reduce_bucket_size() if engine else None
    metrics, whole = [], sum(p.numel() for p in learner.model.parameters())
    for step in range(learner.step, len(steps)):
        hook = poison(learner) if step == job["poisoned"] and world.rank == world.size - 1 else None
        metrics.append(train(learner, steps[step], world))
        if hook is not None:
            hook.remove()
        if step + 1 == job["save"]:
            folder = out / "checkpoint"
            learner.save_model(folder if world.is_main else None)
            learner.save_state(folder / "trainer" if world.is_main else None)
    with (out / "weights.safetensors").open("wb") if world.is_main else nullcontext() as stream:
        learner.write_weights(stream)
    shared = from_buffer(learner, world)
    if world.is_main:
        save_file(shared, out / "shared.safetensors")
        facts = {"metrics": metrics, "updates": learner.backend.updates, "step": learner.step, "whole": whole}
        facts["bucket"] = bucket
        (out / "facts.json").write_text(json.dumps(facts))
    save_file(dict(learner.backend.state()), out / f"state_{world.rank}.safetensors")


def main(model_dir, work):
    torch.set_num_threads(1)
    world = World.join("cpu", timeout_s=120)
    steps = msgspec.msgpack.decode((Path(work) / "groups.msgpack").read_bytes(), type=list[list[Group]])
    for job in json.loads((Path(work) / f"jobs_{world.size}.json").read_text()):
        run(job, Path(model_dir), Path(work), world, steps)
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
