"""The list of contenders of `bench.kernels`, and the adapters of those that end at log-probs or at a plain loss.

Sources are the published wheels; a single file of a large package is loaded without the package's own imports.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.kernel_problem import Objective, Problem
from bench.liger_rivals import liger_chunked, liger_materialised, liger_scaled
from bench.rivals import (
    EVERY_OPTION,
    LOSS_OPTIONS,
    Case,
    LogProb,
    Rival,
    bare_products,
    compiled,
    eager,
    on_logprobs,
    ours,
    trained,
)

CHUNK = 32_768
IGNORED = -100


def trl(objective: Objective) -> LogProb:
    """TRL 1.16 `trl.kernels.chunked_logprob.ChunkedLogProbFunction`; its trainer gives it the rows with a label."""
    gather = {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    stubs: dict[str, dict[str, Any]] = {"trl.trainer": {}, "trl.trainer.utils": gather}
    function = single_file("trl", "trl.kernels.chunked_logprob", stubs).ChunkedLogProbFunction
    temperature = objective.temperature
    return lambda h, w, y: function.apply(h, w, None, y, temperature, CHUNK, None, 1.0, ("log_probs", "entropy"))[:2]


def verl_torch(objective: Objective) -> LogProb:
    """verl 0.9 `FusedLinearForPPO`, its PyTorch path."""
    module = single_file("verl", "verl.utils.experimental.torch_functional", {"verl.utils": _verl_utils()})
    function = module.FusedLinearForPPO(chunk_size=512)
    return lambda h, w, y: function(h, w, y, objective.temperature)


def verl_triton(objective: Objective) -> LogProb:
    """verl 0.9 `verl.utils.kernel.linear_cross_entropy`, its Triton kernels."""
    device = {
        "get_device_capability": torch.cuda.get_device_capability,
        "get_device_name": lambda: "cuda",
        "is_cuda_available": True,
        "get_torch_device": lambda: torch.cuda,
    }
    stubs = {"verl.utils": _verl_utils(), "verl.utils.device": device}
    function = single_file("verl", "verl.utils.kernel.linear_cross_entropy", stubs).linear_cross_entropy
    return lambda h, w, y: function(h, w, y, float(objective.temperature), "none", None)


def cce(filter_eps: str | None) -> Callable[[Objective], LogProb]:
    """Apple's cut cross-entropy; "high" drops blocks of small probability and with them part of the gradient."""

    def load(objective: Objective) -> LogProb:
        from cut_cross_entropy import linear_cross_entropy

        def logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
            nll = linear_cross_entropy(
                hidden, weight, targets, ignore_index=IGNORED, reduction="none", filter_eps=filter_eps, impl="cce"
            )
            return -nll, None

        return logprob

    return load


def quack(problem: Problem) -> Case:
    """QuACK's chunked cross-entropy: three products as ours, but a plain loss; a time bar, not a GRPO loss."""
    chunked_linear_cross_entropy = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return trained(
        problem, lambda h, w: chunked_linear_cross_entropy(h, w, problem.targets, chunk_size=4096, reduction="sum")
    )


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


def contenders(device: str) -> list[Rival]:
    """Ours first, then everybody else; those that cannot run here are listed with the reason."""
    own = [Rival("ours torch", ours("torch"), cuda_only=False, given="labelled")]
    if device == "cuda":
        variants: dict[str, dict[str, Any]] = {
            "ours triton": {}, "ours triton bf16 logits": {"fp32_logits": False},
            "ours triton main_grad": {"in_place": True},
            "ours triton bf16 logits main_grad": {"fp32_logits": False, "in_place": True},
        }  # fmt: skip
        own = [
            Rival(name, ours("triton", **options), given="labelled", offers=EVERY_OPTION - _without_weight(options))
            for name, options in variants.items()
        ]
    return [*own, *_rivals()]


def _rivals() -> list[Rival]:
    liger, padded = ("liger_kernel",), {"KL", "sequence ratio", "temperature", "frozen head"}
    fused: dict[str, Any] = {"given": "padded", "offers": frozenset(padded)}
    cut: dict[str, Any] = {"given": "labelled", "offers": LOSS_OPTIONS | {"frozen head", "scoring"}}
    return [
        Rival("bare products", bare_products, cuda_only=False, same_loss=False, given="labelled"),
        Rival("torch eager", on_logprobs(eager), cuda_only=False),
        Rival("torch.compile", compiled, cuda_only=False),
        Rival("Liger fused GRPO", liger_chunked(tf32=False), liger, cuda_only=False, **fused),
        Rival("Liger fused GRPO, TF32", liger_chunked(tf32=True), liger, **fused),
        Rival("Liger Triton GRPO on logits", liger_materialised, liger, given="padded",
              offers=frozenset(padded | {"scoring"})),
        Rival("Liger scaled CE", on_logprobs(liger_scaled, ignored=IGNORED), ("liger_kernel", "cutlass")),
        Rival("CCE exact", on_logprobs(cce(None), ignored=IGNORED), ("cut_cross_entropy",), **cut),
        Rival("CCE filtered", on_logprobs(cce("high"), ignored=IGNORED), ("cut_cross_entropy",), **cut),
        Rival("verl Triton", on_logprobs(verl_triton), ("verl",)),
        Rival("verl torch", on_logprobs(verl_torch), ("verl",), cuda_only=False),
        Rival("TRL chunked", on_logprobs(trl, selected=True), ("trl",), cuda_only=False, given="labelled"),
        Rival("QuACK plain CE", quack, ("quack", "cutlass"), same_loss=False, offers=frozenset()),
    ]  # fmt: skip


def _without_weight(options: dict[str, Any]) -> set[str]:
    """What a head that adds the weight's gradient in place has no use in."""
    return {"frozen head", "scoring"} if "in_place" in options else set()


def _verl_utils() -> dict[str, Any]:
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return {"__path__": [f"{place}/utils" for place in spec.submodule_search_locations]}
