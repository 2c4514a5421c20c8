"""The list of contenders of `bench.kernels`, and the adapters of those that end at log-probs or at a plain loss."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.rivals import (
    Case,
    Outcome,
    Problem,
    Rival,
    bare_products,
    compiled,
    eager,
    liger_chunked,
    liger_materialised,
    on_logprobs,
    ours,
    single_file,
)

CHUNK = 32_768
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


def trl() -> LogProb:
    """TRL 1.16 `trl.kernels.chunked_logprob.ChunkedLogProbFunction`."""
    gather = {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    stubs: dict[str, dict[str, Any]] = {"trl.trainer": {}, "trl.trainer.utils": gather}
    function = single_file("trl", "trl.kernels.chunked_logprob", stubs).ChunkedLogProbFunction
    return lambda h, w, y: function.apply(h, w, None, y, 1.0, CHUNK, None, 1.0, ("log_probs", "entropy"))[0]


def verl_torch() -> LogProb:
    """verl 0.9 `FusedLinearForPPO`, its PyTorch path."""
    module = single_file("verl", "verl.utils.experimental.torch_functional", {"verl.utils": _verl_utils()})
    function = module.FusedLinearForPPO(chunk_size=512)
    return lambda h, w, y: function(h, w, y, 1.0)[0]


def verl_triton() -> LogProb:
    """verl 0.9 `verl.utils.kernel.linear_cross_entropy`, its Triton kernels."""
    device = {
        "get_device_capability": torch.cuda.get_device_capability,
        "get_device_name": lambda: "cuda",
        "is_cuda_available": True,
        "get_torch_device": lambda: torch.cuda,
    }
    stubs = {"verl.utils": _verl_utils(), "verl.utils.device": device}
    function = single_file("verl", "verl.utils.kernel.linear_cross_entropy", stubs).linear_cross_entropy
    return lambda h, w, y: function(h, w, y, 1.0, "none", None)[0]


def liger_scaled() -> LogProb:
    """Liger 0.8 `LigerFusedLinearScaledCrossEntropyFunction`: CuTe on sm_90, verl's PyTorch path elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda h, w, y: -Function.apply(h, w, y, 1.0, -100, 1, True)[0]


def cce(filter_eps: str | None) -> Callable[[], LogProb]:
    """Apple's cut cross-entropy; "high" drops blocks of small probability and with them part of the gradient."""

    def load() -> LogProb:
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", filter_eps=filter_eps, impl="cce")

    return load


def quack(problem: Problem) -> Case:
    """QuACK's chunked cross-entropy: three products as ours, but a plain loss; a time bar, not a GRPO loss."""
    chunked_linear_cross_entropy = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def case() -> Outcome:
        hidden, weight = problem.leaves()
        loss = chunked_linear_cross_entropy(hidden, weight, problem.targets, chunk_size=4096, reduction="sum")
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    return case


def late(load: Callable[[], LogProb]) -> Callable[[Problem], Case]:
    """Import the rival only when its turn comes."""
    return lambda problem: on_logprobs(load())(problem)


def contenders(device: str) -> list[Rival]:
    """Ours first, then everybody else; those that cannot run here are listed with the reason."""
    own = [Rival("ours torch", ours("torch"), cuda_only=False)]
    if device == "cuda":
        variants: dict[str, dict[str, Any]] = {
            "ours triton": {}, "ours triton bf16 logits": {"fp32_logits": False},
            "ours triton main_grad": {"in_place": True},
            "ours triton bf16 logits main_grad": {"fp32_logits": False, "in_place": True},
        }  # fmt: skip
        own = [Rival(name, ours("triton", **options)) for name, options in variants.items()]
    return [
        *own,
        Rival("three bare products", bare_products, cuda_only=False, same_loss=False),
        Rival("torch eager", on_logprobs(eager), cuda_only=False),
        Rival("torch.compile", compiled, cuda_only=False),
        Rival("Liger fused GRPO", liger_chunked(tf32=False), ("liger_kernel",), cuda_only=False),
        Rival("Liger fused GRPO, TF32", liger_chunked(tf32=True), ("liger_kernel",)),
        Rival("Liger Triton GRPO on logits", liger_materialised, ("liger_kernel",)),
        Rival("Liger scaled CE", late(liger_scaled), ("liger_kernel", "cutlass")),
        Rival("CCE exact", late(cce(None)), ("cut_cross_entropy",)),
        Rival("CCE filtered", late(cce("high")), ("cut_cross_entropy",)),
        Rival("verl Triton", late(verl_triton), ("verl",)),
        Rival("verl torch", late(verl_torch), ("verl",), cuda_only=False),
        Rival("TRL chunked", late(trl), ("trl",), cuda_only=False),
        Rival("QuACK plain CE", quack, ("quack", "cutlass"), same_loss=False),
    ]


def _verl_utils() -> dict[str, Any]:
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return {"__path__": [f"{place}/utils" for place in spec.submodule_search_locations]}
