"""Low-rank adapters (LoRA) on the learner by peft, and the whole weights that they stand for. The only peft import.

A linear layer W [O, I] becomes W + alpha / rank · B A with A [rank, I] and B [O, rank], B = 0 at the start. A and B
train, everything else is frozen (arXiv:2106.09685, section 4.1).
"""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from core.config import Learner as LearnerSettings
from trainer.backend import Backend
from trainer.models import weight_checksum
from trainer.objective import Forward
from trainer.tensor_files import gather, write_file

NAME = "adapter"
_PARTS = (".base_layer.", f".lora_A.{NAME}.", f".lora_B.{NAME}.")


def require_peft() -> None:
    """ValueError where peft is not installed."""
    if not importlib.util.find_spec("peft"):
        raise ValueError('learner.lora_rank needs peft: pip install "peft>=0.21,<0.22", or use learner.lora_rank=0')


class Adapter:
    """Puts adapters beside every linear layer of `model` but its head, and freezes the rest.

    `saved` is where `save` wrote, to go on from there: ValueError if the model below the adapters is not the same.
    A new adapter takes its A from torch's generator.
    """

    def __init__(self, model: PreTrainedModel, settings: LearnerSettings, saved: Path | None) -> None:
        require_peft()
        from peft import LoraConfig, inject_adapter_in_model

        self.scale = settings.lora_alpha / settings.lora_rank
        self.base = weight_checksum(model)
        kind = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear")
        inject_adapter_in_model(kind, model, adapter_name=NAME)
        self._layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
        if saved is not None:
            self._read(dict(model.named_parameters()), saved / f"{NAME}.safetensors")

    def without(self, forward: Forward) -> Forward:
        """The model that the adapters started from, as a policy to score with: B A x is multiplied by 0.

        (peft's own switch changes which parameters require gradients and which modules run; ZeRO depends on both.)
        """

        def base(*args: Any, **options: Any) -> Any:
            try:
                for layer in self._layers:
                    layer.set_scale(NAME, 0.0)
                return forward(*args, **options)
            finally:
                for layer in self._layers:
                    layer.set_scale(NAME, 1.0)

        return base

    def merged(self, weights: Iterable[tuple[str, Tensor]], *, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The whole model's weights by the names it had without adapters, in its dtype, summed in fp32.

        `weights` are all parameters in the model's order, in which A and B follow the layer they belong to. `on_host`:
        what was adapted comes in host memory, so that the device holds no second model.
        """
        held: dict[str, Tensor] = {}
        for name, tensor in weights:
            part = next((part for part in _PARTS if part in name), None)
            plain = name.replace(part, ".") if part else name
            if part is None or name.endswith(".bias"):
                yield plain, tensor
                continue
            held[part] = tensor.float()
            if len(held) == len(_PARTS):
                weight, a, b = (held.pop(part) for part in _PARTS)
                whole = (weight + self.scale * (b @ a)).to(tensor.dtype)
                yield plain, whole.cpu() if on_host else whole
        assert not held, "an adapter does not follow its layer"

    def save(self, backend: Backend, directory: Path | None) -> None:
        """Write what trains, bit for bit; a collective, in which None takes part and writes nothing."""
        trained = gather(backend.weights(trained=True), keep=directory is not None)
        if directory is not None:
            write_file(trained, directory / f"{NAME}.safetensors", base=self.base)

    def _read(self, parameters: dict[str, torch.nn.Parameter], file: Path) -> None:
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        with safe_open(file, framework="pt") as reader:
            if reader.metadata()["base"] != self.base:
                raise ValueError(
                    f"{file} was trained beside other weights than learner.model now holds: restore that directory"
                )
            assert set(reader.keys()) == trained.keys(), f"{file}: not this model's adapters"
            for name, parameter in trained.items():
                parameter.data.copy_(reader.get_tensor(name))


def whole_weights(
    backend: Backend, adapter: Adapter | None, *, keep: bool, on_host: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its Hugging Face name, merged with the adapter; a collective, to be used up on every rank.

    `keep`: this rank uses the values, which need not be merged elsewhere. `on_host`: as `Backend.weights`; False where
    each tensor is used before the next.
    """
    weights = backend.weights(on_host=on_host)
    return adapter.merged(weights, on_host=on_host) if adapter is not None and keep else weights
