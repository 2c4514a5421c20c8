"""What a checkpoint keeps of the stream is of one moment."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.buffer import BufferState, ReplayBuffer
from rollout.ledger import Ledger
from trainer.stream import Rollouts


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


def stream() -> Rollouts:
    """Without sockets and processes."""
    rollouts = Rollouts.__new__(Rollouts)
    rollouts.ledger, rollouts.pool, rollouts.mixer = Ledger(), CountingPool(), NoMixer()
    rollouts.buffer = ReplayBuffer(rollouts.ledger, max_bytes=1000)
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

    def write_weights(self, file: Path) -> str:
        file.write_text(f"weights {self.step}")
        return "digest"


def test_published_weights_stay_whatever_a_killed_start_left_behind(tmp_path: Path) -> None:
    """Continued from step 3 by a run that had come to step 5: its own file is the one that workers read."""
    publisher = stream()
    publisher.path = tmp_path
    publisher.pool.publish_weights = lambda version, file, sha256: published.append((version, file))
    published: list[tuple[int, Path]] = []
    (tmp_path / "weights").mkdir()
    for version in (4, 5):
        (tmp_path / "weights" / f"version_{version:06d}.safetensors").write_text("old")
    for step in (3, 4, 5, 6):
        publisher.publish(WritingLearner(step))
        version, file = published[-1]
        assert (version, file.read_text()) == (step, f"weights {step}")
        assert len(list((tmp_path / "weights").iterdir())) <= 2
