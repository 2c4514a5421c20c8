"""A model directory as the vLLM engine sees it, and new weights for a running vLLM. Imports no vLLM."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rollout.shared_weights import SharedWeights
from rollout.torch_weights import weight_files

Shapes = dict[str, tuple[int, ...]]


class WeightLoading:
    """A method for vLLM's worker class (its `worker_extension_cls`), one worker for each tensor-parallel rank.

    What it relies on: `reload_weights`, `model_runner` and `device` of the worker, as of vLLM 0.32.
    """

    reload_weights: Any
    model_runner: Any
    device: Any

    def load_safetensors(self, file: str) -> None:
        """Replace the weights by those of a file with Hugging Face names; a rank keeps its own part of each tensor."""
        with safe_open(file, framework="pt", device="cpu") as reader:
            self._reload((name, reader.get_tensor(name)) for name in list(reader.keys()))

    def load_shared(self, file: str, version: int, digest: str) -> str:
        """The same from a buffer of the trainer's device: `SharedWeights.outcome`, since what is raised here reaches
        the engine as another error. A tensor may be needed until its layer is complete, so each has its own memory."""
        try:
            with SharedWeights(Path(file), version=version, digest=digest, device=self.device) as shared:
                self._reload(shared.tensors())
                return shared.outcome()
        except RuntimeError as error:
            return str(error) or repr(error)  # no text would mean WHOLE

    def _reload(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.reload_weights(weights_iterator=tensors)
        # On CPU every product owns a packed copy of its weight. A tied output layer has no tensor of its own in the
        # file, so vLLM does not pack it again: it would go on with the old weights.
        head: Any = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)


class ModelFiles:
    """Names and shapes of a Hugging Face directory's tensors, and its number of positions; ValueError if incomplete."""

    def __init__(self, model_dir: Path) -> None:
        file = model_dir / "config.json"
        if not file.is_file():
            raise ValueError(f"{model_dir} has no config.json: give a Hugging Face model directory")
        config: dict[str, Any] = json.loads(file.read_text())
        if "max_position_embeddings" not in config:
            raise ValueError(f"{file} lacks max_position_embeddings: it is not a decoder's configuration")
        self._positions = int(config["max_position_embeddings"])
        self._tied = bool(config.get("tie_word_embeddings"))
        self._shapes = self._read(weight_files(model_dir))

    def length_limit(self, asked: int | None) -> int:
        """Prompt and completion together: what was asked for, or all positions of the model."""
        if asked is not None and not 1 < asked <= self._positions:
            raise ValueError(
                f"max_model_len {asked} is outside 2 … {self._positions}, the model's max_position_embeddings"
            )
        return asked or self._positions

    def check(self, file: Path) -> None:
        """Raise ValueError unless the file holds this model's tensors."""
        self.require(self._read([file]), file)

    def require(self, found: Mapping[str, tuple[int, ...]], file: Path) -> None:
        """Raise ValueError unless `found` are this model's tensors: vLLM keeps old values where one is missing."""
        if found.keys() != self._shapes.keys():
            missing, unknown = sorted(self._shapes.keys() - found.keys()), sorted(found.keys() - self._shapes.keys())
            raise ValueError(f"{file}: not this model's weights: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, shape in self._shapes.items():
            if found[name] != shape:
                raise ValueError(f"{file}: {name} has shape {list(found[name])}, the model needs {list(shape)}")

    def _read(self, files: Iterable[Path]) -> Shapes:
        shapes: Shapes = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"weights file {file} does not exist")
            try:
                with safe_open(file, framework="pt", device="cpu") as reader:
                    shapes |= {name: tuple(reader.get_slice(name).get_shape()) for name in list(reader.keys())}
            except SafetensorError as error:
                raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
        if self._tied:  # some writers store the tied matrix twice; vLLM reads the embedding's copy
            shapes.pop("lm_head.weight", None)
        return shapes
