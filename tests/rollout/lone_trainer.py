"""A trainer in a process of its own, to be killed: `lone_trainer.py CONFIG MODEL EXPLORERS` prints what it gets."""

import sys
import time
from pathlib import Path

import msgspec

from bench.faults.parts import ENGINE, eventually, make_lease
from core.config import Config
from core.schema import Source
from rollout.fingerprint import fingerprints
from rollout.pool import WorkerPool
from rollout.roster import RoleTerms

if __name__ == "__main__":
    config, model, explorers = msgspec.json.decode(sys.argv[1], type=Config), Path(sys.argv[2]), int(sys.argv[3])
    pool = WorkerPool(
        config, run_id="r", incarnation=1,
        terms={Source.EXPLORER: RoleTerms(model, fingerprints(model, weights=True), 100)},
        on_completion=lambda purpose, completion: print("completion", flush=True), worker_arguments=ENGINE,
    )  # fmt: skip
    for index in range(explorers):
        pool.spawn(Source.EXPLORER, index)
    eventually(lambda: sum(w["state"] == "ready" for w in pool.counters()["workers"].values()) == max(explorers, 1))
    print(*(worker["pid"] for worker in pool.counters()["workers"].values()), flush=True)
    pool.submit([make_lease()])
    time.sleep(600)
