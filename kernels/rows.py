"""What row operations return and take: one entry per row of a chunk of logits."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.arguments import LossRows, LossSettings
from kernels.row_loss import RowLoss

METRICS = ("ratio", "clipped_low", "clipped_high", "dual_clipped", "kl")


class RowStatistics(NamedTuple):
    """Of z = logits / temperature per row: log-prob of the target and entropy (nats), max z, log Σ e^{z − max}."""

    logprob: Tensor
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor


class RowWeights(NamedTuple):
    """∂L/∂loss_t = token weight, and ∂L/∂entropy_t = −token weight · entropy_coef (None when that is 0)."""

    loss: Tensor
    entropy: Tensor | None


class RowResult(NamedTuple):
    """Statistics, loss and metrics per row, and the logits' gradient of the whole chunk."""

    stats: RowStatistics
    loss: Tensor
    metrics: dict[str, Tensor]
    dz: Tensor


class Backend(Protocol):
    """Row operations of one implementation: the modules `kernels.row_torch` and `kernels.row_triton`.

    `gradient` and `loss_and_gradient` return the logits' gradient in `dtype`, that of the products' operands, as a view
    into the logits' own memory.
    """

    CHUNK_BYTES: int
    CHUNK_ROWS: int

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the products' operands for hidden states and weights of `dtype`."""

    def logits_dtype(self, dtype: torch.dtype, fp32_logits: bool) -> torch.dtype:
        """Dtype of the chunk of logits."""

    def statistics(self, logits: Tensor, targets: Tensor, inverse_temperature: Tensor) -> RowStatistics: ...

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        inverse_temperature: Tensor,
        stats: RowStatistics,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor: ...

    def row_loss(self, logprob: Tensor, rows: LossRows, settings: LossSettings) -> RowLoss: ...

    def loss_and_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        inverse_temperature: Tensor,
        rows: LossRows,
        weights: RowWeights,
        settings: LossSettings,
        dtype: torch.dtype,
    ) -> RowResult: ...

    def scaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """gradient·factor (a scalar on its device) in `dtype`; takes the gradient's memory where it can."""
