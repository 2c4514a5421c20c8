"""How many bytes of a GPU a run's processes hold, from the shapes in config.json: exact for what is counted in
parameters, an estimate for activations and for what libraries keep.

Symbols: P parameters, N trainer ranks, T tokens of a micro-batch, H hidden, V vocabulary, F intermediate size.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from core.config import Config
from core.configcheck import explorer_tokens

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
# What is no tensor of ours: the CUDA context, library workspaces, and the allocator's gaps.
CONTEXT_BYTES = GIB
ENGINE_OVERHEAD_BYTES = 2 * GIB  # of vLLM inside its share: context, CUDA graphs and activations of a prefill step
FRAGMENTATION = 0.05
HEAD_CHUNK_BYTES, HEAD_CHUNK_ROWS = 1280 << 20, 4096  # kernels.row_triton: logits held at once
LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's own default
STEP_TOKEN_BYTES = 96  # up to seven int64 and five fp32 (trainer.micro_batch), and five fp32 scores (trainer.objective)
PUBLISHED_VERSIONS = 2  # of the learner's weights: the newest, and the one a worker may still be reading
DEEPSPEED_LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered at most


class ModelShape(NamedTuple):
    """A decoder's architecture, as far as memory depends on it.

    Example: ModelShape(vocab=151936, hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, head_dim=128,
                        tied=True, qk_norm=True, qkv_bias=False)
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qk_norm: bool
    qkv_bias: bool

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.intermediate + norms + (queries + 2 * keys) * self.qkv_bias

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA adapters on every linear layer but the head: rank numbers per input and per output."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 4 * self.hidden + 2 * queries + 2 * keys
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def parameters(self) -> int:
        """P, a tied head counted once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def cache_bytes(self, width: int) -> int:
        """Keys and values of one token; `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. ValueError for an architecture whose parameters are not known here."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "qwen2", "llama", "mistral"):
        raise ValueError(f"model_type {kind!r}: memory is estimated for llama, mistral, qwen2 and qwen3 only")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        vocab=config["vocab_size"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
    )


def trainer_parts(config: Config, learner: ModelShape, explorer: ModelShape | None, ranks: int) -> dict[str, int]:
    """Bytes on the GPU of one trainer rank, by what they are for.

    explorer: where the loss scores π_ω, else None. ranks: N, over which DeepSpeed shards.
    Sources: trainer.optimizer (flat fp32 gradient); arXiv:1910.02054, section 5 (ZeRO's shards).
    """
    settings, width = config.learner, BYTES[config.learner.dtype]
    count, trained = _held_and_trained(config, learner)
    low = width < 4
    stage = settings.zero_stage if settings.backend == "deepspeed" else None
    in_place = stage is None and not settings.lora_rank  # the head's gradient adds up in the flat one, in fp32
    copied = trained - (learner.vocab * learner.hidden if in_place and not learner.tied else 0)
    shards = {name: ranks if stage is not None and stage >= least else 1 for name, least in _SHARDED.items()}
    held = 0 if settings.offload == "parameters" else 1
    state = 0 if settings.offload != "none" else 1
    parts = {
        "weights": held * width * count // shards["weights"],
        "gradients": 4 * trained // shards["gradients"] + (width * copied if low and stage in (None, 0, 1) else 0),
        "optimizer": state * 8 * trained // shards["optimizer"],
        "fp32 masters": state * 4 * trained // shards["optimizer"] if low else 0,
    }
    if config.loss.kl_coef > 0 and not settings.lora_rank:  # else it is the learner without its adapters
        parts["reference"] = width * count // shards["weights"]
    if _keeps_old(config):
        parts["weights of π_old"] = held * width * trained // shards["weights"]
    if explorer is not None:
        parts["explorer, scored"] = width * explorer.parameters // shards["weights"]
    if stage:
        live = min(DEEPSPEED_LIVE, count) * width if stage == 3 else 0
        parts["DeepSpeed buffers"] = reduce_bucket(trained) * (width + 4) + live
    recompute = settings.recompute if settings.gradient_checkpointing else "none"
    sharers = settings.sequence_parallel
    parts["activations"] = activation_bytes(learner, tokens_per_pass(config), width, recompute, sharers)
    parts["rows of the step"] = _step_bytes(config, ranks)
    accumulator = not in_place and not settings.lora_rank
    parts["head"] = head_bytes(learner, tokens_per_pass(config), width, accumulator=accumulator)
    parts["context and gaps"] = CONTEXT_BYTES + int(FRAGMENTATION * sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


_SHARDED = {"optimizer": 1, "gradients": 2, "weights": 3}  # from which ZeRO stage on


def reduce_bucket(trained: int) -> int:
    """Elements of the bucket through which DeepSpeed reduces gradients, from the number of trained parameters.

    It allocates the whole bucket on its device, also where all gradients fill a part of it.
    """
    return min(LARGEST_BUCKET, trained)


def _held_and_trained(config: Config, learner: ModelShape) -> tuple[int, int]:
    """Parameters of the learner, and those of them that have gradients and optimizer states."""
    adapters = learner.adapter_parameters(config.learner.lora_rank)
    return learner.parameters + adapters, adapters or learner.parameters


def _keeps_old(config: Config) -> bool:
    """Whether rows are scored with the weights of the step's start after these have changed."""
    return config.algorithm.in_parts and config.correction.needs_old


def host_bytes(config: Config, learner: ModelShape, ranks: int) -> int:
    """Host memory of one trainer rank that offloading takes: moments, masters and, if asked, weights."""
    if config.learner.offload == "none":
        return 0
    count, trained = _held_and_trained(config, learner)
    held = count + trained * _keeps_old(config) if config.learner.offload == "parameters" else 0
    return (12 * trained + BYTES[config.learner.dtype] * held) // ranks


def published_bytes(config: Config, learner: ModelShape) -> int:
    """What published weights take: of rank 0's host memory (trainer.published), which a container counts as shared
    memory, or of its GPU (trainer.weight_buffers)."""
    held = 0 if config.rollout.weights == "files" else PUBLISHED_VERSIONS
    return held * BYTES[config.learner.dtype] * learner.parameters


def _step_bytes(config: Config, ranks: int) -> int:
    """A rank's completions of a step with their scores, which stay on its GPU while the step trains; at most."""
    completions = config.algorithm.prompts_per_step * config.algorithm.group_size
    return STEP_TOKEN_BYTES * _longest(config) * completions // ranks


def tokens_per_pass(config: Config) -> int:
    """T, at most."""
    return config.learner.micro_batch_tokens or config.learner.micro_batch_rows * _longest(config)


def _longest(config: Config) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def activation_bytes(
    shape: ModelShape, tokens: int, width: int, recompute: Literal["none", "selective", "full"], sharers: int = 1
) -> int:
    """What backward keeps of one micro-batch: per layer the inputs of its products and norms, fp32 inside norms.

    With checkpointing, the input of every layer and everything of one; selective, the outputs of every layer's
    products and attention too. Attention keeps no [T, T] matrix. Where `sharers` ranks share a line, attention keeps an
    output of its own, and each key-value head is there for every rank that uses it.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 + width) * shape.hidden + ((4 + width) * (queries + keys) if shape.qk_norm else 0)
    attention = width * (3 * queries + 3 * keys) + 4 * shape.heads
    if sharers > 1:
        attention += width * (queries + 2 * max(0, sharers - shape.kv_heads) * shape.head_dim)
    mlp = width * (4 * shape.intermediate + 2 * shape.hidden)
    layer = norms + attention + mlp
    if recompute == "none":
        return tokens * shape.layers * layer
    outputs = width * (2 * queries + 2 * keys + 2 * shape.intermediate + 2 * shape.hidden) + 4 * shape.heads
    kept = width * shape.hidden + (outputs if recompute == "selective" else 0)
    return tokens * (shape.layers * kept + layer)


def head_bytes(shape: ModelShape, tokens: int, width: int, *, accumulator: bool = True) -> int:
    """One chunk of logits, hidden states with their gradient [T, H], and an fp32 accumulator of d_weight [V, H].

    A frozen head has no d_weight, and on the torch backend it adds up in the flat gradient: no `accumulator`.
    """
    most = max(16, min(HEAD_CHUNK_ROWS, HEAD_CHUNK_BYTES // (shape.vocab * width)))
    rows = most // 256 * 256 if most >= 256 else most // 16 * 16
    gradient = 4 * shape.vocab * shape.hidden if accumulator else 0
    return rows * shape.vocab * width + gradient + 2 * tokens * shape.hidden * width


class EngineNeed(NamedTuple):
    """One engine's part of each of its GPUs, in bytes. `sequence`: keys and values of one longest completion."""

    weights: int
    sequence: int
    rows: int  # completions of one lease: what the torch engine caches at once


def engine_need(config: Config, shape: ModelShape, *, rows: int) -> EngineNeed:
    """What an engine must hold. `rows`: completions of the largest lease that it can be given."""
    width, spread = BYTES[config.learner.dtype], config.rollout.tensor_parallel
    longest = config.rollout.max_prompt_tokens + max(config.rollout.max_response_tokens, explorer_tokens(config))
    per_token = shape.cache_bytes(width) // min(spread, shape.kv_heads)
    return EngineNeed(width * shape.parameters // spread, longest * per_token, rows)
