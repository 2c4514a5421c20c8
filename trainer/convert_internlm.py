"""InternLM2 and InternLM2.5 checkpoints in the Llama layout: `python -m trainer.convert_internlm SOURCE TARGET`.

Their published directories need code from the same directory to load; none of it is run here. The architecture is
Llama's (arXiv:2403.17297, section 2.1) with queries, keys and values in one matrix, so weights are renamed and cut, not
changed, and what comes out is a LlamaForCausalLM directory that transformers, vLLM and this project load.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollout.torch_weights import weight_files
from trainer.sentencepiece_model import fast_tokenizer, read_sentencepiece

ARCHITECTURE = "InternLM2ForCausalLM"
USAGE = "usage: python -m trainer.convert_internlm SOURCE TARGET"
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert(source: Path, target: Path) -> list[str]:
    """Write SOURCE's weights, config and tokenizer to the new directory TARGET; returns what was done, in words.

    Errors: ValueError for another architecture, pickled weights, unknown tensors, a TARGET that exists.
    """
    if target.exists():
        raise ValueError(f"{target} exists: name a new directory")
    published = _read_json(source / "config.json")
    if ARCHITECTURE not in published.get("architectures", ()):
        raise ValueError(f"{source} is {published.get('architectures')}, not {ARCHITECTURE}: nothing to convert")
    _refuse_pickles(source)
    config = llama_config(published)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    count = _write_weights(source, partial, config)
    config.save_pretrained(partial)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", partial)
    size = _write_tokenizer(source, partial, config.vocab_size)
    partial.rename(target)
    return [
        f"{count} tensors of {config.num_hidden_layers} layers, rope {config.rope_parameters}",
        f"tokenizer of {size} tokens; LlamaForCausalLM in {target}",
    ]


def llama_config(published: dict[str, Any]) -> LlamaConfig:
    """Llama's config.json for an InternLM2 one. ValueError for rotary scaling that InternLM2 does not have."""
    scaling = published.get("rope_scaling") or {}
    kind = scaling.get("type", "default") if scaling else "default"
    if kind not in ("default", "dynamic", "linear"):
        raise ValueError(f"rope_scaling {scaling}: InternLM2 knows dynamic and linear")
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": float(published.get("rope_theta", 10000.0))}
    if scaling:
        rope["factor"] = float(scaling["factor"])
    same = {name: published[name] for name in _SAME if name in published}
    bias = bool(published.get("bias", True))  # InternLM2Config's own default
    dtype = published.get("torch_dtype") or published.get("dtype")
    config = LlamaConfig(**same, rope_parameters=rope, attention_bias=bias, mlp_bias=False, dtype=dtype)
    config.architectures = ["LlamaForCausalLM"]
    return config


def llama_tensors(name: str, tensor: Tensor, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """What one InternLM2 tensor becomes.

    wqkv [K·(H/K + 2)·D, E] holds, for each of the K key-value heads in turn, its H/K queries, its key and its value.
    H heads, K key-value heads, D head size, E hidden size. Source: modeling_internlm2.py as published.
    """
    match = re.fullmatch(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias)", name)
    prefix, place, kind = match.groups(default="") if match else ("", "", "")
    if prefix and place == "attention.wqkv":
        heads = tensor.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))
        for part, value in (("q", heads[:, :-2]), ("k", heads[:, -2]), ("v", heads[:, -1])):
            yield f"{prefix}self_attn.{part}_proj.{kind}", value.flatten(0, -tensor.dim()).contiguous()
    elif place in _NAMES:
        yield f"{prefix}{_NAMES[place]}.{kind}", tensor
    else:
        raise ValueError(f"{name} is no tensor of {ARCHITECTURE}: is {ARCHITECTURE} really what this directory holds?")


def _write_weights(source: Path, target: Path, config: LlamaConfig) -> int:
    """Shard by shard, so that one shard is in memory at a time; each name and shape is checked against Llama's."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    files, size = weight_files(source), 0
    where: dict[str, str] = {}
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as reader:
            names = reader.keys()
            for name in names:
                tensors |= llama_tensors(name, reader.get_tensor(name), config)
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        for name, tensor in tensors.items():
            if expected.get(name) != tensor.shape or name in where:
                wanted = list(expected.get(name, ()))
                raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, by config.json it has {wanted}")
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if missing := sorted(expected.keys() - where.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors, such as {missing[0]}: download it again")
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(where)


def _write_tokenizer(source: Path, target: Path, vocab_size: int) -> int:
    """tokenizer.json and its settings, chat template included; returns the number of tokens."""
    file = source / "tokenizer.model"
    if not file.is_file():
        raise ValueError(f"{source} has no tokenizer.model: download the tokenizer files too")
    settings = _read_json(source / "tokenizer_config.json")
    added = {
        int(token_id): AddedToken(
            token["content"],
            **{name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")},
        )
        for token_id, token in settings.get("added_tokens_decoder", {}).items()
    }
    named = {name: _text(settings[name]) for name in _TOKENS if settings.get(name)}
    model = read_sentencepiece(file)
    if len(model.pieces) > vocab_size:
        raise ValueError(f"{file} has {len(model.pieces)} pieces, config.json a vocabulary of {vocab_size}")
    for token_id, (text, _) in enumerate(model.pieces[:3]):  # <unk>, <s>, </s>
        added.setdefault(token_id, AddedToken(text, special=True, normalized=False))
    backend = fast_tokenizer(model, added, bos=named.get("bos_token", "<s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=settings.get("additional_special_tokens") or [],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = settings.get("chat_template")
    tokenizer.save_pretrained(target)
    return len(tokenizer)


def _refuse_pickles(source: Path) -> None:
    if not any(source.glob("*.safetensors")) and any(source.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{source} has pytorch_model*.bin only: pickles, which can run code when they are read. Take a revision of "
            "the repository with *.safetensors, or let huggingface.co's safetensors conversion space make one"
        )


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"no such file: {file}; SOURCE is a directory as downloaded from Hugging Face")
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print("\n".join(convert(Path(arguments[0]), Path(arguments[1]))))
    except ValueError as error:
        print(f"s2l-po: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
