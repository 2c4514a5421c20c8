"""The paper's presets, run for real: tiny models in the same layouts, DAPO-Math-17k in both published schemas."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_parts
import torch
from run_parts import REPOSITORY, train_here
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rollout.store import read_rollouts

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Single tokens, so that a model of random weights boxes the right answer now and then.
BOXES = [f"\\boxed{{{text}}}" for text in ("4", "4.0", "8/2", "2+2", "\\frac{8}{2}", "2^2", "12/3", "5-1", "04", "7")]
SMALL = {
    "algorithm.group_size": 4,
    "algorithm.prompts_per_step": 4,
    "algorithm.mini_batch_prompts": 2,
    "rollout.max_response_tokens": 16,
    "reward.workers": 1,
    "evaluation.samples": 2,
    "evaluation.k": "[1,2]",
}


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in BOXES])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_family(folder: Path, architecture: str) -> tuple[Path, Path]:
    """Learner and explorer with random weights, in bfloat16 and in several files, as published models are."""
    tokenizer = tokenizer_of_bytes()
    for name, layers in (("learner", 2), ("explorer", 1)):
        torch.manual_seed(layers)
        shape: dict[str, Any] = {
            "vocab_size": len(tokenizer) + 3,  # embeddings are padded to a round number
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids(SPECIAL[0]),
        }
        if architecture == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shape))
        stops = [tokenizer.convert_tokens_to_ids(text) for text in (SPECIAL[0], SPECIAL[2])]
        model.generation_config = GenerationConfig(eos_token_id=stops)
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="60KB")
        tokenizer.save_pretrained(folder / name)
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    return folder / "learner", folder / "explorer"


def questions() -> list[str]:
    return [f"What is {a} + {4 - a}?" for a in range(-4, 6)]


def write_original(file: Path) -> Path:
    """BytedTsinghua-SIA/DAPO-Math-17k: chat messages, the answer in a struct, every question many times."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": f"Solve step by step. {question}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{index}"},
        }
        for _ in range(3)
        for index, question in enumerate(questions())
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def write_processed(file: Path) -> Path:
    """open-r1/DAPO-Math-17k-Processed: text, the answer as `solution`."""
    rows = [
        {
            "prompt": question,
            "solution": "4",
            "data_source": "math_dapo",
            "source_prompt": [{"content": question, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{index}"},
        }
        for index, question in [*enumerate(questions()), (99, questions()[0])]
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def write_math_500(file: Path) -> Path:
    rows = [{"problem": f"Compute ${n}-{n - 4}$.", "solution": "…", "answer": "4", "level": 1} for n in range(5, 9)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def words(tmp_path: Path, preset: str, family: tuple[Path, Path], train: Path, **settings: object) -> list[str]:
    chosen: dict[str, object] = {
        "run.dir": tmp_path / "run",
        "learner.model": family[0],
        "explorer.model": family[1],
        "data.train": train,
        "data.eval": write_math_500(tmp_path / "math-500.parquet"),
        **SMALL,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return [str(REPOSITORY / "configs" / f"{preset}.toml"), *(f"{name}={value}" for name, value in chosen.items())]


def assert_it_trained(run_dir: Path, steps: int, learner_dir: Path) -> None:
    assert [line["step"] for line in run_parts.training_lines(run_dir)] == list(range(1, steps + 1))
    assert [line["step"] for line in run_parts.evaluation_lines(run_dir)] == [0, steps]
    assert run_parts.ledger(run_dir)["conserved"]
    rewards = Counter(read_rollouts(run_dir, columns=["reward"]).to_pydict()["reward"])
    assert set(rewards) == {0.0, 1.0}  # math-verify accepts 8/2 for 4, and 7 not
    before = {name: tensor for file in learner_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = dict(AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype="auto").named_parameters())
    assert before.keys() == after.keys()
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_qwen3_on_the_original_schema(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    family = write_family(tmp_path, "qwen3")
    data = write_original(tmp_path / "dapo.parquet")
    command = words(
        tmp_path, "qwen3_1.7b_to_8b", family, data, algorithm__steps=2, algorithm__anneal_steps=2,
        learner__learning_rate=1e-3,
    )  # fmt: skip
    run_dir = train_here(command)
    said = capfd.readouterr().out
    assert "30 rows, 10 questions (20 duplicates removed)" in said
    assert "prompt from column prompt, answer from column reward_model.ground_truth" in said
    assert "4 problems x 2 completions" not in said  # all of them, as the preset says
    assert_it_trained(run_dir, 2, family[0])
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2)] == [{(4, 0)}, {(0, 4)}]
    resolved = json.loads((run_dir / "config.resolved.json").read_text())
    assert (resolved["loss"]["kl_rows"], resolved["learner"]["gradient_checkpointing"]) == ("all", True)
    prompts = set(read_rollouts(run_dir, columns=["prompt"]).to_pydict()["prompt"])
    assert all(text.startswith("<|im_start|>user\nSolve step by step. What is ") for text in prompts)
    assert all(text.endswith("?<|im_end|>\n<|im_start|>assistant\n") for text in prompts)


@pytest.mark.slow
def test_internlm_after_conversion_on_the_processed_schema(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    family = write_family(tmp_path, "llama")
    data = write_processed(tmp_path / "dapo.parquet")
    command = words(
        tmp_path, "internlm2.5_1.8b_to_7b", family, data, algorithm__steps=2, algorithm__anneal_steps=2,
        learner__learning_rate=1e-3, algorithm__schedule="constant", algorithm__alpha=0.5,
    )  # fmt: skip
    run_dir = train_here(command)
    said = capfd.readouterr().out
    assert "11 rows, 10 questions (1 duplicates removed)" in said
    assert "answer from column" in said
    assert_it_trained(run_dir, 2, family[0])
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2)] == [{(2, 2)}, {(2, 2)}]
    assert set(read_rollouts(run_dir, columns=["prompt"]).to_pydict()["prompt"]) <= set(questions())


@pytest.mark.slow
def test_the_authors_code_trains_two_phases_and_one_row_more(tmp_path: Path) -> None:
    family = write_family(tmp_path, "qwen3")
    data = write_original(tmp_path / "dapo.parquet")
    command = words(
        tmp_path, "authors_code", family, data, algorithm__steps=3, algorithm__anneal_steps=3,
        algorithm__group_size=3, algorithm__mini_batch_prompts=4, explorer__max_response_tokens=40,
        learner__learning_rate=1e-3,
    )  # fmt: skip
    run_dir = train_here(command)
    assert_it_trained(run_dir, 3, family[0])
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2, 3)] == [{(3, 0)}, {(2, 2)}, {(0, 3)}]
    rows = read_rollouts(run_dir, 2, columns=["source", "slot", "reward", "advantage", "token_ids"]).to_pylist()
    assert [row["source"] for row in rows] == ["explorer"] * 8 + ["learner"] * 8  # ⌈αG⌉ + ⌈(1−α)G⌉ = G + 1 rows
    for source in ("explorer", "learner"):
        for slot in range(4):  # groups never mix: the advantages of each source sum to 0
            own = [row["advantage"] for row in rows if (row["source"], row["slot"]) == (source, slot)]
            assert sum(own) == pytest.approx(0, abs=1e-6)
    explorer = [row for row in read_rollouts(run_dir).to_pylist() if row["source"] == "explorer"]
    assert max(len(row["token_ids"]) for row in explorer) > 16  # scored whole, trained cut
    line = run_parts.training_lines(run_dir)[0]
    assert 0.5 < line["explorer/ratio_mean"] < 2  # anchored at the learner, whose first ratio is 1
