"""InternLM2's published layout, written down here in plain torch, against what the conversion makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout.torch_weights import read_shape
from trainer.convert_internlm import llama_config, main
from trainer.models import require_same_tokenizer

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 400, 64, 2, 8, 2, 96
SIZE, QUERIES = HIDDEN // HEADS, HEADS // KV_HEADS
# As published, but for sizes: internlm2_5-7b has 92544 tokens, the added ones being its last six.
CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2"},
    "model_type": "internlm2", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "bias": False,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "float32", "pretraining_tp": 1,
}  # fmt: skip
ADDED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLES = (
    "the answer is 12", " leading and  double  spaces", "été, 世界 and \N{GRINNING FACE}", "line\nbreak\ttab", "", "a",
    "2 + 3 * (4 - 1) = 11", "unknown snowman ☃ here",
)  # fmt: skip


def weights(*, bias: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"model.tok_embeddings.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
             "output.weight": (VOCAB, HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        own: dict[str, tuple[int, ...]] = {
            "attention.wqkv.weight": (KV_HEADS * (QUERIES + 2) * SIZE, HIDDEN),
            "attention.wo.weight": (HIDDEN, HIDDEN), "feed_forward.w1.weight": (INNER, HIDDEN),
            "feed_forward.w3.weight": (INNER, HIDDEN), "feed_forward.w2.weight": (HIDDEN, INNER),
            "attention_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        }  # fmt: skip
        if bias:
            own |= {"attention.wqkv.bias": (KV_HEADS * (QUERIES + 2) * SIZE,), "attention.wo.bias": (HIDDEN,)}
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in own.items()}
    return {name: 0.3 * torch.randn(size) + ("norm" in name) for name, size in sizes.items()}


def internlm2_logits(state: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """The published forward pass, without scaling: dynamic scaling changes nothing up to 32768 tokens."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * state[name]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    angles = torch.arange(len(ids_T))[:, None] * 1e6 ** -(torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x_HTD: Tensor) -> Tensor:
        first, second = x_HTD.chunk(2, -1)
        return x_HTD * cos + torch.cat((-second, first), -1) * sin

    x = state["model.tok_embeddings.weight"][ids_T]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        grouped = linear(norm(x, at + "attention_norm.weight"), at + "attention.wqkv")
        grouped = grouped.view(len(ids_T), KV_HEADS, QUERIES + 2, SIZE)  # per key-value head: queries, key, value
        q = rotate(grouped[:, :, :QUERIES].reshape(len(ids_T), HEADS, SIZE).transpose(0, 1))
        k = rotate(grouped[:, :, -2].transpose(0, 1)).repeat_interleave(QUERIES, 0)
        v = grouped[:, :, -1].transpose(0, 1).repeat_interleave(QUERIES, 0)
        scores = q @ k.transpose(1, 2) / SIZE**0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), at + "attention.wo")
        y = norm(x, at + "ffn_norm.weight")
        gated = F.silu(linear(y, at + "feed_forward.w1")) * linear(y, at + "feed_forward.w3")
        x = x + linear(gated, at + "feed_forward.w2")
    return linear(norm(x, "model.norm.weight"), "output")


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    lines = ["the answer is twelve and the other answer is eleven", "2 + 3 * ( 4 - 1 ) = 11", "été 世界 line tab a b c"]
    (folder / "text").write_text("\n".join(lines * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        user_defined_symbols=[f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)],
    )  # fmt: skip
    return folder / "tokenizer.model"


def published(folder: Path, tokenizer_model: Path, state: dict[str, Tensor], **changes: object) -> Path:
    """A directory as downloaded, in two shards."""
    folder.mkdir()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    unused = [processor.piece_to_id(f"[UNUSED_TOKEN_{number}]") for number in range(141, 147)]
    special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    ids = dict(zip(unused, ADDED)) | {0: "<unk>", 1: "<s>", 2: "</s>"}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>", "chat_template": TEMPLATE, "additional_special_tokens": list(ADDED),
        "added_tokens_decoder": {str(token_id): {"content": text, **special} for token_id, text in ids.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, unused[4]]}))
    shards = {f"model-0000{number}-of-00002.safetensors": list(state)[number - 1 :: 2] for number in (1, 2)}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, folder / file)
    where = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_the_published_layout(tmp_path: Path, tokenizer_model: Path, bias: bool) -> None:
    state = weights(bias=bias)
    source = published(tmp_path / "source", tokenizer_model, state, bias=bias)
    assert main([str(source), str(tmp_path / "target")]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(report.values())
    ids = torch.randint(0, VOCAB, (40,))
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    expected = internlm2_logits(state, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_rotary_settings_and_shards_are_carried_over(tmp_path: Path, tokenizer_model: Path) -> None:
    source = published(tmp_path / "source", tokenizer_model, weights())
    assert main([str(source), str(tmp_path / "target")]) == 0
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    assert "auto_map" not in config
    assert read_shape(tmp_path / "target").rope_theta == 1e6  # the torch engine reads it too
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text())["eos_token_id"][0] == 2
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(tmp_path / "target" / file) for name, file in index.items())
    linear = llama_config(CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert linear.rope_parameters["rope_type"] == "linear"
    assert llama_config(CONFIG | {"rope_scaling": None}).rope_parameters["rope_type"] == "default"


def test_the_tokenizer_gives_sentencepiece_s_ids(tmp_path: Path, tokenizer_model: Path) -> None:
    source = published(tmp_path / "source", tokenizer_model, weights())
    assert main([str(source), str(tmp_path / "target")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    for text in SAMPLES:
        assert tokenizer(text).input_ids == [1, *processor.encode(text)], text
        assert tokenizer.decode(processor.encode(text)) == text.removeprefix(" "), text
    assert len(tokenizer) == processor.get_piece_size()  # added tokens took places; none came behind the last
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ADDED}
    assert ids["<|im_start|>"] == processor.piece_to_id("[UNUSED_TOKEN_146]")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer(chat, add_special_tokens=False).input_ids
    assert (encoded[0], encoded[1], encoded.count(ids["<|im_end|>"])) == (1, ids["<|im_start|>"], 1)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    require_same_tokenizer(tmp_path / "target", tmp_path / "target")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        ("architecture", ("LlamaForCausalLM", "nothing to convert")),
        ("pickles", ("pytorch_model*.bin", "run code", "safetensors")),
        ("tensor", ("model.vision.weight",)),
        ("shape", ("lm_head.weight has shape",)),
        ("missing", ("lacks 1 tensors", "model.norm.weight")),
        ("rope", ("yarn", "dynamic and linear")),
        ("tokenizer", ("is not a SentencePiece model",)),
        ("added", ("added token '<x>' has id 9999",)),
        ("target", ("exists",)),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, tokenizer_model: Path, capsys: pytest.CaptureFixture[str], spoil: str, parts: tuple[str, ...]
) -> None:
    state, changes = weights(), {}
    if spoil == "architecture":
        changes = {"architectures": ["LlamaForCausalLM"]}
    elif spoil == "rope":
        changes = {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    elif spoil == "tensor":
        state["model.vision.weight"] = torch.zeros(2)
    elif spoil == "shape":
        state["output.weight"] = torch.zeros(3, HIDDEN)
    elif spoil == "missing":
        del state["model.norm.weight"]
    source = published(tmp_path / "source", tokenizer_model, state, **changes)
    if spoil == "pickles":
        for file in source.glob("*.safetensors*"):
            file.unlink()
        (source / "pytorch_model-00001-of-00001.bin").write_bytes(b"")
    elif spoil == "tokenizer":
        (source / "tokenizer.model").write_bytes(b"{}")
    elif spoil == "added":
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"]["9999"] = {"content": "<x>", "special": True}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    elif spoil == "target":
        (tmp_path / "target").mkdir()
    assert main([str(source), str(tmp_path / "target")]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert spoil == "target" or not (tmp_path / "target").exists()


def test_the_command_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "SOURCE TARGET" in capsys.readouterr().err
