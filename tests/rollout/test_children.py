import os
import sys
from pathlib import Path
from typing import Any

import pytest

from core.schema import Source
from rollout import children
from rollout.children import Children


def test_each_worker_sees_its_gpus_also_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str | None]] = {}
    popen = children.subprocess.Popen

    def fail(command: list[str], *, env: dict[str, str], **settings: Any) -> Any:
        seen.setdefault(command[command.index("--name") + 1], []).append(env.get("CUDA_VISIBLE_DEVICES"))
        return popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], env=env, **settings)

    monkeypatch.setattr(children.subprocess, "Popen", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    workers = Children(tmp_path, threads=1, max_restarts=3, arguments=())
    workers.start(Source.EXPLORER, 0, "ipc:///nowhere", "4,5")
    workers.start(Source.LEARNER, 0, "ipc:///nowhere")
    for pid in workers.pids().values():
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert len(workers.reap(0.0, "ipc:///nowhere")) == 2
    workers.reap(10.0, "ipc:///nowhere")
    workers.stop(grace_s=5.0)
    assert seen == {"explorer-0": ["4,5", "4,5"], "learner-0": ["6,7", "6,7"]}
