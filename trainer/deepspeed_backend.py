"""DeepSpeed as the backend: ZeRO stages 0 to 3, offload, bf16 with fp32 masters. The only file that imports it.

What is ours and not DeepSpeed's: when an update is skipped, the learning rate, the checkpoint (whole tensors by name,
nothing pickled), and the sum over micro-batches and ranks where DeepSpeed takes a mean.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.config import Learner as LearnerSettings
from core.memory import reduce_bucket
from kernels.head import LogprobModel
from trainer.objective import Forward
from trainer.optimizer import MOMENTS, learning_rate, require_state
from trainer.start_weights import StartWeights
from trainer.world import World

PERSISTENT_ELEMENTS = 100_000  # stage 3 leaves smaller parameters whole: gathering them costs more than holding them


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out at the price of minutes or of an MPI installation."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It calls collectives by the names of earlier versions of torch, and so warns in every update.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A JIT build of minutes that only speeds up reductions in shared memory; a killed one hangs the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class GatedAdamW(torch.optim.AdamW):
    """AdamW that does nothing while its gate is closed: a skipped update then passes through DeepSpeed's own step."""

    open = True

    def prime(self, tensors: list[Tensor]) -> None:
        """Make the state that a first step would make, so that it can be written and read before it."""
        for tensor in tensors:
            moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
            self.state[tensor] = {"step": torch.zeros((), device=tensor.device), **moments}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients, if the gate is open."""
        if self.open:
            super().step(closure)


class DeepSpeedBackend:
    """One DeepSpeed engine around the model; `backend.Backend` says what the methods do.

    Stage 0 in bf16 adds micro-batches up in bf16 and stages 1 to 3 in fp32; gradients travel in fp32.
    """

    def __init__(self, model: PreTrainedModel, settings: LearnerSettings, world: World) -> None:
        self.deepspeed = _import_deepspeed(world.device)
        self.settings, self.world = settings, world
        self.dtype, self.stage = model.dtype, settings.zero_stage
        self.parameters = dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.updates = 0
        self.bucket = reduce_bucket(sum(parameter.numel() for parameter in self.trained.values()))
        module = self._shard(LogprobModel(model))
        self.adamw = GatedAdamW(
            list(self.trained.values()),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.engine, *_ = self.deepspeed.initialize(model=module, optimizer=self.adamw, config=self._config())
        self.forward: Forward = self.engine
        release = {"release": self.engine.optimizer.empty_partition_cache} if self.stage == 3 else {}
        self.start = StartWeights(self.trained.values(), **release)
        self._link_state()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return learning_rate(self.settings, self.updates)

    def frozen(self, model: PreTrainedModel) -> Forward:
        """Sharded too at stage 3, else whole on every rank."""
        module = LogprobModel(model)
        if self.stage < 3:
            return module
        config = self._config()
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = self.deepspeed.initialize(model=self._shard(module), config=config)
        return engine

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over ranks; `scale_wrt_gas` would average over micro-batches."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, *, apply: bool) -> float:
        """DeepSpeed skips by itself where its norm is not finite, which stage 0 in fp32 does not look at."""
        plain = self.stage == 0 and self.dtype == torch.float32
        norm = self._clip_plain() if plain else math.nan
        self.adamw.open = apply and (not plain or math.isfinite(norm))
        self.adamw.param_groups[0]["lr"] = self.learning_rate
        self.engine.step()
        if not plain:
            norm = float(self.engine.get_global_grad_norm())
            if getattr(self.engine.optimizer, "overflow", False) or norm < 0:
                norm = math.inf
        self.updates += self.adamw.open and math.isfinite(norm)
        return norm

    def weights(self, *, trained: bool = False, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Stages 0 to 2 hold them whole; stage 3 gathers one after the other, and gives copies."""
        for name, parameter in (self.trained if trained else self.parameters).items():
            gathered = self.deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else nullcontext()
            with gathered:
                whole = parameter.detach()
                yield name, whole if self.stage < 3 else whole.cpu() if on_host else whole.clone()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Gathered one tensor after the other."""
        for name, parameter in self.trained.items():
            if self.updates:
                for kind in MOMENTS:
                    yield f"{kind}.{name}", self._whole(name, parameter, kind)
            if self.dtype != torch.float32:
                yield f"master.{name}", self._whole(name, parameter, None)

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Every rank reads every tensor and keeps its part."""
        masters = self.trained if self.dtype != torch.float32 else ()
        require_state(state.keys(), names=self.trained, masters=masters, updates=updates)
        self.updates = updates
        for name, parameter in self.trained.items():
            if masters:
                self._keep(name, parameter, None, state[f"master.{name}"])
            for kind in MOMENTS if updates else ():
                self._keep(name, parameter, kind, state[f"{kind}.{name}"])
        for entry in self.adamw.state.values():
            entry["step"].fill_(updates)

    def _config(self) -> dict[str, Any]:
        settings, low_precision = self.settings, self.dtype == torch.bfloat16
        zero: dict[str, Any] = {
            "stage": self.stage,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "reduce_bucket_size": self.bucket,
        }
        if settings.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        if settings.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0 if self.stage == 0 and not low_precision else settings.grad_clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # ours is torch's
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host without a build
            "communication_data_type": "fp32",
            "bf16": {"enabled": low_precision, "check_grad_overflow": True},
        }
        if low_precision and self.stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    def _shard(self, module: nn.Module) -> nn.Module:
        """Stage 3 takes the parameters over one by one, so that the device never holds all of them."""
        if self.stage == 3:
            self.deepspeed.zero.Init(module=module, config_dict_or_path=self._config(), dtype=self.dtype)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.world.device)
        return module

    def _link_state(self) -> None:
        """DeepSpeed finds AdamW's state after a first step; it is made and found now, so that it can be restored."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            self.adamw.prime(optimizer.fp32_partitioned_groups_flat)
            return
        self.adamw.prime(self.adamw.param_groups[0]["params"])
        if self.stage:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> dict[str, Tensor]:
        """Stage 0: what AdamW updates, whole, in the parameters' order."""
        return dict(zip(self.trained, self.adamw.param_groups[0]["params"], strict=True))

    def _whole(self, name: str, parameter: Any, kind: str | None) -> Tensor:
        """A moment, or the fp32 master where `kind` is None, of a whole parameter."""
        if self.stage == 0:
            master = self._masters()[name]
            return (self.adamw.state[master][kind] if kind else master).detach()
        utils = self.deepspeed.utils
        whole = (
            utils.safe_get_full_optimizer_state(parameter, kind) if kind else utils.safe_get_full_fp32_param(parameter)
        )
        return whole.view(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def _keep(self, name: str, parameter: nn.Parameter, kind: str | None, value: Tensor) -> None:
        value = value.to(self.world.device)
        if self.stage == 0:
            master = self._masters()[name]
            (self.adamw.state[master][kind] if kind else master.data).copy_(value)
        elif kind:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    def _clip_plain(self) -> float:
        """Stage 0 in fp32, where DeepSpeed clips without a finite check and keeps no norm."""
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if norm > self.settings.grad_clip and math.isfinite(norm):
            for gradient in gradients:
                gradient.mul_(self.settings.grad_clip / norm)
        return norm
