"""Which files a model directory's weights are, and in which words a directory is refused."""

import json
from pathlib import Path

import pytest

from rollout.torch_weights import INDEX, SINGLE, read_shape, weight_files


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "gone.safetensors"})
    (tmp_path / SINGLE).touch()
    assert weight_files(tmp_path) == [tmp_path / SINGLE]


def test_each_shard_is_named_once_in_the_order_of_names(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        file.touch()
    assert weight_files(tmp_path) == files


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(ValueError) as caught:
        weight_files(tmp_path)
    said = "2.safetensors and 1 more are missing (2 of 3 files): download the model again"
    assert str(caught.value) == f"{tmp_path}: {said}"
    with pytest.raises(ValueError) as caught:
        weight_files(tmp_path, named="MODEL")
    assert str(caught.value) == f"MODEL: {said}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"no weights there (neither {SINGLE} nor {INDEX})"),
        ("{", f"{INDEX} is not JSON"),
        ("[]", f"{INDEX} holds no JSON object"),
        ("{}", f"{INDEX} has no weight_map that names files"),
        ('{"weight_map": {}}', f"{INDEX} has no weight_map that names files"),
        ('{"weight_map": {"a": 1}}', f"{INDEX} has no weight_map that names files"),
        ('{"weight_map": ["a"]}', f"{INDEX} has no weight_map that names files"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError) as caught:
        weight_files(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {message}")
    assert "download the model again" in str(caught.value)


def test_a_configuration_that_is_no_object_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('["Qwen3ForCausalLM"]')
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object: download the model again"):
        read_shape(tmp_path)
