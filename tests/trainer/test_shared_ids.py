"""Models of one tokenizer whose embeddings differ in size: rows that a model cannot score never reach it."""

import json
import shutil
from pathlib import Path

import pytest
import run_parts
import torch
from run_parts import arguments, ledger, train_here
from safetensors.torch import load_file, save_file

from core.config import Config
from core.configfile import ConfigError, load_config, parse_command
from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.shared_ids import UNKNOWN_TOKEN, id_bounds, unknown_tokens
from rollout.store import read_rollouts
from trainer.dry_run import dry_run

EXTRA = 3


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def resized(source: Path, target: Path, more: int) -> Path:
    """The model with `more` rows of zeros in its embedding, which is its head too, or without its last ones."""
    shutil.copytree(source, target)
    config, weights = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    size = config["vocab_size"] + more
    embedding = weights["model.embed_tokens.weight"]
    embedding = torch.cat([embedding, torch.zeros(max(0, more), embedding.shape[1])])[:size]
    save_file(weights | {"model.embed_tokens.weight": embedding.contiguous()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    return target


@pytest.mark.parametrize(
    ("learner", "explorer", "weight", "expected"),
    [
        (512, 640, "none", (512, 512)),  # explorer, learner
        (640, 512, "none", (512, 640)),  # an explorer cannot draw what it lacks; its ids are all the learner's
        (640, 512, "mixture", (512, 512)),  # π_ω scores learner rows
        (512, 512, "mixture", (512, 512)),
    ],
)
def test_ids_are_bounded_by_the_models_that_score_a_row(
    learner: int, explorer: int, weight: str, expected: tuple[int, int]
) -> None:
    config = load_config(None, [f"correction.learner.weight={weight}"])
    found = id_bounds(config, {Source.LEARNER: learner, Source.EXPLORER: explorer})
    assert (found[Source.EXPLORER], found[Source.LEARNER]) == expected
    assert id_bounds(Config(), {Source.LEARNER: learner})[Source.LEARNER] == learner


@pytest.mark.parametrize(("source", "highest", "expected"), [
    (Source.EXPLORER, 511, None), (Source.EXPLORER, 512, UNKNOWN_TOKEN), (Source.LEARNER, 639, None),
    (Source.LEARNER, 640, UNKNOWN_TOKEN),
])  # fmt: skip
def test_a_row_with_an_id_beyond_its_bound_is_unfit(source: Source, highest: int, expected: str | None) -> None:
    why_unfit = unknown_tokens(Config(), {Source.LEARNER: 640, Source.EXPLORER: 512})
    row = Completion(
        key=CompletionKey(source=source, step=1, slot=0, sample=0), prompt_uid="u",
        token_bytes=pack_tokens([3, highest, 5]), logprob_bytes=pack_logprobs([-1.0] * 3), finish="stop", version=0,
        worker="w.1", started_s=0.0, finished_s=1.0,
    )  # fmt: skip
    assert why_unfit(row) == expected


def test_a_larger_explorer_s_unknown_tokens_are_replaced(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    family = run_parts.tiny_family(root)
    explorer = resized(family.explorer, tmp_path / "explorer", EXTRA)
    known = json.loads((family.learner / "config.json").read_text())["vocab_size"]
    run = train_here(
        arguments(
            root, tmp_path / "run", explorer__model=explorer, algorithm__steps=3, algorithm__anneal_steps=3,
            data__eval="", rollout__max_response_tokens=6,
        )
    )  # fmt: skip
    said = capfd.readouterr().out
    assert f"explorer.model has {known + EXTRA} token ids: explorer rows with an id above {known - 1} are" in said
    account = ledger(run)
    assert account["conserved"]
    assert account["explorer"]["dropped"]["unknown_token"] > 0
    assert account["explorer"]["replaced"] > 0
    assert account["explorer"]["trained"] > 0
    rows = read_rollouts(run, columns=["token_ids"]).to_pydict()["token_ids"]
    assert rows
    assert max(max(row) for row in rows) < known


def test_a_tokenizer_with_more_tokens_than_a_model_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run_parts.HERE))
    explorer = resized(run_parts.tiny_family(root).explorer, tmp_path / "explorer", -40)
    with pytest.raises(ConfigError, match=r"the prompts need token id \d+, and explorer\.model has ids 0 …"):
        dry_run(parse_command(arguments(root, tmp_path / "run", explorer__model=explorer)))
