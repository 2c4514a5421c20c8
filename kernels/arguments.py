"""The arguments every implementation of the loss takes, checked once.

Shapes: T tokens of a packed batch, S sequences in it, V vocabulary, H hidden size.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Ratio = Literal["token", "sequence", "cispo"]
Implementation = Literal["auto", "triton", "torch", "reference"]

LOG_RATIO_BOUND = 20.0
"""|log π_θ − log b| beyond this is clamped before exp, and has no gradient (verl's bound)."""
KL_BOUND = 10.0
"""The k3 value of a token beyond this is clamped, and has no gradient (verl's bound)."""


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the objective (design section 2, eq. 2); see `kernels.ops.policy_loss` for their meaning."""

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.ratio not in ("token", "sequence", "cispo"):
            raise ValueError(f"ratio must be token, sequence or cispo, got {self.ratio!r}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"clip_low must lie in [0, 1], got {self.clip_low}: the ratio is clipped below at 1 - clip_low"
            )
        if not self.clip_high >= 0:
            raise ValueError(
                f"clip_high must be at least 0, got {self.clip_high}: the ratio is clipped above at 1 + clip_high"
            )
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must exceed 1, got {self.dual_clip}; math.inf turns it off")
        if not (self.kl_coef >= 0 and math.isfinite(self.kl_coef)):
            raise ValueError(f"kl_coef must be finite and at least 0, got {self.kl_coef}")


@dataclass(frozen=True)
class LossRows:
    """What the loss knows of each token besides its log-prob; every tensor is [T], None means the neutral value.

    `mask` False takes the token out: its loss, metrics and gradient are 0 whatever its other entries hold.
    """

    anchor: Tensor
    advantage: Tensor
    is_weight: Tensor | None = None
    ref: Tensor | None = None
    kl_weight: Tensor | None = None
    mask: Tensor | None = None
    segments: "Segments | None" = None

    def span(self, start: int, stop: int, segments: "Segments | None" = None) -> "LossRows":
        """Rows [start, stop) as views, with the sequences inside them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return replace(
            self,
            anchor=self.anchor[start:stop],
            advantage=self.advantage[start:stop],
            is_weight=cut(self.is_weight),
            ref=cut(self.ref),
            kl_weight=cut(self.kl_weight),
            mask=cut(self.mask),
            segments=segments,
        )


@dataclass(frozen=True)
class Segments:
    """Sequence s owns tokens [offsets[s], offsets[s+1]) of the packed batch; an empty one owns none.

    Example: offsets [0, 3, 3, 5], bounds (0, 3, 3, 5), T = 5.
    """

    offsets: Tensor
    bounds: tuple[int, ...]

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: int, device: torch.device) -> "Segments":
        """From cu_seqlens [S+1]. A CUDA tensor costs a host sync, a CPU tensor does not."""
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 or int64 of shape [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        bounds = tuple(cu_seqlens.tolist())
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {bounds[:3]} ... {bounds[-3:]}")
        return Segments(cu_seqlens.to(device, torch.int64, non_blocking=True), bounds)

    def span(self, first: int, last: int) -> "Segments":
        """Sequences [first, last), with offsets that start at 0."""
        start = self.bounds[first]
        bounds = tuple(b - start for b in self.bounds[first : last + 1])
        return Segments(self.offsets[first : last + 1] - start, bounds)


def check_rows(name: str, value: Tensor | None, tokens: int) -> None:
    """Raises ValueError unless `value` is None or of shape [T]."""
    if value is not None and tuple(value.shape) != (tokens,):
        raise ValueError(f"{name} must have shape [{tokens}], one entry per token, got {list(value.shape)}")


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless hidden [T, H], weight [V, H] and targets [T] fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}; "
            "a weight of shape [0] is a ZeRO-3 shard: call the op inside the head's forward (kernels.head)"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    if hidden.device != weight.device or hidden.device != targets.device:
        raise ValueError(
            f"hidden, weight and targets must share a device, got {hidden.device}, {weight.device}, {targets.device}"
        )
    check_rows("targets", targets, hidden.shape[0])
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets must lie in [0, {weight.shape[0]}), got {low} to {high}; "
                "pass only rows that have a label (kernels.packing lists them)"
            )


def inverse_temperature(temperature: float | Tensor, tokens: int, like: Tensor) -> Tensor:
    """1/T per token, [T] in float32 (float64 for float64 inputs)."""
    dtype = working_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        check_rows("temperature", temperature, tokens)
        if temperature.device.type == "cpu" and temperature.numel() and not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be positive, got a minimum of {float(temperature.min())}")
        return temperature.detach().to(like.device, dtype).reciprocal()
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}; greedy rows have no log-prob")
    return torch.full((tokens,), 1.0 / temperature, dtype=dtype, device=like.device)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and losses: float32, or float64 when the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def implementation(impl: str, device: torch.device) -> str:
    """The implementation `impl` names on this device; raises ValueError for an unknown one."""
    if impl not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"impl must be auto, triton, torch or reference, got {impl!r}")
    if impl != "auto":
        return impl
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"impl='auto' knows cpu and cuda, got a tensor on {device}; name an implementation")
    return "torch" if device.type == "cpu" else "triton"
