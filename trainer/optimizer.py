"""AdamW on fp32 master weights, with all gradients of an update in one flat fp32 buffer.

The flat buffer is what the ranks sum, what is clipped and what is checked for finite values. Gradients of bf16
parameters are added to it after every micro-batch, so that many small micro-batches lose no precision.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from core.config import Learner as LearnerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Parameters by name, their fp32 masters (themselves if they are fp32), AdamW moments and the flat gradient."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], settings: LearnerSettings) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        device = next(iter(self.parameters.values())).device
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters.values()), device=device)
        self.masters: dict[str, Tensor] = {}
        offset = 0
        for name, parameter in self.parameters.items():
            is_master = parameter.dtype == torch.float32
            master = parameter if is_master else parameter.detach().float().requires_grad_()
            master.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
            self.masters[name] = master
            offset += parameter.numel()
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.updates = 0  # applied, not skipped
        self.spent = False  # the flat gradient is the last update's

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return learning_rate(self.settings, self.updates)

    def zero_gradient(self) -> None:
        """Forget the last update's gradient."""
        self.gradient.zero_()
        self.spent = False

    def open_gradient(self, name: str) -> Tensor:
        """Where a parameter's gradient of the next update adds up: its place in the flat buffer, fp32."""
        if self.spent:
            self.zero_gradient()
        place = self.masters[name].grad
        assert place is not None
        return place

    def collect(self) -> None:
        """Move the gradients that a backward pass left in low-precision parameters into the flat buffer.

        fp32 parameters need no move: their `.grad` is a view of the buffer, into which autograd adds.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                assert master.grad is not None
                master.grad += parameter.grad
                parameter.grad = None

    def step(self, norm: float) -> None:
        """Clip the gradient, whose global norm is `norm`, to `grad_clip` and apply it."""
        if norm > self.settings.grad_clip:
            self.gradient.mul_(self.settings.grad_clip / norm)
        self._adamw.param_groups[0]["lr"] = self.learning_rate
        self._adamw.step()
        self.updates += 1
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.data.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Moments, and masters that are not the parameters themselves, by `kind.parameter name`."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            if self.updates:
                found |= {f"{kind}.{name}": self._adamw.state[master][kind] for kind in MOMENTS}
            if master is not self.parameters[name]:
                found[f"master.{name}"] = master.detach()
        return found

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take over what `tensors()` gave after `updates` updates, bit for bit."""
        self.updates = updates
        masters = {name for name, master in self.masters.items() if master is not self.parameters[name]}
        require_state(tensors.keys(), names=self.masters, masters=masters, updates=updates)
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.data.copy_(tensors[f"master.{name}"])
                self.parameters[name].data.copy_(master)
            if updates:
                moments = {kind: tensors[f"{kind}.{name}"].to(master.device, copy=True) for kind in MOMENTS}
                step = torch.tensor(float(updates), device=master.device)
                self._adamw.state[master] = {"step": step, **moments}


def learning_rate(settings: LearnerSettings, updates: int) -> float:
    """After `updates` updates: u/warmup_updates of the full rate at update u = 1, 2, …, then constant."""
    warmup = settings.warmup_updates
    return settings.learning_rate * (min(1.0, (updates + 1) / warmup) if warmup else 1.0)


def require_state(found: Iterable[str], *, names: Iterable[str], masters: Iterable[str], updates: int) -> None:
    """Raise ValueError unless `found` are the entries of these parameters' state after `updates` updates."""
    expected = {f"master.{name}" for name in masters}
    if updates:
        expected |= {f"{kind}.{name}" for name in names for kind in MOMENTS}
    different = sorted(expected ^ set(found))
    if different:
        raise ValueError(
            f"the optimizer state does not fit the model or learner.dtype: {len(different)} entries differ, "
            f"such as {different[0]}; resume with the model and dtype it was saved with"
        )
