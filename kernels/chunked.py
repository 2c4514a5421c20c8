"""Log-probs, loss and gradients of a linear head, one chunk of logits at a time: nothing else is [tokens, V].

Every logits product has the same shape [C, H] x [H, V], the last chunk padded: a library may pick another algorithm,
and other roundings, for another shape, and then the log-probs that score a batch and those that train it would
differ.

Shapes: T tokens, C rows of a chunk, V vocabulary, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import products
from kernels.arguments import LossRows, LossSettings, Segments
from kernels.row_loss import weighted
from kernels.rows import Backend, RowResult, RowStatistics, RowWeights


@dataclass(frozen=True)
class Head:
    """A linear head applied to a packed batch: hidden [T, H] and weight [V, H] in the products' dtype, the rest [T]."""

    backend: Backend
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inverse_temperature: Tensor
    chunk_rows: int
    logits_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def spans(self) -> list[tuple[int, int]]:
        return [(a, min(a + self.chunk_rows, self.tokens)) for a in range(0, self.tokens, self.chunk_rows)]

    def buffer(self, chunks: int = 1) -> Tensor:
        rows = chunks * self.chunk_rows
        return torch.empty(rows, self.weight.shape[0], dtype=self.logits_dtype, device=self.hidden.device)

    def logits(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Logits of rows [start, stop) in `buffer` [C, V]."""
        rows = self.hidden[start:stop]
        if stop - start < self.chunk_rows:
            padded = rows.new_zeros(self.chunk_rows, rows.shape[1])
            padded[: stop - start] = rows
            rows = padded
        products.logits(rows, self.weight, out=buffer)
        return buffer[: stop - start]

    def row_arguments(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.targets[start:stop], self.inverse_temperature[start:stop]


class Gradients:
    """∂L/∂hidden and ∂L/∂weight, formed chunk by chunk; one that is not wanted costs no product and no memory."""

    def __init__(self, head: Head, *, hidden: bool, weight: bool, main_grad: Tensor | None = None) -> None:
        self.head = head
        self.hidden = torch.empty_like(head.hidden) if hidden else None
        self.weight = main_grad
        self.fresh = weight and main_grad is None
        if self.fresh:
            dtype = torch.promote_types(head.weight.dtype, torch.float32)
            self.weight = torch.empty(head.weight.shape, dtype=dtype, device=head.weight.device)
            if not head.tokens:
                self.weight.zero_()

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def add(self, dz: Tensor, start: int, stop: int) -> None:
        """Rows [start, stop), whose logits' gradient is dz [stop − start, V]."""
        if self.hidden is not None:
            products.hidden_gradient(dz, self.head.weight, out=self.hidden[start:stop])
        if self.weight is not None:
            products.weight_gradient(dz, self.head.hidden[start:stop], self.weight, first=self.fresh)
            self.fresh = False


def score(head: Head, keep: Tensor | None = None) -> RowStatistics:
    """Statistics of every row, one product in all; `keep` [≥ T rounded up to C, V] receives the logits."""
    buffer = head.buffer() if keep is None and head.tokens else keep
    parts = []
    for a, b in head.spans():
        assert buffer is not None
        place = buffer if keep is None else buffer[a : a + head.chunk_rows]
        parts.append(head.backend.statistics(head.logits(a, b, place), *head.row_arguments(a, b)))
    return _join(parts, head)


def add_gradients(
    head: Head,
    into: Gradients,
    stats: RowStatistics,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    kept: Tensor | None = None,
) -> None:
    """Backward pass of `score`: from kept logits (which it destroys), or from a second product."""
    buffer = head.buffer() if kept is None and head.tokens else None
    for a, b in head.spans():
        if kept is None:
            assert buffer is not None
            logits = head.logits(a, b, buffer)
        else:
            logits = kept[a:b]
        own = RowStatistics(*(s[a:b] for s in stats))
        e = None if grad_entropy is None else grad_entropy[a:b]
        dz = head.backend.gradient(logits, *head.row_arguments(a, b), own, grad_logprob[a:b], e, head.weight.dtype)
        into.add(dz, a, b)


@dataclass(frozen=True)
class Fused:
    """What the fused pass gives besides gradients: the scalar, and [T] vectors."""

    loss: Tensor
    stats: RowStatistics
    metrics: dict[str, Tensor]


def loss_with_gradients(
    head: Head, rows: LossRows, settings: LossSettings, token_weight: Tensor, entropy_coef: float, into: Gradients
) -> Fused:
    """Σ token_weight·(loss − entropy_coef·entropy), its gradients formed on the way: three products in all.

    A sequence ratio needs whole sequences in a chunk. Where one is longer than a chunk, the log-probs come from a
    pass of their own and the logits are formed twice: four products.
    """
    weights = RowWeights(token_weight, -entropy_coef * token_weight if entropy_coef else None)
    spans = _aligned_spans(head, rows.segments) if settings.ratio == "sequence" else _plain_spans(head)
    if spans is None or not into.wanted:
        stats = score(head)
        losses = head.backend.row_loss(stats.logprob, rows, settings)
        if into.wanted:
            add_gradients(head, into, stats, losses.gradient(weights.loss), weights.entropy)
        return _fused(stats, losses.loss, losses.metrics, weights)
    buffer = head.buffer() if spans else None
    parts: list[RowResult] = []
    for a, b, segments in spans:
        assert buffer is not None
        logits = head.logits(a, b, buffer)
        own = RowWeights(weights.loss[a:b], None if weights.entropy is None else weights.entropy[a:b])
        part = head.backend.loss_and_gradient(
            logits, *head.row_arguments(a, b), rows.span(a, b, segments), own, settings, head.weight.dtype
        )
        into.add(part.dz, a, b)
        parts.append(part)
    if not parts:
        losses = head.backend.row_loss(head.inverse_temperature, rows, settings)
        return _fused(_join([], head), losses.loss, losses.metrics, weights)
    metrics = {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics}
    loss = torch.cat([part.loss for part in parts])
    return _fused(_join([part.stats for part in parts], head), loss, metrics, weights)


def _fused(stats: RowStatistics, loss: Tensor, metrics: dict[str, Tensor], weights: RowWeights) -> Fused:
    total = weighted(weights.loss, loss)
    if weights.entropy is not None:
        total = total + weighted(weights.entropy, stats.entropy)
    return Fused(total.sum(), stats, metrics)


def _join(parts: list[RowStatistics], head: Head) -> RowStatistics:
    if not parts:
        return RowStatistics(*(torch.empty_like(head.inverse_temperature) for _ in RowStatistics._fields))
    return RowStatistics(*(torch.cat(columns) for columns in zip(*parts)))


def _plain_spans(head: Head) -> list[tuple[int, int, Segments | None]]:
    return [(a, b, None) for a, b in head.spans()]


def _aligned_spans(head: Head, segments: Segments | None) -> list[tuple[int, int, Segments | None]] | None:
    """Spans of whole sequences, each at most a chunk; None if one sequence is longer than that."""
    assert segments is not None
    spans: list[tuple[int, int, Segments | None]] = []
    first, bounds = 0, segments.bounds
    for last in range(1, len(bounds)):
        if bounds[last] - bounds[last - 1] > head.chunk_rows:
            return None
        full = last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > head.chunk_rows
        if full and bounds[last] > bounds[first]:
            spans.append((bounds[first], bounds[last], segments.span(first, last)))
            first = last
    return spans
