"""Everybody's fused head with a GRPO loss, called as its own documentation says, on one common problem.

A case is a function of no arguments that runs what the objective's mode asks for: it returns (loss, d_hidden,
d_weight), (loss, d_hidden) or (log-probs of the rows with a label,).
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.kernel_problem import Objective, Problem, Rows
from kernels import ops, reference
from kernels.arguments import Implementation, LossRows, LossSettings, Segments

Outcome = tuple[Tensor, ...]
Case = Callable[[], Outcome]
LogProb = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(hidden, weight, targets) -> log-prob and entropy of each row; None where no entropy was asked for or offered."""
Given = Literal["labelled", "all", "padded"]
LOSS_OPTIONS = frozenset({"KL", "sequence ratio"})
"""What our own loss over a contender's log-probs adds."""
EVERY_OPTION = LOSS_OPTIONS | {"temperature", "entropy", "frozen head", "scoring"}


@dataclass(frozen=True)
class Rival:
    """One contender: how to make its case from a problem, what must be importable, and what it can be asked for.

    given: the rows its head multiplies: those with a label, all of the batch, or the answers padded to the longest.
    offers: names of `Objective.options`. same_loss False: it computes something else, as a bar for the time.
    """

    name: str
    make: Callable[[Problem], Case]
    needs: tuple[str, ...] = ()
    cuda_only: bool = True
    same_loss: bool = True
    given: Given = "all"
    offers: frozenset[str] = EVERY_OPTION

    def missing(self, device: str, objective: Objective) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda_only and device != "cuda":
            return "needs a CUDA device"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        lacks = [name for name in objective.options if name not in self.offers]
        return f"has no option for: {', '.join(lacks)}" if lacks else None

    def head_rows(self, problem: Problem) -> int:
        """Rows of logits it forms."""
        counts = {"labelled": problem.labels, "all": problem.tokens}
        return counts.get(self.given, problem.sequences * max(problem.answers))


def ours(impl: Implementation, **options: Any) -> Callable[[Problem], Case]:
    """`kernels.ops` on the rows with a label, selected as part of the case, as the trainer's model does it.

    Token mean, no dual clip (the rivals have none).
    """

    def make(problem: Problem) -> Case:
        objective, rows = problem.objective, problem.labelled_rows()
        head: dict[str, Any] = {"temperature": objective.temperature, "impl": impl, **options}
        main_grad = None
        if head.pop("in_place", False):
            main_grad = torch.zeros(problem.weight.shape, device=problem.weight.device)

        def logprob_of(hidden: Tensor, weight: Tensor) -> Tensor:
            return ops.linear_logprob(problem.select(hidden), weight, rows.targets, **head).logprob

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            if main_grad is not None:
                main_grad.zero_()
            return ops.linear_policy_loss(
                problem.select(hidden), weight, rows.targets, rows.anchor, rows.advantage, token_weight=rows.share,
                entropy_coef=objective.entropy_coef, main_grad=main_grad, **head, **_loss_options(objective, rows),
            )[0]  # fmt: skip

        if objective.mode == "score":
            return scored(problem, logprob_of)
        case = trained(problem, loss_of)
        return case if main_grad is None else lambda: (*case(), main_grad)

    return make


def on_logprobs(
    load: Callable[[Objective], LogProb], *, selected: bool = False, ignored: int | None = None
) -> Callable[[Problem], Case]:
    """A rival that ends at log-probs, under our own fused loss, so that the comparison goes from hidden to gradients.

    It gets every row of the batch, or the rows with a label, `selected` as part of the case, where its own trainer does
    so. ignored: the target by which a row without a label is named to it.
    """

    def make(problem: Problem) -> Case:
        head, objective = load(problem.objective), problem.objective
        rows = problem.labelled_rows() if selected else problem.rows()
        targets = rows.targets
        if ignored is not None and rows.mask is not None:
            targets = targets.masked_fill(~rows.mask, ignored)

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            return head(problem.select(hidden) if selected else hidden, weight, targets)

        def logprob_of(hidden: Tensor, weight: Tensor) -> Tensor:
            logprob = run(hidden, weight)[0]
            return logprob if rows.mask is None else logprob[rows.mask]

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            logprob, entropy = run(hidden, weight)
            loss, _ = ops.policy_loss(
                logprob, rows.anchor, rows.advantage, mask=rows.mask, **_loss_options(objective, rows)
            )
            return _weighted(loss, entropy, objective, rows)

        return scored(problem, logprob_of) if objective.mode == "score" else trained(problem, loss_of)

    return make


def trained(problem: Problem, loss_of: Callable[[Tensor, Tensor], Tensor], padded_hidden: Tensor | None = None) -> Case:
    """Forward and backward of a loss of (hidden, weight): the loss and the gradients that the mode asks for.

    padded_hidden: what `loss_of` is given instead of the packed rows; a model that pads its rows has them so.
    """
    states = problem.hidden if padded_hidden is None else padded_hidden

    def case() -> Outcome:
        hidden = states.detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_(problem.objective.mode == "train")
        loss = loss_of(hidden, weight)
        loss.backward()
        gradients = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
        if padded_hidden is not None:
            gradients[0] = problem.unpadded(gradients[0])
        return loss.detach(), *gradients

    return case


def scored(problem: Problem, logprob_of: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Log-probs [R] without grad."""

    def case() -> Outcome:
        with torch.no_grad():
            return (logprob_of(problem.hidden, problem.weight),)

    return case


def eager(objective: Objective) -> LogProb:
    """What a trainer writes first: all logits, log_softmax in float32, autograd."""

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = (hidden @ weight.T).float()
        if objective.temperature != 1:
            logits = logits.div_(objective.temperature)
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1) if objective.entropy_coef else None
        return log_p.gather(1, targets[:, None])[:, 0], entropy

    return logprob


def compiled(problem: Problem) -> Case:
    """The same under torch.compile, loss and all."""
    head, objective, rows = eager(problem.objective), problem.objective, problem.rows()
    options = _loss_options(objective, rows)
    segments = Segments.of(rows.bounds, problem.tokens, problem.hidden.device)
    loss_rows = LossRows(rows.anchor, rows.advantage, ref=options.pop("ref_logprob"), mask=rows.mask, segments=segments)
    options.pop("cu_seqlens")
    settings = LossSettings(**options)

    @torch.compile
    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob, entropy = head(hidden, weight, rows.targets)
        return _weighted(reference.policy_loss(logprob, loss_rows, settings)[0], entropy, objective, rows)

    @torch.compile
    def logprob_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = head(hidden, weight, rows.targets)[0]
        return logprob if rows.mask is None else problem.select(logprob)

    return scored(problem, logprob_of) if objective.mode == "score" else trained(problem, loss_of)


def bare_products(problem: Problem) -> Case:
    """The mode's matrix products of the rows with a label and nothing else: the floor of the run."""
    mode, hidden, weight = problem.objective.mode, problem.select(problem.hidden), problem.weight
    out = torch.empty(len(hidden), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    wide: dict[str, Any] = {"out_dtype": torch.float32} if out.is_cuda and out.dtype != torch.float32 else {}

    def case() -> Outcome:
        torch.mm(hidden, weight.t(), out=out)
        results = [out[0, 0]]
        if mode != "score":
            results.append(torch.mm(out, weight))
        if mode == "train":
            results.append(torch.mm(out.t(), hidden, **wide))
        return tuple(results)

    return case


def _loss_options(objective: Objective, rows: Rows) -> dict[str, Any]:
    """Of `kernels.ops`' losses; the rivals have no dual clip."""
    return {
        "dual_clip": math.inf,
        "kl_coef": objective.kl_coef,
        "ref_logprob": rows.reference if objective.kl_coef else None,
        "ratio": objective.ratio,
        "cu_seqlens": rows.bounds,
    }


def _weighted(loss: Tensor, entropy: Tensor | None, objective: Objective, rows: Rows) -> Tensor:
    if objective.entropy_coef:
        assert entropy is not None
        loss = loss - objective.entropy_coef * entropy
    return (rows.share * loss).sum()
