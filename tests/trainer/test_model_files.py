"""A model directory that is not whole is refused in a line that says what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from trainer.model_files import check_model_files


@pytest.fixture
def learner(learner_dir: Path, tmp_path: Path) -> Path:
    """A copy of a whole model directory, to be damaged."""
    return shutil.copytree(learner_dir, tmp_path / "learner")


def shards(directory: Path) -> list[Path]:
    """The directory's weights as three files with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    weight_map = {name: names[place % 3] for place, name in enumerate(sorted(weights))}
    for file in names:
        save_file({name: weights[name] for name, held in weight_map.items() if held == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [directory / name for name in names]


def test_a_missing_shard_is_named(learner: Path) -> None:
    files = shards(learner)
    check_model_files(learner, "learner.model")
    files[1].unlink()
    message = r'learner\.model = ".*learner": model-00002-of-00003\.safetensors is missing \(1 of 3 files\): download'
    with pytest.raises(ValueError, match=message):
        check_model_files(learner, "learner.model")


def cut(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


def cut_in_the_header(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 40)


def lengthened(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"x")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def index_without_files(directory: Path) -> None:
    no_weights(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def broken_index(directory: Path) -> None:
    no_weights(directory)
    (directory / "model.safetensors.index.json").write_text("{")


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def inconsistent_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))


def test_a_model_with_code_of_its_own_is_to_be_converted(learner: Path) -> None:
    config = json.loads((learner / "config.json").read_text())
    own = {"model_type": "internlm2", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}}
    (learner / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match=r"code of its own, which nothing here runs: convert it"):
        check_model_files(learner, "learner.model")


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors has 5,000 bytes and its header says"),
        (cut_in_the_header, "model.safetensors has no readable safetensors header (40 bytes)"),
        (lengthened, "and its header says"),
        (no_weights, "no weights there (neither model.safetensors nor model.safetensors.index.json)"),
        (index_without_files, "model.safetensors.index.json has no weight_map that names files"),
        (broken_index, "model.safetensors.index.json is not JSON"),
        (broken_config, "config.json is not JSON"),
        (inconsistent_config, "config.json cannot be used"),
        (no_tokenizer, "no tokenizer there (none of tokenizer.json"),
    ],
)
def test_a_damaged_directory_is_refused_in_a_line(learner: Path, damage: Callable[[Path], None], message: str) -> None:
    check_model_files(learner, "learner.model")
    damage(learner)
    with pytest.raises(ValueError) as caught:
        check_model_files(learner, "learner.model")
    said = str(caught.value)
    assert said.startswith(f'learner.model = "{learner}": ')
    assert message in said
    assert "download the model again" in said
    assert len(said.splitlines()) == 1
