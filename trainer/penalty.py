"""Presence penalty for either engine: evaluation's published settings have one, training's sampling does not.

A token's logit is lowered once it has been drawn in the completion; prompt tokens do not count (as in vLLM).
"""

from pathlib import Path
from typing import Any, Literal

import torch

from core.schema import Sampling
from rollout.engine import Engine
from rollout.torch_engine import TorchEngine


class PenalisedSampling(Sampling, frozen=True, kw_only=True):
    """Sampling with logits lowered by `presence_penalty` where a token was drawn before; its log-probs are of those.

    Example: PenalisedSampling(temperature=0.7, presence_penalty=1.5, max_tokens=1024, stop_token_ids=(1,))
    """

    presence_penalty: float = 0.0


class PenalisedTorchEngine(TorchEngine):
    """TorchEngine that heeds PenalisedSampling."""

    @torch.inference_mode()
    def _draw(
        self, logits: torch.Tensor, rows: Any, step: int, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        penalty = _penalty(sampling)
        if penalty and step:
            drawn = torch.from_numpy(rows.tokens[:, :step]).to(logits.device, torch.int64)
            logits = logits - penalty * torch.zeros_like(logits).scatter_(1, drawn, 1.0)
        return super()._draw(logits, rows, step, sampling)


def evaluation_engine(
    kind: Literal["torch", "vllm"], model_dir: Path, *, device: str, dtype: str, **sizes: Any
) -> Engine:
    """An engine that heeds PenalisedSampling; `sizes` are VllmEngine's, such as tensor_parallel_size."""
    if kind == "torch":
        return PenalisedTorchEngine(model_dir, device=device, dtype=dtype)
    from rollout.vllm_engine import VllmEngine

    class PenalisedVllmEngine(VllmEngine):
        """VllmEngine that heeds PenalisedSampling."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._engine = _Penalising(self._engine)

        def _submit(self, requests: Any, sampling: Sampling, names: Any) -> None:
            self._engine.presence_penalty = _penalty(sampling)
            super()._submit(requests, sampling, names)

    return PenalisedVllmEngine(model_dir, device=device, dtype=dtype, **sizes)


class _Penalising:
    """vLLM's engine, with a presence penalty in every request."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.presence_penalty = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        params.presence_penalty = self.presence_penalty
        self._engine.add_request(name, prompt, params)


def _penalty(sampling: Sampling) -> float:
    return sampling.presence_penalty if isinstance(sampling, PenalisedSampling) else 0.0
