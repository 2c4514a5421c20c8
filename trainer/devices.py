"""This node's GPUs: who gets which (core.placement), told to torch and to workers by CUDA_VISIBLE_DEVICES."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from core.config import Config
from core.configkeys import ConfigError
from core.memory import ModelShape, model_shape
from core.placement import Placement, place, visible_devices
from core.preflight import preflight
from core.schema import Source
from rollout.engine import engine_kind


class Devices(NamedTuple):
    """The placement of this node and what CUDA_VISIBLE_DEVICES held when it was made.

    `shared`: the GPU in whose memory workers read new weights (rollout.weights = "device").

    Example: Devices(placement=Placement(), inherited=None)
    """

    placement: Placement = Placement()
    inherited: str | None = None
    shared: int | None = None

    def of_worker(self, role: Source, index: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of a worker process; None where it inherits the trainer's.

        `shared` comes last, so that the worker's own GPUs keep their numbers.
        """
        blocks = self.placement.learner if role is Source.LEARNER else self.placement.explorer
        if not blocks:
            return None
        others = () if self.shared is None or self.shared in blocks[index] else (self.shared,)
        return visible_devices([*blocks[index], *others], self.inherited)

    def for_workers(self, config: Config) -> Config:
        """The configuration with what one engine may fill of a GPU, which workers are told."""
        if not self.placement.gpus:
            return config
        rollout = msgspec.structs.replace(config.rollout, memory_share=self.placement.memory_share)
        return msgspec.structs.replace(config, rollout=rollout)


def take_gpus(config: Config) -> Devices:
    """Place this node's processes; local rank r finds its GPU as cuda:r from here on.

    Call it before anything touches a GPU: CUDA reads the variable once. That torch, DeepSpeed and NCCL all number GPUs
    by local rank is why the order is changed, not the number.
    Raises ConfigError where the placement cannot be.
    """
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    placement = find_placement(config)
    first = placement.trainer
    if first != tuple(range(len(first))):
        if torch.cuda.is_initialized():
            raise ConfigError(f"placement.trainer = {list(first)} comes too late: this process already uses CUDA")
        others = [gpu for gpu in range(placement.gpus) if gpu not in first]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices([*first, *others], inherited)
    return Devices(placement, inherited, first[0] if first and config.rollout.weights == "device" else None)


def find_placement(config: Config) -> Placement:
    """The placement on this node, from its visible GPUs and the ranks that torchrun starts here."""
    gpus = 0 if config.run.device == "cpu" else torch.cuda.device_count()
    ranks, node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("GROUP_RANK", "0"))
    return place(config, gpus, ranks=ranks, engines=node == 0)


def memory_report(
    config: Config, devices: Devices, learner_dir: Path, explorer_dir: Path | None, *, ranks: int
) -> list[str]:
    """What every process and GPU of this node will hold. ConfigError where a GPU cannot hold it, or cannot read what
    it has to.

    devices: from `take_gpus`, whose order of the GPUs is the one in which torch is asked about them.
    """
    placement = devices.placement
    if config.rollout.weights == "device":
        _require_peers(config, placement)
    try:
        learner = _shape(learner_dir)
        explorer = _shape(explorer_dir) if explorer_dir is not None else None
    except ValueError as error:
        return [f"memory is not estimated: {error}"]
    bytes_of = _gpu_bytes(placement)
    vllm = engine_kind(config.engine, "cuda" if bytes_of else "cpu") == "vllm"
    return preflight(config, placement, bytes_of, learner=learner, explorer=explorer, ranks=ranks, vllm=vllm)


def _shape(directory: Path) -> ModelShape:
    return model_shape(json.loads((directory / "config.json").read_text("utf-8")))


def _order(placement: Placement) -> list[int]:
    """The placement's numbers in the order of `take_gpus`, in which torch counts."""
    return [*placement.trainer, *(gpu for gpu in range(placement.gpus) if gpu not in placement.trainer)]


def _gpu_bytes(placement: Placement) -> list[int]:
    """Total memory by the placement's numbers."""
    properties = {gpu: torch.cuda.get_device_properties(number) for number, gpu in enumerate(_order(placement))}
    return [int(properties[gpu].total_memory) for gpu in range(placement.gpus)]


def _require_peers(config: Config, placement: Placement) -> None:
    """ConfigError where a GPU that generates with the learner's weights cannot read rank 0's memory."""
    explorers = placement.explorer if config.rollout.roles == "handover" else ()
    order = _order(placement)
    for gpu in sorted({gpu for block in (*placement.learner, *explorers) for gpu in block} - {*placement.trainer[:1]}):
        if not torch.cuda.can_device_access_peer(order.index(gpu), 0):
            raise ConfigError(
                f'rollout.weights = "device": GPU {gpu}, which generates, cannot read the memory of GPU {order[0]}, '
                "where rank 0 trains (no peer access between them): use rollout.weights=memory, or other GPUs "
                "(placement.trainer, placement.learner)"
            )
