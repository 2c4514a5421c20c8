"""Recorded explorer completions: identity, reading, and which part of a lease is missing."""

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.config import Algorithm, Config, Explorer, Rollout
from core.configcheck import check_paths
from core.configkeys import ConfigError
from core.prompts import PromptSchedule
from core.schema import Completion, CompletionKey, Prompt, Sampling, Source, pack_logprobs, pack_tokens
from rollout.completion_store import CompletionStore, Identity, Recorded
from rollout.demand import Demand
from rollout.record import main as record
from rollout.reuse import Reuse

SAMPLING = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(1,))
IDENTITY = Identity(model="a" * 64, tokenizer="b" * 64, template="plain", suffix="", sampling=SAMPLING)


def no(_: object) -> bool:
    return False


def row(uid: str, number: int, length: int = 3) -> Recorded:
    return Recorded(
        uid, number, np.arange(length, dtype=np.int32), np.linspace(-1, 0, length, dtype=np.float32), "stop"
    )


def write_dataset(file: Path) -> None:
    pq.write_table(pa.table({"messages": ["1 + 1"], "answer": ["2"]}), file)


def demand(*, seed: int = 0, group: int = 4, store: str = "s") -> Demand:
    config = Config(
        algorithm=Algorithm(steps=4, group_size=group, anneal_steps=4, prompts_per_step=4),
        explorer=Explorer(store=store),
        rollout=Rollout(lease_prompts=2),
    )
    prompts = [Prompt(uid=f"p{i}", token_ids=(5, i), text=str(i), answer="1") for i in range(8)]
    return Demand(config, PromptSchedule(prompts, seed=seed, per_step=4), (1,))


def answer(lease, item, sample) -> Completion:
    return Completion(
        key=CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample),
        prompt_uid=item.prompt_uid, token_bytes=pack_tokens([7, 1]), logprob_bytes=pack_logprobs([-0.5, -0.25]),
        finish="stop", version=0, worker="explorer-0", started_s=1.0, finished_s=2.0,
    )  # fmt: skip


def test_what_was_added_is_read_by_the_next_to_open_it(tmp_path: Path) -> None:
    store = CompletionStore(tmp_path / "s", IDENTITY)
    assert len(store) == 0
    path = store.add([row("p1", 0), row("p1", 1, length=5), row("p2", 0)])
    assert store.add([row("p1", 0), row("p1", 1, length=5), row("p2", 0)]) == path  # the same completions, one file
    again = CompletionStore(tmp_path / "s", IDENTITY)
    assert ("p1", 1) in again
    assert ("p2", 1) not in again
    found = again.read("p1", 1)
    assert (found.tokens.dtype, found.logprobs.dtype, found.finish) == (np.int32, np.float32, "stop")
    np.testing.assert_array_equal(found.tokens, row("p1", 1, length=5).tokens)
    np.testing.assert_array_equal(found.logprobs, row("p1", 1, length=5).logprobs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "c" * 64}, "its model is 'aaaa"),
        ({"tokenizer": "c" * 64}, "its tokenizer is"),
        ({"template": "chat"}, "its template is 'plain', this run's is 'chat'"),
        ({"suffix": " /no_think"}, "this run's is ' /no_think'"),
        ({"sampling": msgspec.structs.replace(SAMPLING, temperature=0.7)}, "temperature=0.7"),
    ],
)
def test_another_identity_is_refused_with_what_differs(tmp_path: Path, change: dict[str, object], said: str) -> None:
    CompletionStore(tmp_path, IDENTITY).add([row("p1", 0)])
    with pytest.raises(ValueError, match="would not make") as refusal:
        CompletionStore(tmp_path, msgspec.structs.replace(IDENTITY, **change))
    assert said in str(refusal.value)
    assert len(CompletionStore(tmp_path, IDENTITY)) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = CompletionStore(tmp_path, IDENTITY).add([row("p1", 0)])
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read .*delete it: it is made again"):
        CompletionStore(tmp_path, IDENTITY)


def test_nobody_is_told_to_delete_a_file_that_the_store_did_not_write(tmp_path: Path) -> None:
    CompletionStore(tmp_path, IDENTITY)
    write_dataset(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet is no file that a store writes: move it") as refusal:
        CompletionStore(tmp_path, IDENTITY)
    assert "delete it" not in str(refusal.value)


def test_a_folder_of_other_files_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    write_dataset(tmp_path / "badmsg.parquet")
    with pytest.raises(ValueError, match=r"holds other files \(badmsg\.parquet\) and no store\.json: choose another"):
        CompletionStore(tmp_path, IDENTITY)
    assert [file.name for file in tmp_path.iterdir()] == ["badmsg.parquet"]
    with pytest.raises(ValueError, match="is a file: name a folder"):
        CompletionStore(tmp_path / "badmsg.parquet", IDENTITY)


def test_a_run_with_a_folder_of_other_files_as_its_store_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name in "abcd":
        write_dataset(tmp_path / f"{name}.parquet")
    config = Config(explorer=Explorer(store=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"explorer\.store: .*\(a\.parquet, b\.parquet, c\.parquet, …\)"):
        check_paths(config)
    check_paths(msgspec.structs.replace(config, algorithm=Algorithm(anneal_steps=0)))  # plain GRPO opens no store


def test_a_folder_is_a_store_while_another_process_claims_it_and_after(tmp_path: Path) -> None:
    (tmp_path / ".store.json.4711").write_text("{")
    CompletionStore(tmp_path, IDENTITY).add([row("p1", 0)])
    check_paths(Config(explorer=Explorer(store=str(tmp_path))))
    (tmp_path / "store.json").unlink()  # whose completions they are is not known any more
    with pytest.raises(ValueError, match=r"no store\.json"):
        CompletionStore(tmp_path, IDENTITY)


def test_recording_into_a_folder_of_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "badmsg.parquet")
    assert record(["--record", str(tmp_path)]) == 2
    assert "holds other files (badmsg.parquet)" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["badmsg.parquet"]


def test_a_completion_is_named_by_prompt_and_number_whatever_the_seed_of_the_run() -> None:
    def seeds(asked: Demand) -> dict[tuple[str, int], int]:
        return {
            (item.prompt_uid, asked.number(CompletionKey(source=lease.source, step=step, slot=item.slot, sample=s))): n
            for step in (1, 2, 3, 4)
            for lease in asked.leases(Source.EXPLORER, step)
            for item in lease.items
            for s, n in zip(item.samples, item.seeds)
        }

    one, other = seeds(demand(seed=0)), seeds(demand(seed=1))
    assert len(one) == 4 * (4 + 3 + 2)  # no name twice: the second visit of a prompt counts on
    assert len(set(one.values())) == len(one)
    assert one.keys() & other.keys()
    assert all(one[name] == other[name] for name in one.keys() & other.keys())
    assert not set(one.values()) & set(seeds(demand(store="")).values())


def test_only_what_is_missing_is_asked_for_and_whole_leases_are_recorded(tmp_path: Path) -> None:
    asked = demand()
    lease = next(asked.leases(Source.EXPLORER, 1))
    reuse = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: None)
    assert reuse.missing([lease]) == [lease]
    pairs = [(item, sample) for item in lease.items for sample in item.samples]
    for item, sample in pairs[:-1]:
        reuse.record(answer(lease, item, sample))
    reuse.close()
    assert len(CompletionStore(tmp_path, IDENTITY)) == 0
    reuse = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: None)
    reuse.missing([lease])
    for item, sample in pairs:
        reuse.record(answer(lease, item, sample))
    reuse.close()
    assert reuse.metrics() == {"store/reused": 0.0, "store/generated": 8.0}

    wider = demand(group=6)  # wants two more of each prompt
    misses: list[int] = []
    reuse = Reuse(CompletionStore(tmp_path, IDENTITY), wider, on_missing=lambda: misses.append(1))
    (short,) = reuse.missing([next(wider.leases(Source.EXPLORER, 1))])
    assert [item.samples for item in short.items] == [(4, 5), (4, 5)]
    assert misses == [1]
    found = reuse.due(1, no, no)
    assert [completion.key.sample for completion in found] == [0, 1, 2, 3] * 2
    assert found[0].tokens.tolist() == [7, 1]
    assert not reuse.complete([1])


def test_what_a_checkpoint_brought_back_is_not_read_and_counts_go_on(tmp_path: Path) -> None:
    asked = demand()
    lease = next(asked.leases(Source.EXPLORER, 1))
    first = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: None)
    first.missing([lease])
    for item in lease.items:
        for sample in item.samples:
            first.record(answer(lease, item, sample))
    first.close()
    again = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: pytest.fail("all is on record"))
    again.resume(70, 9)
    assert again.missing([lease]) == []
    found = again.due(1, no, lambda key: key.slot == lease.items[0].slot and key.sample < 3)
    assert len(found) == 8 - 3
    assert again.metrics() == {"store/reused": 75.0, "store/generated": 9.0}


def test_later_steps_are_read_only_while_there_is_room(tmp_path: Path) -> None:
    asked = demand()
    reuse = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: None)
    leases = [lease for step in (1, 2) for lease in asked.leases(Source.EXPLORER, step)]
    for lease in reuse.missing(leases):
        for item in lease.items:
            for sample in item.samples:
                reuse.record(answer(lease, item, sample))
    reuse.close()
    reuse = Reuse(CompletionStore(tmp_path, IDENTITY), asked, on_missing=lambda: pytest.fail("all is on record"))
    assert reuse.missing(list(reversed(leases))) == []
    assert {completion.key.step for completion in reuse.due(1, no, no)} == {1}
    limit = 5 * 8 * 24  # of the sampling's longest
    assert len(reuse.due(1, lambda size: size <= limit, no)) == 5
    assert len(reuse.due(2, no, no)) == 7
    assert reuse.reused == 16 + 12
