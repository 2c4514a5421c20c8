"""The mixer with a pool that answers as told: exact quotas, replacements, dropped prompts, resume, starvation."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.faults.parts import eventually
from core.config import Algorithm, Config, Evaluation, Explorer, Reward, Rollout, Run, Stream
from core.prompts import PromptSchedule
from core.schema import Completion, CompletionKey, Group, Prompt, Source, pack_logprobs, pack_tokens
from rollout.buffer import BufferState, ReplayBuffer
from rollout.demand import Demand
from rollout.ledger import Ledger
from rollout.messages import Lease
from rollout.mixer import Mixer, NothingToTrain
from rollout.patience import Starved
from rollout.status import Waiting

SOURCES = list(Source)


class TellingPool:
    """Keeps leases until `answer`; completions name their source and sample."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.receive: Callable[[str, Completion], None]
        self.trouble: Exception | None = None
        self.produced = dict.fromkeys(Source, 0)
        self.moved_s: Callable[[], float] = lambda: -math.inf

    def submit(self, leases: Sequence[Lease]) -> None:
        self.leases += leases

    def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def waiting_for(self) -> Waiting:
        return Waiting("explorer: lease explorer-1-0 at explorer-0.4f since 12 s", self.moved_s())

    def answer(self, *, shuffled: int | None = None) -> None:
        """Everything asked for so far."""
        rows = [(lease.purpose, row) for lease in self.leases for row in completions_of(lease)]
        self.leases.clear()
        if shuffled is not None:
            rows = [rows[index] for index in np.random.default_rng(shuffled).permutation(len(rows))]
        for purpose, row in rows:
            self.produced[row.key.source] += 1
            self.receive(purpose, row)


def completions_of(lease: Lease) -> Iterator[Completion]:
    for item in lease.items:
        for sample in item.samples:
            key = CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample)
            yield Completion(
                key=key,
                prompt_uid=item.prompt_uid,
                token_bytes=pack_tokens([SOURCES.index(key.source), sample]),
                logprob_bytes=pack_logprobs([-1.0, -1.0]),
                finish="stop",
                version=lease.version,
                worker="w.1",
                started_s=0.0,
                finished_s=1.0,
            )


def decode(token_ids: Sequence[int]) -> str:
    return f"{SOURCES[token_ids[0]].value} {token_ids[1]}"


class World:
    """A mixer, what stands around it, and the prompts' wishes: uid to the completions that cannot be scored."""

    def __init__(
        self, fail: Mapping[str, str], reward_log: Path, *, max_tries: int = 3, starvation_s: float = 60.0,
        unfit: Sequence[str] = (),
    ) -> None:  # fmt: skip
        prompts = [
            Prompt(uid=f"u{i}", token_ids=(i,), text=f"p{i}", answer="1", columns={"fail": fail.get(f"u{i}", "")})
            for i in range(4)
        ]
        self.config = Config(
            run=Run(dir="unused"),
            algorithm=Algorithm(group_size=4, steps=5, anneal_steps=4, prompts_per_step=4, mini_batch_prompts=4),
            rollout=Rollout(lease_prompts=2),
            explorer=Explorer(ahead_steps=2),
            stream=Stream(starvation_s=starvation_s),
            reward=Reward(function="mixer_rewards:by_name", max_tries=max_tries),
            evaluation=Evaluation(samples=3, k=(1,)),
        )
        self.demand = Demand(self.config, PromptSchedule(prompts, seed=0, per_step=4), (1,))
        self.pool, self.ledger = TellingPool(), Ledger()
        self.buffer = ReplayBuffer(self.ledger, max_bytes=1 << 20)
        self.waits: list[str] = []
        self.said: list[str] = []
        self.reward_log = reward_log
        self.mixer = Mixer(
            self.config, self.demand, self.pool, self.buffer, self.ledger, decode=decode,
            on_wait=lambda what, seconds: self.waits.append(what), on_event=self.said.append, reward_log=reward_log,
            why_unfit=lambda row: "unknown_token" if decode(row.tokens.tolist()) in unfit else None,
        )  # fmt: skip
        self.pool.receive = self.mixer.receive

    def collect(self, step: int, **part: int) -> tuple[Group, ...]:
        """Answer whatever is asked for until the step, or a part of it, is complete."""
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                self.pool.answer()
                time.sleep(0.005)

        server = threading.Thread(target=serve)
        server.start()
        try:
            return self.mixer.collect(step, **part)
        finally:
            done.set()
            server.join()

    def report(self) -> dict:
        pool = {
            source: {"produced": count, "accepted": {}, "rejected": {}, "in_flight": 0, "lost": 0}
            for source, count in self.pool.produced.items()
        }
        with self.buffer.still():
            return self.ledger.report(pool, self.buffer.resident())


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., World]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    worlds: list[World] = []

    def make(fail: Mapping[str, str] | None = None, **settings: object) -> World:
        worlds.append(World(fail or {}, tmp_path / "logs" / "reward.log", **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.mixer.close()


def names(group: Group) -> list[str]:
    return [f"{row.completion.key.source.value}:{row.completion.key.sample}" for row in group.rows]


def slot_of(world: World, step: int, uid: str) -> int:
    return [prompt.uid for prompt in world.demand.prompts_at(step)].index(uid)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_groups_are_exact_and_the_same_in_any_order_of_arrival(make_world: Callable[..., World], order: int) -> None:
    world = make_world()
    for step, (explorer, learner) in enumerate([(4, 0), (3, 1), (2, 2), (0, 4)], start=1):
        world.mixer.request(step)
        world.pool.answer(shuffled=order)
        groups = world.mixer.collect(step)
        assert [group.slot for group in groups] == [0, 1, 2, 3]
        expected = [f"explorer:{i}" for i in range(explorer)] + [f"learner:{i}" for i in range(learner)]
        assert [names(group) for group in groups] == [expected] * 4
        assert [row.reward for row in groups[0].rows] == [float(int(name[-1]) % 2) for name in expected]
        assert [row.text for row in groups[0].rows] == [name.replace(":", " ") for name in expected]
    assert world.report()["conserved"]


def test_the_explorer_is_asked_ahead_and_nothing_twice(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.mixer.request(1)
    assert [lease.lease_id for lease in world.pool.leases] == [
        "explorer-1-0", "explorer-1-1", "explorer-2-0", "explorer-2-1",
    ]  # fmt: skip
    assert world.mixer.wanted_step == 1
    world.pool.leases.clear()
    world.mixer.request(1)
    assert world.pool.leases == []
    world.mixer.request(2)
    assert {(lease.source.value, lease.step) for lease in world.pool.leases} == {("explorer", 3), ("learner", 2)}
    world.mixer.request(5)
    asked = {(lease.source.value, lease.step) for lease in world.pool.leases}
    assert asked == {("explorer", 3), ("learner", 2), ("learner", 3), ("learner", 4), ("learner", 5)}


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_failed_rewards_are_replaced_by_the_next_samples_of_the_same_source(
    make_world: Callable[..., World], order: int
) -> None:
    """Whichever fails first: the samples asked for depend on how many failed, not on which."""
    world = make_world({"u2": "explorer:0 explorer:2 learner:0 learner:1"})
    world.mixer.request(1)
    world.pool.answer()
    world.collect(1)
    world.mixer.request(2)
    world.pool.leases = [lease for lease in world.pool.leases if lease.step == 2]
    world.pool.answer(shuffled=order)
    slot = slot_of(world, 2, "u2")
    groups = world.collect(2)
    assert names(groups[slot]) == ["explorer:1", "explorer:3", "explorer:4", "learner:2"]
    assert all(names(group) == ["explorer:0", "explorer:1", "explorer:2", "learner:0"]
               for group in groups if group.slot != slot)  # fmt: skip
    report = world.report()
    assert report["conserved"]
    assert report["learner"]["dropped"] == {"reward_raised": 2}
    assert report["learner"]["replaced"] == 2


def test_completions_that_cannot_train_are_never_scored_and_replaced_as_failed_rewards_are(
    make_world: Callable[..., World],
) -> None:
    world = make_world({"u2": "explorer:3"}, unfit=("explorer 1", "learner 0"))
    for step in (1, 2):
        world.mixer.request(step)
        groups = world.collect(step)
    slot = slot_of(world, 2, "u2")
    assert names(groups[slot]) == ["explorer:0", "explorer:2", "explorer:4", "learner:1"]
    assert all(names(group) == ["explorer:0", "explorer:2", "explorer:3", "learner:1"]
               for group in groups if group.slot != slot)  # fmt: skip
    report = world.report()
    assert report["conserved"]
    assert report["learner"]["dropped"] == {"unknown_token": 4}
    assert report["learner"]["replaced"] == 4
    assert report["explorer"]["dropped"]["unknown_token"] >= 8


def test_a_prompt_is_dropped_whole_when_its_tries_are_used_up(make_world: Callable[..., World]) -> None:
    fails = " ".join(f"explorer:{sample}" for sample in range(9))
    world = make_world({"u1": fails}, max_tries=2)
    world.mixer.request(1)
    groups = world.collect(1)
    slot = slot_of(world, 1, "u1")
    assert sorted({0, 1, 2, 3} - {group.slot for group in groups}) == [slot]
    assert {tuple(names(group)) for group in groups} == {tuple(f"explorer:{i}" for i in range(4))}
    report = world.report()
    assert report["conserved"]
    dropped = report["explorer"]["dropped"]
    assert dropped["reward_raised"] >= 3
    assert report["explorer"]["trained"] == 12


def test_a_partly_scored_prompt_leaves_nothing_behind_when_it_is_dropped(make_world: Callable[..., World]) -> None:
    world = make_world({"u1": "explorer:0"}, max_tries=0)
    world.mixer.request(1)
    groups = world.collect(1)
    assert len(groups) == 3
    report = world.report()
    assert report["conserved"]
    assert 1 <= report["explorer"]["dropped"]["reward_raised"] <= 2  # of step 2, which was asked for ahead, too
    assert report["explorer"]["dropped"]["prompt_dropped"] >= 1
    assert report["explorer"]["replaced"] == 0


def test_what_arrives_for_a_dropped_prompt_never_fills_another_prompt_s_place(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.mixer.request(1)
    rows = [row for lease in world.pool.leases if lease.step == 1 for row in completions_of(lease)]
    world.buffer.drop_prompt(1, 2)
    for row in rows[:-1]:  # slot 3 lacks one
        world.mixer.receive("train", row)
    eventually(lambda: world.buffer.missing(1, world.buffer.window(1, range(4)), 4) == 1, "all are scored")
    assert {key.slot for key in world.buffer.scored(1)} == {0, 1, 3}
    world.mixer.receive("train", rows[-1])
    assert [group.slot for group in world.mixer.collect(1)] == [0, 1, 3]


def test_a_part_is_collected_before_the_rest_of_its_step_is_here(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.mixer.request(1)
    rows = [row for lease in world.pool.leases if lease.step == 1 for row in completions_of(lease)]
    for row in rows:
        if row.key.slot != 1:
            world.mixer.receive("train", row)
    world.buffer.drop_prompt(1, 1)
    assert [group.slot for group in world.mixer.collect(1, prompts=2)] == [0, 2]
    world.mixer.receive("train", next(row for row in rows if row.key.slot == 0))  # its lease was given twice
    assert world.report()["explorer"]["rejected"] == {"late": 1}
    assert [group.slot for group in world.mixer.collect(1, first=3, prompts=2)] == [3]
    assert not world.buffer.scored(1)
    world.mixer.receive("train", rows[0])
    assert world.report()["explorer"]["rejected"] == {"late": 2}


def test_the_parts_of_a_step_are_the_step(make_world: Callable[..., World]) -> None:
    fail = {"u0": "explorer:1 explorer:3", "u3": "learner:0"}
    whole, parts = make_world(fail), make_world(fail)
    for step in (1, 2):
        for world in (whole, parts):
            world.mixer.request(step)
        expected = whole.collect(step)
        groups = parts.collect(step, prompts=2)
        groups += parts.collect(step, first=2, prompts=2)
        assert parts.collect(step, first=4, prompts=2) == ()  # two were the last: nobody knew
        assert groups == expected
    assert parts.report() == whole.report()


def test_a_step_without_a_single_prompt_ends_the_run_by_name(make_world: Callable[..., World]) -> None:
    world = make_world({f"u{i}": "explorer:0" for i in range(4)}, max_tries=0)
    world.mixer.request(1)
    reason = (
        r'reward.function = "mixer_rewards:by_name" raised RuntimeError: as the prompt wants it .mixer_rewards.py:11.'
    )
    with pytest.raises(
        NothingToTrain, match=f"step 1: every prompt was dropped because its rewards failed: {reason}"
    ) as caught:
        world.collect(1)
    assert str(world.reward_log) in str(caught.value)
    [said] = world.said
    assert "raised RuntimeError: as the prompt wants it (mixer_rewards.py:11), first in step " in said
    assert world.reward_log.read_text().count("as the prompt wants it") == 1


def test_spare_completions_of_rescue_are_counted(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.config = world.mixer.config = Config(
        algorithm=Algorithm(
            group_size=4, steps=5, anneal_steps=4, prompts_per_step=4, mini_batch_prompts=4, mixing="rescue",
            rescue_quota=2,
        ),
        explorer=Explorer(ahead_steps=1),
    )  # fmt: skip
    world.demand.config = world.config
    world.mixer.request(1)
    groups = world.collect(1)
    assert {tuple(names(group)) for group in groups} == {tuple(f"learner:{i}" for i in range(4))}  # 1 and 3 are right
    report = world.report()
    assert report["explorer"]["dropped"] == {"spare": 8}
    assert world.ledger.totals()["fault/dropped"] == 0
    assert report["conserved"]


def test_resume_scores_again_asks_for_what_is_missing_and_gives_the_same_groups(
    make_world: Callable[..., World],
) -> None:
    fail = {"u0": "explorer:1 explorer:3", "u3": "learner:0"}
    whole = make_world(fail)
    for step in (1, 2):
        whole.mixer.request(step)
        expected = whole.collect(step)

    first = make_world(fail)
    first.mixer.request(1)
    first.collect(1)
    slot = slot_of(first, 2, "u0")
    arrived = [row for lease in first.demand.leases(Source.EXPLORER, 2) for row in completions_of(lease)]
    failed = [row.key for row in arrived if row.key.slot == slot and row.key.sample == 1]
    kept = [row for row in arrived if row.key not in failed and row.key.slot in (0, 1, slot)]

    again = make_world(fail)
    again.buffer.restore(BufferState(completions=kept, failed=failed), 1)
    again.mixer.resume(1)
    eventually(lambda: again.buffer.num_bytes and len(again.buffer.scored(2)) == len(kept), "scored again")
    assert [lease.lease_id for lease in again.pool.leases] == [f"explorer-2-slot{slot}-3"]
    again.mixer.request(2)
    explorer = [lease.lease_id for lease in again.pool.leases if (lease.source, lease.step) == (Source.EXPLORER, 2)]
    # Slots 0 and 1 are one lease; the other is asked for unless all of it is there.
    assert explorer == [f"explorer-2-slot{slot}-3", "explorer-2-1"]
    assert again.collect(2) == expected


def test_a_prompt_dropped_before_a_checkpoint_is_dropped_after_it(make_world: Callable[..., World]) -> None:
    world = make_world(max_tries=0)
    failed = [CompletionKey(source=Source.EXPLORER, step=1, slot=3, sample=1)]
    world.buffer.restore(BufferState(completions=[], failed=failed), 0)
    world.mixer.resume(0)
    world.mixer.request(1)
    assert [group.slot for group in world.collect(1)] == [0, 1, 2]


def test_starvation_names_whom_it_waited_for(make_world: Callable[..., World]) -> None:
    world = make_world(starvation_s=0.6)
    world.mixer.request(1)
    rows = [row for lease in world.pool.leases for row in completions_of(lease)]
    world.mixer.receive("train", rows[0])
    with pytest.raises(Starved) as caught:
        world.mixer.collect(1)
    message = str(caught.value)
    assert "stream.starvation_s" in message
    assert "15 completions of step 1: explorer: lease explorer-1-0 at explorer-0.4f since 12 s" in message
    assert world.waits
    assert all("of step 1" in wait for wait in world.waits)


def test_a_worker_that_moves_is_no_standstill(make_world: Callable[..., World]) -> None:
    world = make_world(starvation_s=0.6)
    world.mixer.request(1)
    start = time.monotonic()
    world.pool.moved_s = lambda: min(time.monotonic(), start + 1.5)  # then it hangs
    with pytest.raises(Starved):
        world.mixer.collect(1)
    assert time.monotonic() - start > 1.5 + 0.6


def test_rewards_that_are_still_being_computed_are_no_standstill(make_world: Callable[..., World]) -> None:
    world = make_world({f"u{i}": "slow" for i in range(4)}, starvation_s=0.6)
    world.mixer.request(1)
    rows = [row for lease in world.pool.leases for row in completions_of(lease)]
    ahead = [row for row in rows if row.key.step == 2]
    assert len(ahead) >= 8  # a second of rewards in which nothing of step 1 moves
    for row in ahead:
        world.mixer.receive("train", row)
    late = threading.Timer(1.0, lambda: [world.mixer.receive("train", row) for row in rows if row.key.step == 1])
    late.start()
    assert len(world.mixer.collect(1)) == 4
    late.join()
    assert any("completions wait for their reward" in wait for wait in world.waits)


def test_trouble_in_the_pool_ends_the_wait(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.mixer.request(1)
    world.pool.trouble = RuntimeError("no explorer worker is left")
    with pytest.raises(RuntimeError, match="no explorer worker is left"):
        world.mixer.collect(1)


def test_an_evaluation_whose_rewards_all_fail_says_why_and_ends_nothing(make_world: Callable[..., World]) -> None:
    world = make_world({"u1": "learner:0 learner:1 learner:2"})
    prompts = [prompt for prompt in world.demand.prompts_at(1) if prompt.uid == "u1"]
    submit = world.pool.submit

    def answering(leases: Sequence[Lease]) -> None:
        submit(leases)
        world.pool.answer()

    world.pool.submit = answering  # type: ignore[method-assign]
    assert world.mixer.evaluate(0, prompts) == [[]]
    [said] = world.said
    assert "RuntimeError: as the prompt wants it" in said
    assert "the evaluation after step 0" in said


def test_evaluation_leaves_out_failed_rewards_and_touches_no_account(make_world: Callable[..., World]) -> None:
    world = make_world({"u1": "learner:0 learner:2"})
    prompts = [prompt for prompt in world.demand.prompts_at(1) if prompt.uid in ("u1", "u3")]
    done = threading.Event()

    def serve() -> None:
        eventually(lambda: world.pool.leases, "leases of the evaluation")
        world.pool.answer(shuffled=1)
        done.set()

    server = threading.Thread(target=serve)
    server.start()
    rows = world.mixer.evaluate(0, prompts)
    server.join()
    found = {prompt.uid: [row.completion.key.sample for row in row] for prompt, row in zip(prompts, rows)}
    assert found == {"u1": [1], "u3": [0, 1, 2]}
    assert world.buffer.resident() == dict.fromkeys(Source, 0)
    assert world.ledger.totals() == {"fault/dropped": 0, "fault/rejected": 0, "fault/replaced": 0}
