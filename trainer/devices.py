"""This node's GPUs: who gets which (core.placement), told to torch and to workers by CUDA_VISIBLE_DEVICES."""

import os
from typing import NamedTuple

import torch

from core.config import Config
from core.configkeys import ConfigError
from core.placement import Placement, place, visible_devices
from core.schema import Source


class Devices(NamedTuple):
    """The placement of this node and what CUDA_VISIBLE_DEVICES held when it was made.

    Example: Devices(placement=Placement(), inherited=None)
    """

    placement: Placement = Placement()
    inherited: str | None = None

    def of_worker(self, role: Source, index: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of a worker process; None where it inherits the trainer's."""
        blocks = self.placement.learner if role is Source.LEARNER else self.placement.explorer
        return visible_devices(blocks[index], self.inherited) if blocks else None


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
    return Devices(placement, inherited)


def find_placement(config: Config) -> Placement:
    """The placement on this node, from its visible GPUs and the ranks that torchrun starts here."""
    gpus = 0 if config.run.device == "cpu" else torch.cuda.device_count()
    ranks, node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("GROUP_RANK", "0"))
    return place(config, gpus, ranks=ranks, engines=node == 0)
