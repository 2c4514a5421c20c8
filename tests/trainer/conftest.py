"""Tiny random models, their tokenizer, and groups of made-up completions."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from core.config import Config
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens

VOCABULARY = ("<pad>", "<eos>", *map(str, range(50)), "+", "-", "*", "/", "=", ",", ":")
EOS = 1
REPOSITORY = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(Path(__file__).parent))  # tests have no packages: run_parts is imported by this directory's path

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def write_tokenizer(directory: Path, *, chat_template: str | None = None, words: tuple[str, ...] = VOCABULARY) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def write_model(
    directory: Path,
    *,
    seed: int,
    layers: int = 2,
    hidden: int = 64,
    tied: bool = True,
    heads: int = 2,
    kv_heads: int = 2,
) -> None:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # spread logits: log-probs far from uniform
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)


@pytest.fixture(scope="session")
def learner_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("learner")
    write_model(directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def explorer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explorer")
    write_model(directory, seed=2, layers=1)
    return directory


@pytest.fixture
def write_tiny_model() -> Callable[..., None]:
    return write_model


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """Config of four prompts a step, groups of four, two updates; dotted overrides such as {"loss.kl_coef": 0.0}."""
    return make_config


def make_config(overrides: dict[str, object] | None = None) -> Config:
    defaults = {
        "algorithm.group_size": 4,
        "algorithm.prompts_per_step": 4,
        "algorithm.mini_batch_prompts": 2,
        "learner.micro_batch_rows": 4,
        "learner.micro_batch_tokens": 0,
        "learner.learning_rate": 1e-3,
        "rollout.max_response_tokens": 12,
    }
    tree = msgspec.to_builtins(Config())
    for name, value in {**defaults, **(overrides or {})}.items():
        *path, leaf = name.split(".")
        table = tree
        for part in path:
            table = table[part]
        table[leaf] = value
    return msgspec.convert(tree, Config)


@pytest.fixture
def made_up_groups() -> Callable[..., list[Group]]:
    return make_groups


def make_groups(
    *, prompts: int = 4, explorer: int = 2, learner: int = 2, seed: int = 0, step: int = 1, longest: int = 12
) -> list[Group]:
    """Groups of random tokens, log-probs and advantages; about half of the completions end in EOS."""
    rng = np.random.default_rng(seed)
    groups = []
    for slot in range(prompts):
        prompt_ids = tuple(int(x) for x in rng.integers(2, len(VOCABULARY), size=rng.integers(3, 7)))
        prompt = Prompt(uid=f"p{slot}", token_ids=prompt_ids, text="", answer="")
        rows = []
        for source, count in ((Source.EXPLORER, explorer), (Source.LEARNER, learner)):
            for sample in range(count):
                key = CompletionKey(source=source, step=step, slot=slot, sample=sample)
                rows.append(made_up_row(rng, key, prompt.uid, longest))
        advantages = rng.normal(size=len(rows))
        groups.append(
            Group(prompt=prompt, step=step, slot=slot, rows=tuple(rows), advantages=tuple(advantages.tolist()))
        )
    return groups


def made_up_row(rng: np.random.Generator, key: CompletionKey, prompt_uid: str, longest: int) -> ScoredCompletion:
    length = int(rng.integers(1, longest + 1))
    tokens = rng.integers(2, len(VOCABULARY), size=length)
    stops = bool(rng.integers(2))
    tokens[-1] = EOS if stops else tokens[-1]
    completion = Completion(
        key=key,
        prompt_uid=prompt_uid,
        token_bytes=pack_tokens(tokens),
        logprob_bytes=pack_logprobs(-rng.exponential(3.0, size=length)),
        finish="stop" if stops else "length",
        version=0,
        worker="w",
        started_s=0.0,
        finished_s=0.0,
    )
    return ScoredCompletion(completion=completion, reward=float(rng.integers(2)), text="")


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a Python program as `size` ranks that meet over gloo; their standard outputs. A failing rank is an error."""

    def run(program: str, size: int, *arguments: object, timeout_s: float = 120.0) -> list[str]:
        script = tmp_path / "program.py"
        script.write_text(program)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(size):
            names = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = os.environ | {name: str(value) for name, value in names.items()}
            environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
            command = [sys.executable, str(script), *map(str, arguments)]
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=timeout_s) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0] * size, "\n".join(err for _, err in outputs)
        return [out for out, _ in outputs]

    return run
