"""A pool with real worker processes around an engine without torch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.faults.parts import ENGINE, Sink, make_model
from core.config import Config, Explorer, Run, Stream
from core.schema import Source
from rollout.fingerprint import fingerprints
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    stream = Stream(heartbeat_s=0.1, liveness_s=2.0, lease_timeout_s=2.0, starvation_s=20.0, credit=64, max_frame_mb=1)
    return Config(run=Run(dir=str(tmp_path / "run")), stream=stream, explorer=Explorer())


@pytest.fixture
def sink() -> Sink:
    return Sink()


PoolMaker = Callable[..., WorkerPool]


@pytest.fixture
def make_pool(config: Config, model: Path, sink: Sink) -> Iterator[PoolMaker]:
    """Makes pools, which are closed at the end."""
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
