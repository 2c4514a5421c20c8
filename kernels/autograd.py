"""Where the chunked head meets autograd: three Functions, and nothing else decides what a backward pass keeps."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from kernels import row_torch
from kernels.arguments import LossRows, LossSettings
from kernels.chunked import Gradients, Head, add_gradients, loss_with_gradients, score
from kernels.reference import LogProb
from kernels.row_loss import RowLoss
from kernels.rows import METRICS, Backend, RowStatistics

RESIDENT_BYTES = 5 << 29
"""Logits that `linear_logprob` keeps for backward: 2.5 GiB, what a float32 weight gradient takes at H = 4096."""


def backend(name: str) -> Backend:
    """Row operations of "torch" or "triton"."""
    if name == "torch":
        return cast(Backend, row_torch)
    from kernels import row_triton  # Triton is absent on platforms that only run the torch path.

    return cast(Backend, row_triton)


@dataclass(frozen=True)
class HeadPlan:
    """How to run a head over a batch, apart from its two differentiable operands."""

    backend: Backend
    targets: Tensor
    inverse_temperature: Tensor
    fp32_logits: bool
    chunk_rows: int | None

    def head(self, hidden: Tensor, weight: Tensor) -> Head:
        dtype = self.backend.compute_dtype(hidden.dtype)
        logits = self.backend.logits_dtype(hidden.dtype, self.fp32_logits)
        rows = self.chunk_rows or default_chunk_rows(self.backend, weight.shape[0], logits.itemsize)
        if rows < 16 or rows % 16:
            raise ValueError(f"chunk_rows must be a positive multiple of 16, got {rows}")
        operands = hidden.detach().to(dtype).contiguous(), weight.detach().to(dtype)
        return Head(self.backend, *operands, self.targets, self.inverse_temperature, rows, logits)


def default_chunk_rows(rows: Backend, vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk of logits within the backend's budget: a multiple of 256, the larger of a product's tiles, or
    of 16."""
    most = max(16, min(rows.CHUNK_ROWS, rows.CHUNK_BYTES // (vocabulary * itemsize)))
    return most // 256 * 256 if most >= 256 else most // 16 * 16


def linear_logprob(hidden: Tensor, weight: Tensor, plan: HeadPlan, resident: bool | None) -> LogProb:
    """See `kernels.ops.linear_logprob`."""
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        stats = score(plan.head(hidden, weight))
        return LogProb(stats.logprob, stats.entropy)
    return LogProb(*_LinearLogprob.apply(hidden, weight, plan, resident))


class _LinearLogprob(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, plan: HeadPlan, resident: bool | None
    ) -> tuple[Tensor, Tensor]:
        head = plan.head(hidden, weight)
        size = head.tokens * weight.shape[0] * head.logits_dtype.itemsize
        keep = size <= RESIDENT_BYTES if resident is None else resident
        ctx.kept = head.buffer(len(head.spans())) if keep else None
        stats = score(head, ctx.kept)
        ctx.plan, ctx.stats = plan, stats
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)
        return stats.logprob.clone(), stats.entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        stats: RowStatistics = _take(ctx, "stats")
        kept, ctx.kept = ctx.kept, None
        head = ctx.plan.head(hidden, weight)
        into = Gradients(head, hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1])
        g = torch.zeros_like(stats.logprob) if grad_logprob is None else grad_logprob
        add_gradients(head, into, stats, g, grad_entropy, kept)
        return _cast(into.hidden, hidden.dtype), _cast(into.weight, weight.dtype), None, None


@dataclass(frozen=True)
class LossJob:
    """Everything of `linear_policy_loss` but the head's two operands."""

    plan: HeadPlan
    rows: LossRows
    settings: LossSettings
    token_weight: Tensor
    entropy_coef: float
    main_grad: Tensor | None

    def run(self, hidden: Tensor, weight: Tensor, *, want_hidden: bool, want_weight: bool) -> tuple[Gradients, list]:
        head = self.plan.head(hidden, weight)
        into = Gradients(head, hidden=want_hidden, weight=want_weight, main_grad=self.main_grad)
        fused = loss_with_gradients(head, self.rows, self.settings, self.token_weight, self.entropy_coef, into)
        metrics = [fused.metrics[name] for name in METRICS]
        return into, [fused.loss, fused.stats.logprob, fused.stats.entropy, *metrics]


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, job: LossJob
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """See `kernels.ops.linear_policy_loss`."""
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if job.main_grad is not None:
        _check_main_grad(job.main_grad, weight, grad)
    if grad:
        outputs = _LinearPolicyLoss.apply(hidden, weight, job)
    else:
        outputs = job.run(hidden, weight, want_hidden=False, want_weight=False)[1]
    loss, logprob, entropy, *metrics = outputs
    return loss, logprob, entropy, dict(zip(METRICS, metrics))


class _LinearPolicyLoss(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: LossJob) -> tuple[Tensor, ...]:
        want_hidden, want_weight, _ = ctx.needs_input_grad
        into, outputs = job.run(hidden, weight, want_hidden=want_hidden, want_weight=want_weight)
        # In float32 until they are scaled, so that they are rounded once.
        ctx.gradients = into.hidden, None if job.main_grad is not None else into.weight
        ctx.dtypes, ctx.scaled = (hidden.dtype, weight.dtype), job.plan.backend.scaled
        ctx.in_place = job.main_grad is not None
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = _take(ctx, "gradients")
        if ctx.in_place:
            # Asynchronous on a GPU: main_grad already holds the gradient for an upstream of exactly 1.
            torch._assert_async(
                grad_loss == 1, "main_grad needs an upstream gradient of 1: put factors in token_weight"
            )
            return _cast(d_hidden, ctx.dtypes[0]), None, None
        pairs = zip((d_hidden, d_weight), ctx.dtypes)
        return *(None if d is None else ctx.scaled(d, grad_loss, dtype) for d, dtype in pairs), None


def policy_loss(
    logprob: Tensor, rows: LossRows, settings: LossSettings, ops: Backend
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `kernels.ops.policy_loss`."""
    losses = ops.row_loss(logprob.detach(), rows, settings)
    return _PolicyLoss.apply(logprob, losses), losses.metrics


class _PolicyLoss(Function):
    @staticmethod
    def forward(ctx: Any, logprob: Tensor, losses: RowLoss) -> Tensor:
        # Without the loss itself: an output kept by its own context would never be freed.
        ctx.losses = replace(losses, loss=losses.slope)
        return losses.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        return ctx.losses.gradient(grad_loss), None


def _take(ctx: Any, name: str) -> Any:
    """The context's attribute, once: its first use scaled the gradients, or overwrote the logits, in place."""
    value = getattr(ctx, name)
    if value is None:
        raise RuntimeError("this pass already ran backward; retain_graph is not supported: call the op again")
    setattr(ctx, name, None)
    return value


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _check_main_grad(main_grad: Tensor, weight: Tensor, grad: bool) -> None:
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad must have the weight's shape {list(weight.shape)} and device {weight.device}, "
            f"got {list(main_grad.shape)} on {main_grad.device}"
        )
    if not (grad and weight.requires_grad):
        raise ValueError("main_grad needs grad mode and a weight that requires grad: gradients are formed in forward")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and "checkpoint" in hooks[0].__module__:
        raise ValueError(
            "main_grad inside activation checkpointing would be added to twice: keep the head outside of it"
        )
