"""The weights of a Hugging Face directory (Qwen3 or Llama decoder) as plain tensors, fused where they read one input.

Shapes: E hidden size, V vocabulary, L layers, H query heads, K key-value heads, D head size, F intermediate size.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

ARCHITECTURES = ("Qwen3ForCausalLM", "LlamaForCausalLM")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download the model again"


class Shape(NamedTuple):
    """What config.json says about the architecture."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qk_norm: bool


def read_shape(model_dir: Path) -> Shape:
    """Shape of a Hugging Face directory; ValueError where it is not a decoder this engine runs exactly."""
    file = model_dir / "config.json"
    if not file.is_file():
        raise ValueError(f"{model_dir} has no config.json: give a Hugging Face model directory")
    config = read_object(file, str(model_dir))
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file}: architecture {architecture} is not supported by the torch engine, which runs "
            f"{' and '.join(ARCHITECTURES)}"
        )
    qwen = architecture == "Qwen3ForCausalLM"
    rope = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta"),
    }
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    # Dynamic scaling only starts above max_position_embeddings, which the engine does not pass.
    unsupported = {
        "rope_type": rope_type not in ("default", "dynamic") and rope_type,
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
        "hidden_act": config.get("hidden_act", "silu") != "silu" and config["hidden_act"],
    }
    if found := {key: value for key, value in unsupported.items() if value}:
        raise ValueError(f"{file}: the torch engine does not support {found}")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or (128 if qwen else hidden // heads),
            vocab=config["vocab_size"],
            eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            max_positions=config["max_position_embeddings"],
            tied=config.get("tie_word_embeddings", False),
            qk_norm=qwen,
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: it is not a complete {architecture} configuration") from error


def weight_files(model_dir: Path, named: str = "") -> list[Path]:
    """The directory's model.safetensors, or the shards its index names; all of them are there.

    `named` is what messages call the directory, its path by default. Raises ValueError for a file that is missing and
    for an index that names none.

    Example: weight_files(Path("/models/Qwen3-8B-Base"), named='learner.model = "/models/Qwen3-8B-Base"')
    """
    where, index = named or str(model_dir), model_dir / INDEX
    if (model_dir / SINGLE).is_file():
        return [model_dir / SINGLE]
    if not index.is_file():
        raise ValueError(
            f"{where}: no weights there (neither {SINGLE} nor {INDEX}): {AGAIN}, with its safetensors files"
        )
    weight_map = read_object(index, where).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise ValueError(f"{where}: {INDEX} has no weight_map that names files: {AGAIN}")
    files = [model_dir / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ValueError(f"{where}: {missing[0]}{more} missing ({len(missing)} of {len(files)} files): {AGAIN}")
    return files


def read_object(file: Path, where: str) -> dict[str, Any]:
    """A JSON object of a model directory that messages call `where`. Raises ValueError where the file holds none.

    Example: read_object(model_dir / "config.json", str(model_dir))["vocab_size"]
    """
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{where}: {file.name} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {file.name} holds no JSON object: {AGAIN}")
    return content


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; each matrix is a transposed view [in, out] of the layout of the file."""

    attention_norm: torch.Tensor  # [E]
    qkv: torch.Tensor  # [E, K·(H/K + 2)·D]: per key-value head its queries, key and value
    qk_norm: torch.Tensor | None  # [H/K + 1, D], Qwen3 only: of the query heads and of the key
    out: torch.Tensor  # [H·D, E]
    mlp_norm: torch.Tensor  # [E]
    gate_up: torch.Tensor  # [E, 2F]
    down: torch.Tensor  # [F, E]


class Weights:
    """All weights of one model, on one device.

    Raises ValueError for a directory of another architecture and for weights of other names or shapes.
    """

    def __init__(self, model_dir: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = s = read_shape(model_dir)
        self._device, self._dtype = device, dtype
        self.embedding = self._new(s.vocab, s.hidden)
        self.norm = self._new(s.hidden)
        self.head = (self.embedding if s.tied else self._new(s.vocab, s.hidden)).t()
        self.layers = [self._new_layer() for _ in range(s.layers)]
        self.load(weight_files(model_dir))

    def _new(self, *size: int) -> torch.Tensor:
        return torch.empty(size, device=self._device, dtype=self._dtype)

    def _new_layer(self) -> Layer:
        s = self.shape
        return Layer(
            attention_norm=self._new(s.hidden),
            qkv=self._new((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden).t(),
            qk_norm=self._new(s.heads // s.kv_heads + 1, s.head_dim) if s.qk_norm else None,
            out=self._new(s.hidden, s.heads * s.head_dim).t(),
            mlp_norm=self._new(s.hidden),
            gate_up=self._new(2 * s.intermediate, s.hidden).t(),
            down=self._new(s.hidden, s.intermediate).t(),
        )

    def _destinations(self) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
        """Each tensor of the file: the view it goes to, and its size there."""
        s = self.shape
        q_size, k_size = s.heads * s.head_dim, s.kv_heads * s.head_dim
        views = {
            "model.embed_tokens.weight": (self.embedding, (s.vocab, s.hidden)),
            "model.norm.weight": (self.norm, (s.hidden,)),
        }
        if not s.tied:
            views["lm_head.weight"] = (self.head.t(), (s.vocab, s.hidden))
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            heads = layer.qkv.t().view(s.kv_heads, -1, s.head_dim, s.hidden)
            # The file rotates dimension i with i + D/2, the engine with its neighbour.
            pairs = heads.unflatten(2, (-1, 2)).transpose(2, 3)
            gate, up = layer.gate_up.t().chunk(2)
            views |= {
                prefix + "input_layernorm.weight": (layer.attention_norm, (s.hidden,)),
                prefix + "self_attn.q_proj.weight": (pairs[:, :-2], (q_size, s.hidden)),
                prefix + "self_attn.k_proj.weight": (pairs[:, -2], (k_size, s.hidden)),
                prefix + "self_attn.v_proj.weight": (heads[:, -1], (k_size, s.hidden)),
                prefix + "self_attn.o_proj.weight": (layer.out.t(), (s.hidden, q_size)),
                prefix + "post_attention_layernorm.weight": (layer.mlp_norm, (s.hidden,)),
                prefix + "mlp.gate_proj.weight": (gate, (s.intermediate, s.hidden)),
                prefix + "mlp.up_proj.weight": (up, (s.intermediate, s.hidden)),
                prefix + "mlp.down_proj.weight": (layer.down.t(), (s.hidden, s.intermediate)),
            }
            if layer.qk_norm is not None:
                pairs = layer.qk_norm.unflatten(1, (-1, 2)).transpose(1, 2)
                views[prefix + "self_attn.q_norm.weight"] = (pairs[:-1], (s.head_dim,))
                views[prefix + "self_attn.k_norm.weight"] = (pairs[-1:], (s.head_dim,))
        return views

    def load(self, files: Sequence[Path]) -> None:
        """Replace all weights in place; nothing is changed where a name or a shape is wrong (ValueError)."""
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for file in files:
                reader = stack.enter_context(_open(file))
                found |= dict.fromkeys(reader.keys(), reader)
            if self.shape.tied:
                # Some writers store the tied matrix twice.
                found.pop("lm_head.weight", None)
            shapes = {name: tuple(reader.get_slice(name).get_shape()) for name, reader in found.items()}
            where = files[0].parent if len(files) > 1 else files[0]
            self.take(shapes, lambda name: found[name].get_tensor(name), where=where)

    @torch.inference_mode()
    def take(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], *, where: Path) -> None:
        """The same from what `read` gives for each name; `where` they come from, for the error."""
        views = self._destinations()
        if shapes.keys() != views.keys():
            missing, unknown = sorted(views.keys() - shapes.keys()), sorted(shapes.keys() - views.keys())
            raise ValueError(f"{where}: not this model's weights: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, (_, size) in views.items():
            if (stored := shapes[name]) != size:
                raise ValueError(f"{where}: {name} has shape {stored}, the model needs {size}")
        for name, (view, size) in views.items():
            # A norm of queries has one vector in the file and one row per head here.
            view.copy_(read(name).view(view.shape[-2:] if size == (self.shape.head_dim,) else view.shape))


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
