"""Leases, model directories, sinks and scripted workers: the stream's parts without models, for tests and faults."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from core.schema import Completion, CompletionKey, Sampling, Source, pack_logprobs, pack_tokens
from core.seeds import completion_seed
from rollout.fingerprint import fingerprints
from rollout.frame import session_of
from rollout.messages import (
    Deliver,
    FromTrainer,
    FromWorker,
    Heartbeat,
    Hello,
    Join,
    Lease,
    LeaseItem,
    Leave,
    Load,
    Welcome,
)
from rollout.wire import Link

T = TypeVar("T")

HANG_GUARD_S = 60.0
ENGINE = ("--engine", "bench.faults.engine:make")
SAMPLING = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(1,))


def make_lease(
    number: int = 0, *, step: int = 1, slots: int = 4, samples: int = 4, source: Source = Source.EXPLORER,
    purpose: Literal["train", "eval"] = "train", version: int = 0, first_slot: int | None = None,
) -> Lease:  # fmt: skip
    """Lease `number` of a step: its own slots, all samples of each."""
    first = number * slots if first_slot is None else first_slot
    items = []
    for slot in range(first, first + slots):
        keys = [CompletionKey(source=source, step=step, slot=slot, sample=sample) for sample in range(samples)]
        seeds = tuple(completion_seed(0, purpose, key) for key in keys)
        items.append(LeaseItem(
            slot=slot, prompt_uid=f"p{slot}", prompt_bytes=pack_tokens((5, 6, 7)), samples=tuple(range(samples)),
            seeds=seeds,
        ))  # fmt: skip
    return Lease(
        lease_id=f"{purpose}-{source}-{step}-{number}", purpose=purpose, source=source, step=step, version=version,
        sampling=SAMPLING, items=tuple(items),
    )  # fmt: skip


def make_model(directory: Path, content: bytes = b"weights", vocabulary: str = "a") -> Path:
    """A directory that has fingerprints."""
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {vocabulary: 0}}}))
    return directory


class Sink:
    """Takes completions on the pool's thread and counts each key."""

    def __init__(self) -> None:
        self.keys: Counter[tuple[str, CompletionKey]] = Counter()
        self.completions: list[Completion] = []
        self._changed = threading.Condition()

    def __call__(self, purpose: str, completion: Completion) -> None:
        with self._changed:
            self.keys[purpose, completion.key] += 1
            self.completions.append(completion)
            self._changed.notify_all()

    def wait(self, count: int, check: Callable[[], None] = lambda: None) -> None:
        """Until `count` completions are here; `check` raises where that is in vain."""
        deadline = time.monotonic() + HANG_GUARD_S
        while len(self.completions) < count:
            assert time.monotonic() < deadline, f"{len(self.completions)} of {count} completions"
            with self._changed:
                self._changed.wait(0.1)
            check()  # it asks the pool's thread, which must not wait for this lock


def eventually(true: Callable[[], object], what: str = "") -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + HANG_GUARD_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def make_completion(
    lease: Lease, slot: int, sample: int, *, worker: str = "w", tokens: int = 3, **changes: Any
) -> Completion:
    """A valid answer to one sample of a lease, but for `changes`."""
    fields: dict[str, Any] = {
        "key": CompletionKey(source=lease.source, step=lease.step, slot=slot, sample=sample),
        "prompt_uid": f"p{slot}",
        "token_bytes": pack_tokens([7] * tokens),
        "logprob_bytes": pack_logprobs([-0.5] * tokens),
        "finish": "stop",
        "version": lease.version,
        "worker": worker,
        "started_s": 1.0,
        "finished_s": 2.0,
    }
    return Completion(**{**fields, **changes})


class ScriptedWorker:
    """A worker that says exactly what a test tells it to."""

    def __init__(self, endpoint: str, name: str = "scripted.1", *, role: Source = Source.EXPLORER) -> None:
        self.name, self.role = name, role
        self.link = Link(endpoint, name=name)
        self.heard: list[FromTrainer] = []
        self.beat = 0

    def hear(self, kind: type[T], count: int = 1) -> T:
        """Wait for `count` messages of a kind since the last call; return the last and forget all."""
        deadline = time.monotonic() + HANG_GUARD_S
        while sum(isinstance(message, kind) for message in self.heard) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__}: {self.heard}"
            self.heard += self.link.poll(0.05)
        found = [message for message in self.heard if isinstance(message, kind)][-1]
        self.heard.clear()
        return found

    def say(self, *messages: FromWorker) -> None:
        eventually(lambda: self.link.send(messages), "not connected")

    def join(self) -> Welcome:
        self.say(Join(worker=self.name, role=self.role, pid=1, host="nowhere"))
        welcome = self.hear(Welcome)
        self.link.session = session_of(welcome.run_id, welcome.incarnation)
        return welcome

    def enter(self, model: Path, *, vocab_size: int = 100) -> None:
        """Join and be accepted."""
        self.join()
        marks = fingerprints(model, weights=self.role == Source.EXPLORER)
        self.say(Hello(fingerprints=marks, vocab_size=vocab_size), self.heartbeat())

    def heartbeat(
        self, *, produced: int = 0, unacknowledged: int = 0, leases: tuple[str, ...] = (), loads: tuple[Load, ...] = ()
    ) -> Heartbeat:
        self.beat += 1
        return Heartbeat(
            beat=self.beat, progress=self.beat, doing="as told", produced=produced, unacknowledged=unacknowledged,
            leases=leases, version=0, loads=loads,
        )  # fmt: skip

    def deliver(self, seq: int, lease: Lease, slot: int, sample: int, **changes: Any) -> Deliver:
        completion = make_completion(lease, slot, sample, **{"worker": self.name, **changes})
        return Deliver(seq=seq, lease_id=lease.lease_id, purpose=lease.purpose, completion=completion)

    def close(self) -> None:
        self.link.send([Leave(reason="the test is over")])
        self.link.close(linger_s=0.2)
