"""Everybody's fused head with a GRPO loss, called as its own documentation says, on one common problem.

A case is a function of no arguments that runs forward and backward and returns (loss, d_hidden, d_weight). Sources are
the published wheels; a single file of a large package is loaded without the package's own imports.
"""

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.arguments import Implementation

Outcome = tuple[Tensor, Tensor, Tensor]
Case = Callable[[], Outcome]


@dataclass(frozen=True)
class Problem:
    """B sequences of L tokens (T = B·L), behaviour log-probs near the head's own, one advantage per sequence."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    anchor: Tensor
    advantage: Tensor
    sequences: int

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @staticmethod
    def make(
        sequences: int, length: int, hidden: int, vocabulary: int, *, dtype: torch.dtype, device: str
    ) -> "Problem":
        """Logits of deviation 3, and 7 in 10 targets 10 to 20 nats above them, since uniform rows flatter a filter."""
        generator = torch.Generator(device).manual_seed(0)
        tokens = sequences * length
        at: dict[str, Any] = {"generator": generator, "device": device}
        weight = torch.randn(vocabulary, hidden, **at).mul_(3 / math.sqrt(hidden))
        states = torch.randn(tokens, hidden, **at)
        targets = torch.randint(0, vocabulary, (tokens,), **at)
        planted = (torch.rand(tokens, **at) < 0.7) * (10 + 10 * torch.rand(tokens, **at))
        direction = weight[targets]
        states += (planted / direction.square().sum(1))[:, None] * direction
        states, weight = states.to(dtype), weight.to(dtype)
        exact = ops.linear_logprob(states, weight, targets).logprob
        far = 3 * torch.randn(tokens, **at) * (torch.rand(tokens, **at) < 0.02)
        anchor = exact + 0.1 * torch.randn(tokens, **at) + far
        return Problem(states, weight, targets, anchor, torch.randn(sequences, **at), sequences)

    def per_token(self) -> Tensor:
        return self.advantage.repeat_interleave(self.tokens // self.sequences)

    def padded(self, value: Tensor) -> Tensor:
        return value.view(self.sequences, -1, *value.shape[1:])

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


@dataclass(frozen=True)
class Rival:
    """One contender: what must be importable, and how to make its case from a problem."""

    name: str
    make: Callable[[Problem], Case]
    needs: tuple[str, ...] = ()
    cuda_only: bool = True
    same_loss: bool = True

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda_only and device != "cuda":
            return "needs a CUDA device"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def ours(impl: Implementation, **options: Any) -> Callable[[Problem], Case]:
    """`kernels.ops.linear_policy_loss`, token mean, no dual clip (the rivals have none)."""

    def make(problem: Problem) -> Case:
        advantage = problem.per_token()
        share = torch.full_like(advantage, 1 / problem.tokens)
        extra = dict(options)
        if extra.pop("in_place", False):
            extra["main_grad"] = torch.zeros(problem.weight.shape, device=problem.weight.device)

        def case() -> Outcome:
            hidden, weight = problem.leaves()
            main_grad = extra.get("main_grad")
            if main_grad is not None:
                main_grad.zero_()
            loss, *_ = ops.linear_policy_loss(
                hidden, weight, problem.targets, problem.anchor, advantage,
                token_weight=share, dual_clip=math.inf, impl=impl, **extra,
            )  # fmt: skip
            loss.backward()
            return loss.detach(), _grad(hidden), _grad(weight) if main_grad is None else main_grad

        return case

    return make


def on_logprobs(logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Case]:
    """A rival that ends at log-probs, under our own fused loss, so that the comparison goes from hidden to
    gradients."""

    def make(problem: Problem) -> Case:
        advantage = problem.per_token()

        def case() -> Outcome:
            hidden, weight = problem.leaves()
            log_p = logprob(hidden, weight, problem.targets)
            loss, _ = ops.policy_loss(log_p, problem.anchor, advantage, dual_clip=math.inf)
            mean = loss.mean()
            mean.backward()
            return mean.detach(), _grad(hidden), _grad(weight)

        return case

    return make


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a trainer writes first: all logits, log_softmax in float32, autograd."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def compiled(problem: Problem) -> Case:
    """The same under torch.compile, loss and all."""

    def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor, anchor: Tensor, advantage: Tensor) -> Tensor:
        ratio = (eager(hidden, weight, targets) - anchor).clamp(-20, 20).exp()
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()

    fast = torch.compile(loss_of)
    advantage = problem.per_token()

    def case() -> Outcome:
        hidden, weight = problem.leaves()
        loss = fast(hidden, weight, problem.targets, problem.anchor, advantage)
        loss.backward()
        return loss.detach(), _grad(hidden), _grad(weight)

    return case


def liger_chunked(tf32: bool) -> Callable[[Problem], Case]:
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`; its backward products are float32, so TF32 matters."""

    def make(problem: Problem) -> Case:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss_of = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=problem.hidden.is_cuda, use_ref_model=False, loss_type="bnpo"
        )
        mask = torch.ones_like(problem.padded(problem.targets))

        def case() -> Outcome:
            hidden, weight = problem.leaves()
            with _tf32(tf32):
                loss, _ = loss_of(
                    problem.padded(hidden), weight, problem.padded(problem.targets), mask, problem.advantage,
                    old_per_token_logps=problem.padded(problem.anchor),
                )  # fmt: skip
                loss.backward()
            return loss.detach(), _grad(hidden), _grad(weight)

        return case

    return make


def liger_materialised(problem: Problem) -> Case:
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss` over full logits [B, L + 1, V]."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def case() -> Outcome:
        hidden, weight = problem.leaves()
        states = torch.nn.functional.pad(problem.padded(hidden), (0, 0, 0, 1))
        loss, *_ = triton_grpo_loss(
            states @ weight.T, problem.padded(problem.anchor), None, problem.padded(problem.targets),
            problem.advantage, None, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, loss_type="bnpo",
            reduce=True,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), _grad(hidden), _grad(weight)

    return case


def bare_products(problem: Problem) -> Case:
    """Three matrix products and nothing else: the floor of the run."""
    out = torch.empty(problem.tokens, problem.weight.shape[0], dtype=problem.hidden.dtype, device=problem.hidden.device)

    def case() -> Outcome:
        torch.mm(problem.hidden, problem.weight.t(), out=out)
        d_hidden = torch.mm(out, problem.weight)
        wide: dict[str, Any] = {"out_dtype": torch.float32} if out.is_cuda and out.dtype != torch.float32 else {}
        return out[0, 0], d_hidden, torch.mm(out.t(), problem.hidden, **wide)

    return case


def single_file(package: str, module: str, stubs: dict[str, dict[str, Any]]) -> ModuleType:
    """A module of an installed package whose `__init__` is not run: it imports what a kernel does not need."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    shell = ModuleType(package)
    shell.__spec__ = spec  # so that it can be found again
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = shell
    for name, contents in stubs.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    return importlib.import_module(module)


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
