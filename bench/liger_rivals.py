"""Liger 0.8's heads and GRPO losses on the common problem of `bench.kernels`."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.kernel_problem import Objective, Problem
from bench.rivals import Case, LogProb, scored, trained


def liger_chunked(tf32: bool) -> Callable[[Problem], Case]:
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`; its backward products are float32, so TF32 matters.

    Without use_ref_model it takes its own log-probs for the reference's, whatever it is given.
    """

    def make(problem: Problem) -> Case:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        objective = problem.objective
        loss_fn = LigerFusedLinearGRPOLoss(
            beta=objective.kl_coef, compiled=problem.hidden.is_cuda, use_ref_model=objective.kl_coef != 0,
            loss_type="bnpo", importance_sampling_level=objective.ratio, temperature=objective.temperature,
        )  # fmt: skip
        mask = problem.padded(torch.ones_like(problem.targets))
        targets, anchor, ref = (problem.padded(x) for x in (problem.targets, problem.anchor, problem.reference))

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            with _tf32(tf32):
                return loss_fn(
                    hidden, weight, targets, mask, problem.advantage, old_per_token_logps=anchor,
                    ref_per_token_logps=ref if objective.kl_coef else None,
                )[0]  # fmt: skip

        return trained(problem, loss_of, problem.padded(problem.hidden))

    return make


def liger_materialised(problem: Problem) -> Case:
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss` over full logits [B, L + 1, V]; to score,
    `fused_selective_log_softmax` of the same."""
    from liger_kernel.transformers import grpo_loss

    objective = problem.objective
    padded_hidden = problem.padded(problem.hidden)
    mask = None if problem.uniform else problem.padded(torch.ones_like(problem.targets))
    targets, anchor, ref = (problem.padded(x) for x in (problem.targets, problem.anchor, problem.reference))

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ weight.T

    def logprob_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = grpo_loss.fused_selective_log_softmax(
            logits(padded_hidden, weight), targets, objective.temperature, mask
        )
        return problem.select(problem.unpadded(logprob))

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return grpo_loss.triton_grpo_loss(
            logits(hidden, weight), anchor, ref if objective.kl_coef else None, targets, problem.advantage, mask,
            temperature=objective.temperature, beta=objective.kl_coef, eps_low=0.2, eps_high=0.2, loss_type="bnpo",
            importance_sampling_level=objective.ratio, reduce=True,
        )[0]  # fmt: skip

    return scored(problem, logprob_of) if objective.mode == "score" else trained(problem, loss_of, padded_hidden)


def liger_scaled(objective: Objective) -> LogProb:
    """`LigerFusedLinearScaledCrossEntropyFunction`: CuTe on sm_90, verl's PyTorch path elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        nll, entropy = Function.apply(hidden, weight, targets, objective.temperature, -100, 1, True)
        return -nll, entropy

    return logprob


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
