import numpy as np
import pyarrow.parquet as pq
import pytest

from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from rollout.store import SCHEMA, cut_rollouts, read_rollouts, rollout_file, stored_steps, write_rollouts


def group(step, slot, explorer=1, learner=2):
    prompt = Prompt(uid=f"uid{slot}", token_ids=(8, 5), text=f"8 5 = {slot} :", answer=str(slot))
    rows = []
    for source, count in ((Source.EXPLORER, explorer), (Source.LEARNER, learner)):
        for sample in range(count):
            size = 1 + (slot + sample) % 4
            completion = Completion(
                key=CompletionKey(source=source, step=step, slot=slot, sample=sample),
                prompt_uid=prompt.uid,
                token_bytes=pack_tokens(range(size)),
                logprob_bytes=pack_logprobs([-0.1 * place for place in range(size)]),
                finish="stop",
                version=0 if source is Source.EXPLORER else step - 1,
                spans=((0, step - 1), (1, step)) if (source, size) == (Source.LEARNER, 3) else (),
                worker=f"{source.value}-0",
                started_s=1.0,
                finished_s=2.0,
            )
            rows.append(ScoredCompletion(completion=completion, reward=float(sample), text=f"answer {sample} <b> é"))
    advantages = tuple(0.5 - place for place in range(len(rows)))
    return Group(prompt=prompt, step=step, slot=slot, rows=tuple(rows), advantages=advantages)


def test_every_row_reads_back_with_its_types(tmp_path):
    path = write_rollouts(tmp_path, 3, [group(3, 0), group(3, 1)])
    assert path == tmp_path / "rollouts" / "step_000003.parquet"
    table = read_rollouts(tmp_path, 3)
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    assert len(rows) == 6
    assert [row["source"] for row in rows] == ["explorer", "learner", "learner"] * 2
    last = rows[5]
    assert (last["step"], last["slot"], last["sample"], last["prompt_uid"]) == (3, 1, 1, "uid1")
    assert (last["prompt"], last["answer"], last["text"]) == ("8 5 = 1 :", "1", "answer 1 <b> é")
    assert last["token_ids"] == [0, 1, 2]
    np.testing.assert_array_equal(np.float32(last["logprobs"]), np.float32([0.0, -0.1, -0.2]))
    assert (last["reward"], last["advantage"]) == (1.0, -1.5)
    assert (last["finish"], last["version"], last["worker"]) == ("stop", 2, "learner-0")
    assert last["spans"] == [{"first": 0, "version": 2}, {"first": 1, "version": 3}]
    assert rows[0]["spans"] == []


def test_files_are_zstd_and_the_fragment_is_gone(tmp_path):
    path = write_rollouts(tmp_path, 1, [group(1, 0)])
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"
    assert [file.name for file in path.parent.iterdir()] == ["step_000001.parquet"]


def test_all_steps_in_order_and_chosen_columns(tmp_path):
    for step in (10, 9, 100):
        write_rollouts(tmp_path, step, [group(step, 0)])
    assert stored_steps(tmp_path) == [9, 10, 100]
    table = read_rollouts(tmp_path, columns=["step", "reward"])
    assert table.column_names == ["step", "reward"]
    assert table["step"].to_pylist() == [9] * 3 + [10] * 3 + [100] * 3


def test_a_step_that_happens_again_replaces_its_file(tmp_path):
    write_rollouts(tmp_path, 1, [group(1, 0), group(1, 1)])
    write_rollouts(tmp_path, 1, [group(1, 5)])
    assert set(read_rollouts(tmp_path, 1)["slot"].to_pylist()) == {5}


def test_steps_after_the_last_are_cut(tmp_path):
    cut_rollouts(tmp_path, 0)
    for step in (1, 2, 3, 10):
        write_rollouts(tmp_path, step, [])
    cut_rollouts(tmp_path, 2)
    assert stored_steps(tmp_path) == [1, 2]


def test_groups_of_another_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"step 2 hold groups of steps \[3\]"):
        write_rollouts(tmp_path, 2, [group(2, 0), group(3, 1)])
    assert not rollout_file(tmp_path, 2).exists()


def test_nothing_stored(tmp_path):
    assert read_rollouts(tmp_path).num_rows == 0
    assert read_rollouts(tmp_path).schema == SCHEMA
    with pytest.raises(FileNotFoundError):
        read_rollouts(tmp_path, 1)
    write_rollouts(tmp_path, 1, [])  # a step whose prompts were all dropped
    assert read_rollouts(tmp_path, 1).num_rows == 0


def test_a_cut_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    write_rollouts(tmp_path, 1, [group(1, 0)])

    def die(table, where, **options):
        where.write_bytes(b"PAR1 half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", die)
    with pytest.raises(OSError, match="disk full"):
        write_rollouts(tmp_path, 1, [group(1, 1)])
    assert set(read_rollouts(tmp_path, 1)["slot"].to_pylist()) == {0}
