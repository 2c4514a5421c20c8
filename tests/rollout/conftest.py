"""A pool with real worker processes around an engine without torch."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.config import Config, Explorer, Run, Stream
from core.schema import Completion, CompletionKey, Sampling, Source, pack_tokens
from core.seeds import completion_seed
from rollout.fingerprint import fingerprints
from rollout.messages import Lease, LeaseItem
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms

HANG_GUARD_S = 60.0
ENGINE = ("--engine", "quick_engine:make")
SAMPLING = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(1,))


def make_lease(
    number: int = 0, *, step: int = 1, slots: int = 4, samples: int = 4, source: Source = Source.EXPLORER,
    purpose: str = "train", version: int = 0, first_slot: int | None = None,
) -> Lease:  # fmt: skip
    """Lease `number` of a step: its own slots, all samples of each."""
    first = number * slots if first_slot is None else first_slot
    items = []
    for slot in range(first, first + slots):
        keys = [CompletionKey(source=source, step=step, slot=slot, sample=sample) for sample in range(samples)]
        seeds = tuple(completion_seed(0, purpose, key) for key in keys)
        items.append(LeaseItem(
            slot=slot, prompt_uid=f"p{slot}", prompt_bytes=pack_tokens((5, 6, 7)), samples=tuple(range(samples)), seeds=seeds
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
        with self._changed:
            while len(self.completions) < count:
                assert time.monotonic() < deadline, f"{len(self.completions)} of {count} completions"
                self._changed.wait(0.1)
                check()


def eventually(true: Callable[[], object], what: str = "") -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + HANG_GUARD_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    stream = Stream(heartbeat_s=0.1, liveness_s=1.0, lease_timeout_s=2.0, starvation_s=20.0, credit=64, max_frame_mb=1)
    return Config(run=Run(dir=str(tmp_path / "run")), stream=stream, explorer=Explorer())


@pytest.fixture()
def sink() -> Sink:
    return Sink()


PoolMaker = Callable[..., WorkerPool]


@pytest.fixture()
def make_pool(config: Config, model: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolMaker]:
    """Makes pools, which are closed at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pools: list[WorkerPool] = []

    def make(pool_config: Config = config, **settings: object) -> WorkerPool:
        terms = {
            source: RoleTerms(model, fingerprints(model, weights=source == Source.EXPLORER), 100) for source in Source
        }
        defaults = {"run_id": "r", "incarnation": 1, "terms": terms, "on_completion": sink, "worker_arguments": ENGINE}
        pools.append(WorkerPool(pool_config, **(defaults | settings)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close("the test is over")
