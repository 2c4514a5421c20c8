"""`trainer/main.py` as a user meets it: help, dry run, and bad input with value, bound and remedy (exit code 2)."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_parts
from conftest import write_tokenizer
from run_parts import arguments

from core.configfile import parse_command, write_resolved
from core.configkeys import all_keys
from trainer.checkpoint import write_checkpoint
from trainer.command import main

Fail = Callable[..., str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def _signals_stay_pytest_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.command.SIGNALS.install", lambda: None)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Run the command; it must exit with 2 and say one message, which is returned."""
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))

    def run(words: list[str]) -> str:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("s2l-po: ") == 1
        assert "Traceback" not in said
        return said

    return run


def test_help_lists_every_key_with_default_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    squeezed = re.sub(r"\s+", "", text)
    for key in all_keys().values():
        assert f"  {key.name} = " in text
        assert re.sub(r"\s+", "", key.sentence) in squeezed
    for flag in ("--dry-run", "--resume", "--clean", "--help"):
        assert f"  {flag}" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["algorithm.stpes=3"], ["unknown key algorithm.stpes", "did you mean algorithm.steps?"]),
        (["algorithm.steps=many"], ['algorithm.steps = "many"', "an integer >= 1"]),
        (["algorithm.group_size=1"], ["algorithm.group_size = 1", "at least 2"]),
        (["algorithm.steps=10"], ["algorithm.anneal_steps = 40", "algorithm.steps = 10", "anneal_steps=5"]),
        (["explorer.processes=0"], ["explorer.processes = 0", "explorer.processes=1", "ipc:///"]),
        (
            ["learner.micro_batch_tokens=0", "learner.micro_batch_rows=48"],
            ["micro_batch_rows = 48", "16 x 8 = 128", "use one of", "64, 128"],
        ),
        (["algorithm.mini_batch_prompts=5"], ["mini_batch_prompts = 5", "prompts_per_step = 32", "use one of"]),
        (["learner.model=/nowhere", "explorer.model=/nowhere"], ['learner.model = "/nowhere"', "download the model"]),
        (["configs/tyni.toml"], ["no configuration file configs/tyni.toml", "did you mean configs/tiny.toml?"]),
        (["--resmue"], ["unknown option --resmue", "did you mean --resume?"]),
    ],
)
def test_a_setting_that_cannot_be(fails: Fail, words: list[str], parts: list[str], tmp_path: Path) -> None:
    message = fails([*words, f"run.dir={tmp_path}/run"])
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def parquet(file: Path, prompts: list[str]) -> Path:
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string()), "answer": ["1"] * len(prompts)}), file)
    return file


def data_run(root: Path, tmp_path: Path, train: Path, **settings: object) -> list[str]:
    return arguments(root, tmp_path / "run", data__train=train, data__eval="", **settings)


def test_a_missing_data_file(fails: Fail, root: Path, tmp_path: Path) -> None:
    message = fails(data_run(root, tmp_path, tmp_path / "absent.parquet"))
    assert f'data.train = "{tmp_path}/absent.parquet": no such parquet file' in message


def test_a_data_file_that_is_not_parquet(fails: Fail, root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("prompt,answer\n1,2\n")
    message = fails(data_run(root, tmp_path, tmp_path / "x.parquet"))
    assert "data.train" in message
    assert "is not a parquet file" in message


def test_an_empty_data_set(fails: Fail, root: Path, tmp_path: Path) -> None:
    message = fails(data_run(root, tmp_path, parquet(tmp_path / "x.parquet", [])))
    assert "data.train" in message
    assert "holds no rows; give a file with at least one question" in message


def test_fewer_prompts_than_a_step_takes(fails: Fail, root: Path, tmp_path: Path) -> None:
    message = fails(data_run(root, tmp_path, parquet(tmp_path / "x.parquet", ["1 + 2 =", "3 + 4 ="])))
    assert "algorithm.prompts_per_step = 8" in message
    assert "there are 2; lower it to at most 2" in message


def test_prompts_longer_than_the_limit(fails: Fail, root: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", ["1 + 2 =", "1 + 2 + 3 ="])
    message = fails(data_run(root, tmp_path, file, rollout__max_prompt_tokens=5, data__overlong="error"))
    assert "1 of 2 prompts exceed rollout.max_prompt_tokens = 5 (longest: 6)" in message
    assert 'data.overlong = "filter"' in message
    message = fails(data_run(root, tmp_path, file, rollout__max_prompt_tokens=3))
    assert "all 2 prompts exceed rollout.max_prompt_tokens = 3 (shortest: 4); raise the limit" in message


def test_a_chat_template_that_is_not_there(fails: Fail, root: Path, tmp_path: Path) -> None:
    message = fails(data_run(root, tmp_path, parquet(tmp_path / "x.parquet", ["1 ="]), data__template="chat"))
    assert "no chat template" in message
    assert 'data.template = "plain"' in message


def explorer_of_another_family(root: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "explorer"
    shutil.copytree(run_parts.tiny_family(root).explorer, directory)
    write_tokenizer(directory, words=("<pad>", "<eos>", "another", "vocabulary"))
    return directory


def test_tokenizers_that_differ(fails: Fail, root: Path, tmp_path: Path) -> None:
    other = explorer_of_another_family(root, tmp_path)
    message = fails([*arguments(root, tmp_path / "run"), f"explorer.model={other}"])
    assert "learner and explorer differ in their vocabulary" in message
    assert str(other) in message
    assert "choose models of one family" in message


def test_weights_that_do_not_fit(fails: Fail, root: Path, tmp_path: Path) -> None:
    family, other = run_parts.tiny_family(root), tmp_path / "learner"
    shutil.copytree(family.learner, other)
    shutil.copy(family.explorer / "model.safetensors", other)
    message = fails([*arguments(root, tmp_path / "run"), f"learner.model={other}"])
    assert f"the weights in {other} do not fit its config.json" in message


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_such_module:f", ["no_such_module:f", "cannot import no_such_module"]),
        ("run_rewards:plus", ["run_rewards has no plus", 'did you mean "pluses"?']),
        ("time:sleep", ['reward.function = "time:sleep"', "wrap it in a Python function"]),
        ("os:getcwdb", ["TRL's signature", "verl's"]),
    ],
)
def test_a_reward_function_that_cannot_be_used(
    fails: Fail, root: Path, tmp_path: Path, name: str, parts: list[str]
) -> None:
    message = fails(arguments(root, tmp_path / "run", reward__function=name))
    assert all(part in message for part in parts), message
    assert not run_parts.processes_naming(tmp_path / "run")


def test_a_port_in_use(fails: Fail, root: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = fails(arguments(root, tmp_path / "run", stream__endpoint=f"tcp://127.0.0.1:{port}"))
    assert f"tcp://127.0.0.1:{port}" in message
    assert "in use by another process: choose another port" in message


def test_a_run_directory_that_holds_a_run(fails: Fail, root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.resolved.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}")
    message = fails(arguments(root, tmp_path))
    assert f"run.dir: {tmp_path} already holds a run; continue it with --resume, delete it with --clean" in message


def test_a_run_directory_with_other_files(fails: Fail, root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    message = fails([*arguments(root, tmp_path), "--clean"])
    assert f"run.dir: {tmp_path} holds other files (thesis.tex" in message
    assert (tmp_path / "thesis.tex").exists()


def test_resuming_nothing(fails: Fail, root: Path, tmp_path: Path) -> None:
    assert "holds no run; start it without --resume" in fails([*arguments(root, tmp_path / "run"), "--resume"])


def test_resuming_another_computation(fails: Fail, root: Path, tmp_path: Path) -> None:
    write_resolved(parse_command(arguments(root, tmp_path)).config, tmp_path / "config.resolved.json")
    message = fails([*arguments(root, tmp_path, run__seed=1, loss__kl_coef=0.5), "--resume"])
    assert "run.seed: 0 → 1" in message
    assert "loss.kl_coef: 0.001 → 0.5" in message
    assert "restore them or start a new run" in message


def test_a_tracker_that_is_not_installed(
    fails: Fail, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    words = arguments(root, tmp_path / "run", run__log_to='["wandb"]')
    for flags in ([], ["--dry-run"]):
        assert "wandb is not installed; pip install wandb" in fails([*words, *flags])
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_that_verifies(fails: Fail, root: Path, tmp_path: Path) -> None:
    words = arguments(root, tmp_path / "run")
    (tmp_path / "run").mkdir()
    write_resolved(parse_command(words).config, tmp_path / "run" / "config.resolved.json")
    part = {"model": lambda directory: (directory / "config.json").write_text("{}")}
    path = write_checkpoint(tmp_path / "run" / "checkpoints", 2, part, keep=2, previous=0)
    (path / "config.json").write_text("{ }")
    message = fails([*words, "--resume"])
    assert "none of the 1 checkpoints" in message
    assert "step_2: config.json has 3 bytes, 2 were written" in message
    assert "--clean" in message


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    assert main([*arguments(root, tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "4+0 in 1, 3+1 in 2, 2+2 in 3, 0+4 in 4-6" in text
    assert "data.train: embedded:countdown, 1,489 problems" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_the_default_makes_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2LPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    assert "1,489 problems" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_meets_the_same_errors(fails: Fail, root: Path, tmp_path: Path) -> None:
    other = explorer_of_another_family(root, tmp_path)
    assert "differ in their vocabulary" in fails(
        [*arguments(root, tmp_path / "run"), f"explorer.model={other}", "--dry-run"]
    )


def test_under_torchrun_one_rank_speaks_and_the_summary_has_the_message(tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    for rank, spoken in (("0", True), ("1", False)):
        variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": str(error_file)}
        run = subprocess.run(
            [sys.executable, str(run_parts.REPOSITORY / "trainer" / "main.py"), "algorithm.steps=0"],
            env=os.environ | variables, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        assert run.returncode == 2
        assert ("algorithm.steps = 0" in run.stderr) == spoken
        assert "algorithm.steps = 0" in json.loads(error_file.read_text())["message"]["message"]


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_its_output_any_more(root: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = run_parts.arguments(root, run_dir, algorithm__steps=3, algorithm__anneal_steps=2)
    process = subprocess.Popen(
        [sys.executable, str(run_parts.REPOSITORY / "trainer" / "main.py"), *words],
        env=run_parts.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said == "s2l-po: standard output is gone (Broken pipe); this goes on, and writes its files as before\n"
    assert [line["step"] for line in run_parts.training_lines(run_dir)] == [1, 2, 3]
    assert (run_dir / "model" / "model.safetensors").is_file()
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "checkpoints" / "step_3").is_dir()
