"""The stream of groups: parts of steps, signals, and what a checkpoint keeps of one moment."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from core.config import Config
from core.prompts import PromptSchedule
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from rollout.buffer import BufferState, ReplayBuffer
from rollout.demand import Demand
from rollout.fingerprint import file_digest
from rollout.ledger import Ledger
from trainer.published import PublishedWeights
from trainer.signals import SIGNALS, Stopped
from trainer.stream import GroupStream, Rollouts
from trainer.world import World


def completion(sample: int) -> Completion:
    return Completion(
        key=CompletionKey(source=Source.EXPLORER, step=1, slot=0, sample=sample), prompt_uid="p",
        token_bytes=pack_tokens([5]), logprob_bytes=pack_logprobs([-1.0]), finish="stop", version=0, worker="w",
        started_s=0.0, finished_s=1.0,
    )  # fmt: skip


class CountingPool:
    """Of one explorer that produced `produced` completions, all received."""

    def __init__(self) -> None:
        self.produced = 0

    def quiet(self, look: Callable[[dict[str, Any]], Any]) -> Any:
        counts = {"accepted": {}, "rejected": {}, "in_flight": 0, "lost": 0}
        return look({Source.EXPLORER: {"produced": self.produced, **counts}, Source.LEARNER: {"produced": 0, **counts}})


class NoMixer:
    def resume(self, step: int) -> None:
        self.resumed = step


class Parts:
    """Rank 0's machinery, with groups that are there already. `asks`: a signal arrives while part n is awaited."""

    def __init__(self, slots: int, asks: int | None = None) -> None:
        self.slots, self.asks, self.calls = slots, asks, 0

    def collect(self, step: int, first: int, prompts: int | None) -> tuple[tuple[Group, ...], bool]:
        if self.calls == self.asks:
            SIGNALS.asked = signal.SIGTERM
        self.calls += 1
        stop = self.slots if prompts is None else min(first + prompts, self.slots)
        prompt = Prompt(uid="p", token_ids=(1,), text="", answer="")
        rows = (ScoredCompletion(completion=completion(0), reward=1.0, text=""),)
        groups = [
            Group(prompt=prompt, step=step, slot=slot, rows=rows, advantages=(0.0,)) for slot in range(first, stop)
        ]
        return tuple(groups), stop == self.slots


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(SIGNALS, "asked", 0)
    return World(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("slots", "prompts", "parts"),
    [(5, 2, [[0, 1], [2, 3], [4]]), (4, 2, [[0, 1], [2, 3]]), (3, None, [[0, 1, 2]]), (1, 2, [[0]])],
)
def test_a_step_comes_in_parts_and_ends(alone: World, slots: int, prompts: int | None, parts: list[list[int]]) -> None:
    source = Parts(slots)
    groups = GroupStream(alone, source)
    assert not groups.within_step
    found = []
    for part in groups.parts(1, prompts):
        assert groups.within_step
        found.append([group.slot for group in part])
    assert found == parts
    assert source.calls == len(parts)  # none asks for what comes after the last
    assert not groups.within_step


def test_a_signal_within_a_step_lets_it_end_and_stops_before_the_next(alone: World) -> None:
    groups = GroupStream(alone, Parts(4, asks=1))
    assert len(list(groups.parts(1, 2))) == 2
    with pytest.raises(Stopped) as stopped:
        list(groups.parts(2, 2))
    assert stopped.value.between_steps
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def stream() -> Rollouts:
    """Without sockets and processes."""
    rollouts = Rollouts.__new__(Rollouts)
    prompt = Prompt(uid="p", token_ids=(5,), text="p", answer="")
    rollouts.ledger, rollouts.pool, rollouts.mixer = Ledger(), CountingPool(), NoMixer()
    rollouts.buffer = ReplayBuffer(rollouts.ledger, max_bytes=1000)
    rollouts.demand = Demand(Config(), PromptSchedule([prompt], seed=0, per_step=1), ())
    return rollouts


@pytest.mark.parametrize("event", ["arrives", "fails"])
def test_a_checkpoint_taken_while_completions_come_and_go_still_adds_up(
    tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = stream()
    for sample in (0, 1):
        saved.buffer.insert(completion(sample))
        saved.pool.produced += 1
    state = saved.buffer.state
    others: list[threading.Thread] = []

    def happen() -> None:
        if event == "fails":
            saved.buffer.fail_reward(completion(1).key, "reward_raised")
        else:
            saved.buffer.insert(completion(2))

    def state_while_it_happens() -> BufferState:
        taken = state()
        others.append(threading.Thread(target=happen))
        others[0].start()
        others[0].join(0.3)  # long enough to get through where nothing holds it back
        return taken

    monkeypatch.setattr(saved.buffer, "state", state_while_it_happens)
    saved.save(tmp_path)
    others[0].join()

    resumed = stream()
    resumed.restore(tmp_path, 0)
    assert resumed.mixer.resumed == 0
    assert sum(resumed.buffer.resident().values()) == 2
    report = resumed.report()
    assert report["conserved"]
    assert report["explorer"]["inserted"] == 2
    assert report["explorer"]["dropped"] == {}


class WritingLearner:
    def __init__(self, step: int) -> None:
        self.step = step

    def write_weights(self, stream: BinaryIO) -> None:
        stream.write(f"weights {self.step}".encode())


@pytest.mark.parametrize("in_memory", [True, False])
def test_published_weights_stay_whatever_a_killed_start_left_behind(tmp_path: Path, in_memory: bool) -> None:
    """Continued from step 3 by a run that had come to step 5: its own version is the one that workers read."""
    published: list[tuple[int, Path, str]] = []
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("version_000004.safetensors", "version_000005.safetensors", ".version_000006.safetensors.7"):
        (folder / name).write_text("old")
    publisher = stream()
    publisher.weights = PublishedWeights(folder, in_memory=in_memory)
    publisher.pool.publish_weights = lambda *told, shared: published.append(told)
    for step in (3, 4, 5, 6):
        publisher.publish(WritingLearner(step))
        version, file, digest = published[-1]
        assert (version, file.read_text(), file_digest(file)) == (step, f"weights {step}", digest)
        if step > 3:
            assert published[-2][1].read_text() == f"weights {step - 1}"
        assert len(list(folder.iterdir())) == (0 if in_memory else min(2, step - 2))
    publisher.weights.close()
    assert not any(file.exists() for _, file, _ in published)
