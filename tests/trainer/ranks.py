"""Processes that find each other as torchrun's ranks do."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_GUARD_S = 400.0


def start_ranks(program: Path, arguments: Sequence[object], size: int, work: Path) -> None:
    """Run `program` as `size` ranks to their end; what they print is in `work`, and in the failure if one fails."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    logs = [work / f"rank_{rank}_of_{size}.log" for rank in range(size)]
    ranks = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "TORCH_EXTENSIONS_DIR": str(work / "extensions"),
        }  # fmt: skip
        command = [sys.executable, str(program), *map(str, arguments)]
        with log.open("wb") as file:
            ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=HANG_GUARD_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * size, "\n".join(log.read_text()[-3000:] for log in logs)
