"""The head under parameter sharding: two processes on gloo, tied and untied."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("sharded_worker.py")
SHARDINGS = ["fsdp2", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])]


def environment(rank, port, scratch):
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(scratch),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_sharded_head_trains_as_a_whole_one(sharding, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), sharding], cwd=ROOT, env=environment(rank, port, tmp_path / str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    rows = [json.loads(line) for line in said[0][0].splitlines() if line.startswith('{"tied"')]
    assert [row["tied"] for row in rows] == [True, False]
    for row in rows:
        assert row["drift"] == 0
        assert row["error"] <= 1e-5 * row["scale"]
        assert row["parameters"] > 10
