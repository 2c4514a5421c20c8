import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from trainer.models import (
    head_weight,
    hidden_states,
    load_model,
    load_tokenizer,
    require_same_tokenizer,
    save_model,
    use_liger,
    vocab_size,
    weight_checksum,
)

CPU = torch.device("cpu")


def load(directory):
    return load_model(directory, dtype=torch.float32, device=CPU, key="learner.model")


@pytest.fixture
def family(learner_dir, tmp_path):
    """Two directories with the same tokenizer, free to be changed."""
    for name in ("learner", "explorer"):
        shutil.copytree(learner_dir, tmp_path / name)
    return tmp_path / "learner", tmp_path / "explorer"


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_a_missing_directory_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"no such directory: .*nowhere; set learner\.model"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"set explorer\.model"):
        load_tokenizer(tmp_path / "nowhere", key="explorer.model")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_refused(family):
    directory, _ = family
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json \(learner\.model\).*model\.norm\.weight"):
        load(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_times_the_head_are_the_logits(tmp_path, tied, write_tiny_model):
    write_tiny_model(tmp_path, seed=3, tied=tied)
    model = load(tmp_path)
    ids_RL = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    with torch.no_grad():
        logits = hidden_states(model, ids_RL) @ head_weight(model).T
        torch.testing.assert_close(logits, model(input_ids=ids_RL).logits.flatten(0, 1))
    assert (head_weight(model) is model.get_input_embeddings().weight) == tied
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_head_is_not_linear_is_refused(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32, final_logit_softcapping=0.5,
        initializer_range=1.0, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="soft-capping"):
        load(tmp_path)


def test_vocab_size_is_the_heads(learner_dir):
    assert vocab_size(learner_dir) == load(learner_dir).get_output_embeddings().weight.shape[0] == 59


def test_save_and_load_give_the_same_bits(learner_dir, tmp_path):
    model, tokenizer = load(learner_dir), load_tokenizer(learner_dir)
    save_model(model, tokenizer, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert weight_checksum(model) == weight_checksum(again)
    require_same_tokenizer(learner_dir, tmp_path)
    assert (tmp_path / "generation_config.json").is_file()


def test_the_checksum_sees_one_changed_weight(learner_dir):
    model = load(learner_dir)
    before = weight_checksum(model)
    with torch.no_grad():
        next(model.parameters())[3, 3] += 1e-3
    assert weight_checksum(model) != before


def test_the_checksum_does_not_depend_on_the_order_of_summation():
    """A sum of floats does: threads, and other devices, add them up in another order."""
    torch.manual_seed(0)
    one, other = torch.nn.Linear(300, 40, bias=False), torch.nn.Linear(300, 40, bias=False)
    with torch.no_grad():
        one.weight.mul_(torch.logspace(-18, 18, 300))
        other.weight.copy_(one.weight.flip(0, 1))
    assert one.weight.detach().double().sum() != other.weight.detach().double().sum()
    for dtype in (torch.float32, torch.bfloat16):
        assert weight_checksum(one.to(dtype)) == weight_checksum(other.to(dtype))


def test_equal_tokenizers_pass(family):
    learner, explorer = family
    require_same_tokenizer(learner, explorer)
    assert load_tokenizer(learner).get_vocab() == load_tokenizer(explorer).get_vocab()


def test_another_vocabulary_is_refused(family):
    learner, explorer = family

    def swap(value):
        vocabulary = value["model"]["vocab"]
        vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]

    edit(explorer / "tokenizer.json", swap)
    with pytest.raises(
        ValueError, match=r"vocabulary: '[+-]': 5[23] for the learner, 5[23] for the explorer"
    ) as caught:
        require_same_tokenizer(learner, explorer)
    assert str(learner) in str(caught.value)
    assert str(explorer) in str(caught.value)


def test_another_special_token_is_refused(family):
    learner, explorer = family
    edit(explorer / "tokenizer_config.json", lambda value: value.update(eos_token="<pad>"))
    with pytest.raises(
        ValueError, match=r"special tokens: 'eos_token': '<eos>' for the learner, '<pad>' for the explorer"
    ):
        require_same_tokenizer(learner, explorer)


def test_other_splitting_rules_are_refused(family):
    learner, explorer = family
    edit(explorer / "tokenizer.json", lambda value: value.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(
        ValueError, match=r"tokenization rules: 'pre_tokenizer': 'type': 'WhitespaceSplit' for the learner"
    ):
        require_same_tokenizer(learner, explorer)


def test_another_chat_template_is_refused_at_its_character(family):
    learner, explorer = family
    for directory, word in ((learner, "user"), (explorer, "human")):
        text = "{% for m in messages %}<|" + word + "|>{{ m.content }}{% endfor %}"
        (directory / "chat_template.jinja").write_text(text)
    with pytest.raises(
        ValueError, match=r"chat template: .*user.* for the learner, .*human.* for the explorer at character"
    ):
        require_same_tokenizer(learner, explorer)


def test_a_missing_chat_template_is_refused(family):
    learner, explorer = family
    (learner / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match="absent for the explorer"):
        require_same_tokenizer(learner, explorer)


def test_liger_takes_over_norms_and_mlp_and_keeps_the_weights(learner_dir, monkeypatch):
    # What Liger exchanges for the whole process is put back.
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    rotary = modeling_qwen3.apply_rotary_pos_emb
    model, plain = load(learner_dir), load(learner_dir)
    assert use_liger(model, rotary=True)
    layer = model.get_decoder().layers[0]
    for module in (layer.mlp, layer.input_layernorm, layer.self_attn.q_norm, model.get_decoder().norm):
        assert module.forward.__func__.__module__.startswith("liger_kernel")
    assert modeling_qwen3.apply_rotary_pos_emb is not rotary
    assert "forward" not in vars(model)  # the loss is not Liger's
    for (name, ours), (other, theirs) in zip(model.named_parameters(), plain.named_parameters()):
        assert name == other
        assert torch.equal(ours, theirs)


def test_liger_leaves_the_rotary_embedding_where_it_is_told_to(learner_dir, monkeypatch):
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    rotary = modeling_qwen3.apply_rotary_pos_emb
    assert use_liger(load(learner_dir), rotary=False)
    assert modeling_qwen3.apply_rotary_pos_emb is rotary


def test_liger_leaves_families_alone_that_it_does_not_know(learner_dir, monkeypatch):
    model = load(learner_dir)
    monkeypatch.setattr(model.config, "model_type", "unheard_of")
    assert not use_liger(model, rotary=True)
