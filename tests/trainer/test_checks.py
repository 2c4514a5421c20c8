"""What stops a run is found before anything is loaded, by a dry run and by the start of a run alike."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_parts
import torch
from run_parts import arguments
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from core.configfile import Command, ConfigError, load_config, parse_command
from rollout.patience import Starved
from trainer.checks import Place, check_start
from trainer.command import main

CPU = Place(rank=0, size=1, device=torch.device("cpu"))
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What check_start says of a run with these settings."""
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))

    def run(place: Place = CPU, **settings: object) -> str:
        with pytest.raises(ConfigError) as caught:
            check_start(parse_command(arguments(root, tmp_path / "run", **settings)).config, place)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    return run


@pytest.fixture
def learner(root: Path, tmp_path: Path) -> Path:
    """A copy of a whole model directory, to be damaged."""
    return shutil.copytree(run_parts.tiny_family(root).learner, tmp_path / "learner")


def test_a_run_that_can_start_is_let_through(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    check_start(parse_command(arguments(root, tmp_path / "run")).config, CPU)
    check_start(load_config(), CPU)


@pytest.mark.parametrize("words", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout__max_response_tokens": 100}, "16 + rollout.max_response_tokens 100 = 116 exceeds the 64 positions"),
        ({"reward__function": "no_such_module:f"}, "cannot import no_such_module"),
        ({"learner__sequence_parallel": 2}, "learner.sequence_parallel = 2 ranks share a line of tokens, and there"),
    ],
)
def test_a_run_and_a_dry_run_refuse_the_same_and_leave_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any], message: str, words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)
    assert main([*arguments(root, tmp_path / "run", **settings), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_every_problem_is_said_at_once(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    said = refused(reward__function="os:nothing", rollout__max_response_tokens=100).splitlines()
    assert [line.split()[0] for line in said] == ["reward.function", *["rollout.max_prompt_tokens"] * 2]
    assert 'learner.kernels = "triton" needs a GPU' in refused(learner__kernels="triton")


def test_an_explorer_has_a_limit_of_its_own(refused: Refused) -> None:
    said = refused(explorer__max_response_tokens=60)
    assert "16 + explorer.max_response_tokens 60 = 76 exceeds the 64 positions of explorer.model: lower" in said
    assert "explorer.max_response_tokens to 48 or less" in said
    assert "learner.model" not in said


@pytest.mark.parametrize("text", ["def f(:\n", "import nowhere_at_all\n", "def g(): pass\n", "def f(words): pass\n"])
def test_a_reward_function_is_imported_before_the_start(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "my_reward_of_checks.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert refused(reward__function="my_reward_of_checks:f")


def test_columns_that_the_reward_function_requires_are_missed_in_all_data_at_once(
    refused: Refused, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needing_reward_of_checks.py").write_text(
        "def f(completions, solution, answer, level=None): return [1.0]\n"
    )
    (tmp_path / "train.jsonl").write_text('{"prompt": "8 5 = 13 :", "answer": "13", "level": 1}\n')
    pq.write_table(pa.table({"question": ["8 5 = 13 :"], "answer": ["13"], "solution": [b"x"]}), tmp_path / "e.parquet")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"reward__function": "needing_reward_of_checks:f", "data__train": tmp_path / "train.jsonl"}
    train, evaluation = refused(**settings, data__eval=tmp_path / "e.parquet").splitlines()
    assert 'f" requires solution, and data.train has no such column.' in train
    assert "the columns there are: answer, level." in train
    assert "requires solution, and data.eval has no such column." in evaluation
    assert "the columns there are: answer. " in evaluation  # bytes do not travel
    assert len(refused(**settings, data__eval="").splitlines()) == 1
    embedded = refused(reward__function="needing_reward_of_checks:f")
    assert [line.split(" has no such")[0].split()[-1] for line in embedded.splitlines()] == ["data.train", "data.eval"]
    (tmp_path / "train.jsonl").write_text('{"prompt": "8 5 = 13 :", "answer": "13", "solution": "8 + 5"}\n')
    check_start(parse_command(arguments(root, tmp_path / "run", **settings, data__eval="")).config, CPU)


def test_architectures_the_torch_engine_does_not_run(refused: Refused, tmp_path: Path, learner: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(learner)
    said = refused(learner__model=learner)
    assert "learner.model: " in said
    assert "Qwen2ForCausalLM is not supported by the torch engine, which runs Qwen3ForCausalLM and Llama" in said
    assert "rollout.engine=vllm" in said
    # A replay generates nothing, and remote explorers bring their own engine.
    config = load_config(None, [f"explorer.model={learner}", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"explorer\.model.*Qwen2ForCausalLM"):
        check_start(config, CPU)
    check_start(config, CPU._replace(generates=False))


def test_windows_and_heads_that_packed_rows_cannot_have(refused: Refused, learner: Path) -> None:
    heads = Qwen3Config.from_pretrained(learner).num_attention_heads
    three = CPU._replace(size=3)
    said = refused(place=three, learner__sequence_parallel=3)
    assert f"learner.sequence_parallel = 3 cannot share out {heads} query" in said
    gemma = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(gemma).save_pretrained(learner)
    said = refused(learner__model=learner)
    assert "learner.model: gemma3_text has sliding_attention layers" in said
    assert "learner.micro_batch_tokens=0" in said
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(learner)
    assert "learner.model: BloomForCausalLM does not support" in refused(learner__model=learner)


def test_both_models_directories_are_looked_through(refused: Refused, learner: Path) -> None:
    os.truncate(learner / "model.safetensors", 5000)
    for key in ("learner.model", "explorer.model"):
        said = refused(**{key.replace(".", "__"): learner})
        assert said.startswith(f'{key} = "{learner}": model.safetensors has 5,000 bytes')
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("place", ["/dev/null/x", "/dev/null"])
def test_a_run_directory_that_cannot_be(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    for words in ([], ["--dry-run"]):
        assert main([*arguments(root, Path(place)), *words]) == 2
        assert f'run.dir = "{place}" cannot be made or written' in capsys.readouterr().err


def test_a_dry_run_meets_the_run_directory_as_it_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    (tmp_path / "thesis.tex").write_text("x")
    assert main([*arguments(root, tmp_path), "--dry-run"]) == 2
    assert "holds other files (thesis.tex" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_rank_of_a_dry_run_speaks_for_all(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    words = [*arguments(root, tmp_path / "run", learner__sequence_parallel=2), "--dry-run"]
    for rank, spoken in (("0", True), ("1", False)):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert main(words) == 0
        assert bool(capsys.readouterr().out) == spoken


def test_resume_is_offered_where_there_is_a_checkpoint(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(command: Command) -> None:
        raise Starved("waited 600 s")

    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)
    monkeypatch.setattr("trainer.loop.train", starve)
    words = arguments(root, tmp_path / "run")
    assert main(words) == 1
    assert capsys.readouterr().err == "s2l-po: waited 600 s\n"
    (tmp_path / "run" / "checkpoints" / "step_2").mkdir(parents=True)
    assert main(words) == 1
    assert capsys.readouterr().err == "s2l-po: waited 600 s (--resume continues from the last checkpoint)\n"


def test_device_weights_need_memory_files_where_rollouts_are_made(
    refused: Refused, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(where: str, place: Place = CPU) -> None:
        check_start(parse_command(arguments(root, tmp_path / "run", rollout__weights=where)).config, place)

    start("device")
    monkeypatch.setattr("trainer.checks.memory_is_shared", lambda: False)
    said = refused(rollout__weights="device")
    assert said.startswith('rollout.weights = "device" needs memory files and /proc (Linux)')
    assert said.endswith("use rollout.weights=files")
    for where in ("memory", "files"):
        start(where)
    start("device", CPU._replace(generates=False))
