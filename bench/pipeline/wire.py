"""How many completions the whole path carries: encode, ZeroMQ, decode, checks, dedupe, ledger, buffer.

Beside completions a second stands what one costs each side in processor time (`trainer_us`, `worker_us`): on shared
cores the rate is that of the moment, the cost is not. `slope` is the growth of the trainer's resident memory in bytes
per completion, a line through `resident_mb` by completions.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.faults.parts import make_model
from bench.sleeping_engine import VOCAB
from core.config import Config, Run, Stream
from core.schema import Completion, Sampling, Source, pack_tokens
from rollout.buffer import ReplayBuffer
from rollout.fingerprint import fingerprints
from rollout.keys import make_keys
from rollout.ledger import Ledger
from rollout.messages import Lease, LeaseItem
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms

TOKENS = 512
PROMPTS, SAMPLES = 32, 16  # of a lease
LEASES_AHEAD = 8


def measure(*, curve: bool, workers: int, seconds: float, limit: int) -> dict[str, Any]:
    """Completions and megabytes a second until time or `limit` is over, and how much the trainer's process grew."""
    with tempfile.TemporaryDirectory(prefix="s2l-") as folder:
        keys = Path(folder) / "keys"
        if curve:
            make_keys(keys)
        config = Config(
            run=Run(dir=f"{folder}/run"),
            stream=Stream(endpoint="tcp://127.0.0.1:0", keys=str(keys) if curve else "", credit=4 * PROMPTS * SAMPLES),
        )
        return _flood(config, Path(folder), workers, seconds, limit) | {"case": "wire", "curve": curve}


def _flood(config: Config, folder: Path, workers: int, seconds: float, limit: int) -> dict[str, Any]:
    model, ledger, process = make_model(folder / "model"), Ledger(), psutil.Process()
    buffer = ReplayBuffer(ledger, max_bytes=config.stream.buffer_mb << 20)
    count = 0

    def receive(purpose: str, completion: Completion) -> None:
        nonlocal count
        inserted = buffer.insert(completion)
        assert inserted, completion.key
        count += 1
        buffer.drop([completion.key], "benchmark")  # else a step of unbounded size would stay

    pool = WorkerPool(
        config, run_id="bench", incarnation=1, on_completion=receive,
        terms={Source.EXPLORER: RoleTerms(model, fingerprints(model, weights=True), VOCAB)},
        worker_arguments=("--engine", "bench.sleeping_engine:flooding"),
    )  # fmt: skip
    with pool:
        for index in range(workers):
            pool.spawn(Source.EXPLORER, index)
        submitted = 0
        marks: list[Mark] = []
        while count < limit and (not marks or time.monotonic() - marks[0].at_s < seconds):
            while submitted < min(limit, count + LEASES_AHEAD * workers * PROMPTS * SAMPLES):
                pool.submit([_lease(submitted)])
                submitted += PROMPTS * SAMPLES
            pool.check()
            time.sleep(0.02)
            due = limit // 20 if not marks else marks[-1].carried + limit // 40
            if count >= due or (marks and count >= limit):  # what a lease's first tenth allocates is not growth
                marks.append(_mark(count, process))
        marks.append(_mark(count, process))
    return {"workers": workers, "completions": count, **rates(marks), "loadavg": os.getloadavg()[0]}


class Mark(NamedTuple):
    """What was carried by when, with the processor seconds of both sides and the trainer's resident memory."""

    carried: int
    at_s: float
    trainer_s: float
    worker_s: float
    resident: int


def rates(marks: list[Mark]) -> dict[str, Any]:
    """Between the first mark and the last."""
    first, last = marks[0], marks[-1]
    carried, elapsed_s = last.carried - first.carried, last.at_s - first.at_s
    line = statistics.linear_regression([mark.carried for mark in marks], [mark.resident for mark in marks])
    return {
        "completions_per_s": carried / elapsed_s, "mb_per_s": carried * TOKENS * 8 / elapsed_s / 1e6,
        "trainer_us": 1e6 * (last.trainer_s - first.trainer_s) / carried,
        "worker_us": 1e6 * (last.worker_s - first.worker_s) / carried,
        "grown_mb": (last.resident - first.resident) / 1e6, "slope": line.slope,
        "resident_mb": [[mark.carried, round(mark.resident / 1e6, 2)] for mark in marks],
    }  # fmt: skip


def _mark(count: int, process: psutil.Process) -> Mark:
    def processor_s(one: psutil.Process) -> float:
        return float(one.cpu_times().user + one.cpu_times().system)

    workers_s = sum(processor_s(child) for child in process.children(recursive=True))
    return Mark(count, time.monotonic(), processor_s(process), workers_s, process.memory_info().rss)


def _lease(number: int) -> Lease:
    """Slots that no lease before it had."""
    items = tuple(
        LeaseItem(
            slot=number + i, prompt_uid="p", prompt_bytes=pack_tokens((5, 6)), samples=tuple(range(SAMPLES)),
            seeds=tuple(range(SAMPLES)),
        )
        for i in range(PROMPTS)
    )  # fmt: skip
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS, stop_token_ids=(1,))
    return Lease(
        lease_id=f"explorer-1-{number}", purpose="train", source=Source.EXPLORER, step=1, version=0, sampling=sampling,
        items=items,
    )  # fmt: skip
