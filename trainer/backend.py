"""What applies an update: plain data-parallel torch here, DeepSpeed in `deepspeed_backend`.

All methods are collectives: every rank calls them in the same order.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.config import Learner as LearnerSettings
from kernels.head import LogprobHead, LogprobModel
from trainer.attention import use_packed_attention
from trainer.closed_forms import use_closed_forms
from trainer.models import DTYPES, load_model, use_liger
from trainer.objective import Forward
from trainer.optimizer import Optimizer
from trainer.recompute import changes_products
from trainer.sequence_parallel import share_attention
from trainer.start_weights import StartWeights
from trainer.world import World


class Backend(Protocol):
    """The trained model with its optimizer, however it is spread over the ranks.

    Example: for loss in losses: backend.backward(loss, last=...); norm = backend.step(apply=True)
    """

    forward: Forward
    start: StartWeights

    @property
    def updates(self) -> int:
        """Applied, not skipped."""

    @property
    def learning_rate(self) -> float:
        """Of the next update."""

    def frozen(self, model: PreTrainedModel) -> Forward:
        """A model that is only scored with, spread as the trained one is."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss` to those of the update, whose gradient is the sum over micro-batches and ranks.

        `last` is the update's last micro-batch of this rank.
        """

    def step(self, *, apply: bool) -> float:
        """Clip and apply the update and forget its gradient. Returns the gradient's global norm before clipping.

        Where `apply` is False, or some rank's gradient is not finite, nothing changes on any rank; the norm of a
        gradient that is not finite is not finite either.
        """

    def weights(self, *, trained: bool = False, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, or those that train, whole, by its name in the model; a tied one once.

        `on_host`: what is gathered only for this comes in host memory, so that a device never holds all of it.
        """

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a resumed run needs besides the weights: `exp_avg.NAME`, `exp_avg_sq.NAME` and, below fp32,
        `master.NAME`; whole tensors, so that any backend on any number of ranks takes them over."""

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over what `state` gave after `updates` updates, bit for bit. ValueError where it does not fit."""


class TorchBackend:
    """Every rank holds the whole model and optimizer; summed gradients keep the ranks equal.

    The gradient of the head's weight [V, H] is formed in the flat fp32 gradient itself, in the forward pass. (DeepSpeed
    owns its gradients and takes autograd's.)
    """

    def __init__(self, model: PreTrainedModel, settings: LearnerSettings, world: World) -> None:
        self.world = world
        self.parameters = dict(model.named_parameters())
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.optimizer = Optimizer(trained, settings)
        self.forward: Forward = LogprobModel(model)
        self.start = StartWeights(trained.values())
        head = LogprobHead.install(model)
        for name, parameter in trained.items():
            if parameter is head.weight and settings.kernels != "reference":  # which leaves gradients to autograd
                head.main_grad = partial(self.optimizer.open_gradient, name)

    @property
    def updates(self) -> int:
        """Applied, not skipped."""
        return self.optimizer.updates

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.optimizer.learning_rate

    def frozen(self, model: PreTrainedModel) -> Forward:
        """The model, whole on every rank."""
        return LogprobModel(model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the flat gradient, where the head's part is already; sum it over the ranks after the last."""
        if self.optimizer.spent:
            self.optimizer.zero_gradient()
        torch.autograd.backward(loss)
        self.optimizer.collect()
        if last:
            self.world.sum_(self.optimizer.gradient)

    def step(self, *, apply: bool) -> float:
        """Clip and apply, if the norm is finite."""
        norm = torch.linalg.vector_norm(self.optimizer.gradient)
        value = float(norm)
        if apply and bool(norm.isfinite()):
            self.optimizer.step(value)
        self.optimizer.spent = True
        return value

    def weights(self, *, trained: bool = False, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The parameters themselves."""
        for name, parameter in (self.optimizer.parameters if trained else self.parameters).items():
            yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Moments and masters."""
        yield from self.optimizer.tensors().items()

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over moments and masters."""
        self.optimizer.restore(state, updates)


def require_backend(settings: LearnerSettings) -> None:
    """ValueError where DeepSpeed is asked for and not installed."""
    if settings.backend == "deepspeed" and not importlib.util.find_spec("deepspeed"):
        raise ValueError(
            'learner.backend = "deepspeed" and DeepSpeed is not installed: pip install "deepspeed>=0.19.8,<0.20", or '
            "use learner.backend=torch"
        )


def make_backend(model: PreTrainedModel, settings: LearnerSettings, world: World) -> Backend:
    """What `learner.backend` names; ValueError as `require_backend` says."""
    require_backend(settings)
    if settings.backend == "torch":
        return TorchBackend(model, settings, world)
    from trainer.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(model, settings, world)


def read_model(directory: Path, settings: LearnerSettings, world: World, key: str) -> PreTrainedModel:
    """A model to train or to score with, for `settings`; `models.load_model` says what it refuses.

    It is read to the host where each device only ever holds a part of it.
    """
    sharded = settings.backend == "deepspeed" and settings.zero_stage == 3
    device = torch.device("cpu") if sharded else world.device
    model = load_model(directory, dtype=DTYPES[settings.dtype], device=device, key=key)
    if world.line is not None:
        share_attention(model, world, key)
    elif settings.micro_batch_tokens:
        use_packed_attention(model)
    if settings.liger and world.device.type == "cuda":
        use_liger(model, rotary=settings.recompute == "full" or not changes_products(model))
    elif world.device.type == "cpu":
        use_closed_forms(model)
    return model
