"""Diversity and pass@k of stored completions, by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.diversity import edit_diversity, self_bleu
from core.schema import Group, Sampling
from rollout.completion_store import CompletionStore, Identity, Recorded
from rollout.store import write_rollouts
from trainer.diversity import main, read_groups


def measured(tmp_path: Path, *arguments: object) -> list[dict]:
    out = tmp_path / "out.json"
    assert main([*map(str, arguments), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def rewarded(groups: list[Group], rewards: list[float]) -> list[Group]:
    """The groups with texts `slot place` and these rewards in each."""
    return [
        msgspec.structs.replace(
            group,
            rows=tuple(
                msgspec.structs.replace(row, text=f"{group.slot} {place}", reward=rewards[place])
                for place, row in enumerate(group.rows)
            ),
        )
        for group in groups
    ]


def test_a_run_is_measured_per_source(made_up_groups: Callable[..., list[Group]], tmp_path: Path) -> None:
    first = rewarded(made_up_groups(prompts=3, explorer=2, learner=2), [1, 0, 0, 0])
    second = rewarded(made_up_groups(prompts=3, explorer=0, learner=4, step=2), [1, 1, 0, 0])
    for step, groups in ((1, first), (2, second)):
        write_rollouts(tmp_path / "run", step, groups)
    explorer, learner = measured(tmp_path, tmp_path / "run", "--rows", "2")
    assert (explorer["source"], explorer["groups"], explorer["completions"]) == ("explorer", 3, 6)
    assert (learner["source"], learner["groups"], learner["completions"]) == ("learner", 6, 18)
    assert explorer["pass@k"] == {
        "1": {"mean": 0.5, "stderr": 0.0, "groups": 3}, "2": {"mean": 1.0, "stderr": 0.0, "groups": 3},
    }  # fmt: skip
    assert learner["pass@k"]["1"]["mean"] == pytest.approx((0 + 0.5) / 2)
    assert learner["pass@k"]["4"] == {"mean": 1.0, "stderr": 0.0, "groups": 3}
    pairs = [edit_diversity([row.completion.tokens for row in group.rows[:2]]) for group in first]
    assert explorer["edit_diversity"] == pytest.approx(np.mean(pairs))
    assert explorer["self_bleu"] == pytest.approx(np.mean([self_bleu([f"{i} 0", f"{i} 1"]) for i in range(3)]))
    assert explorer["unique_answer_ratio"] == 1.0
    learner_only = measured(tmp_path, tmp_path / "run", "--rows", "4")[1]
    assert learner_only["edit_diversity"] == pytest.approx(
        np.mean([edit_diversity([row.completion.tokens for row in group.rows]) for group in second])
    )


def test_a_store_has_no_texts_and_no_rewards(tmp_path: Path) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=8, stop_token_ids=(1,))
    identity = Identity(model="m", tokenizer="t", template="plain", suffix="", sampling=sampling)
    store = CompletionStore(tmp_path / "store", identity)
    for uid in ("p", "q"):
        tokens = [np.int32([5, 6, 7, 8]), np.int32([5, 6, 7, 9])]
        store.add([Recorded(uid, i, ids, np.zeros(4, np.float32), "stop") for i, ids in enumerate(tokens)])
    (found,) = measured(tmp_path, tmp_path / "store", "--rows", "2")
    assert found["source"] == "store"
    assert found["pass@k"] == {}
    assert found["edit_diversity"] == 0.25
    assert found["self_bleu"] == pytest.approx(self_bleu(["5 6 7 8", "5 6 7 9"]))


def test_files_of_an_evaluation_are_benchmarks_and_answers_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["2", "2", "3", "4"]
    columns = {
        "source": ["model"] * 4, "prompt_uid": ["p"] * 4, "sample": [3, 2, 1, 0],
        "text": [f"I think \\boxed{{{answer}}}" for answer in answers], "reward": [1.0, 1.0, 0.0, 0.0],
    }  # fmt: skip
    for name in ("aime24", "math500"):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    found = measured(tmp_path, tmp_path)
    assert [one["source"] for one in found] == ["aime24: model", "math500: model"]
    assert found[0]["unique_answer_ratio"] == 0.75
    printed = capsys.readouterr().out
    assert "50.0 ± 0.0 (1)" in printed
    ((group,),) = read_groups(tmp_path / "aime24.parquet").values()
    assert [row.correct for row in group] == [False, False, True, True]  # in the order of samples


def test_places_without_completions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_text("no")
    pq.write_table(pa.table({"prompt_uid": ["p"]}), tmp_path / "bare.parquet")
    nothing = pa.array([], pa.string())
    pq.write_table(pa.table({"prompt_uid": nothing, "text": nothing}), tmp_path / "none.parquet")
    for place, message in (
        ("nowhere", "no such file or directory"),
        ("empty", "give a run, an evaluation or a store"),
        ("broken.parquet", "cannot be read"),
        ("bare.parquet", "needs the columns prompt_uid and text or token_ids, and has prompt_uid"),
        ("none.parquet", "holds no completions"),
    ):
        assert main([str(tmp_path / place)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path), "--rows", "1"]) == 2
    assert "--rows 1 must be at least 2" in capsys.readouterr().err
