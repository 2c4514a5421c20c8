"""Rows about what a run must not share or find: its directory, its address, its explorers."""

import shutil
import socket
import time

from bench.faults.rows import Verdict, row
from bench.faults.runs import Run, reference, scratch


@row("F29", "two runs in one directory; a directory that holds a run; one that holds other files")
def directories(seed: int) -> Verdict:
    run, intruder = Run("shared", algorithm__steps=2000), Run("shared")
    run.start()
    run.wait_for_step(1)
    intruder.start()
    intruder.finish(2)
    assert f"is in use by process {run.process.pid}" in intruder.text(), intruder.tail()  # type: ignore[union-attr]
    run.kill()
    dirty = Run("dirty")
    shutil.copytree(reference().dir, dirty.dir)
    dirty.start()
    dirty.finish(2)
    assert "continue it with --resume" in dirty.text(), dirty.tail()
    return Verdict("refused", "at its start, exit code 2; the holder's pid, and --resume or --clean, are named")


@row("F30", "resume with another group size")
def changed(seed: int) -> Verdict:
    run = Run("changed", algorithm__group_size=8)
    shutil.copytree(reference().dir, run.dir)
    run.start("--resume")
    run.finish(2)
    assert "algorithm.group_size: 4 → 8" in run.text(), run.tail()
    return Verdict("refused", "at its start, exit code 2; a table of differences")


@row("F19", "stream.endpoint in use by another process")
def port_in_use(seed: int) -> Verdict:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        run = Run("port", stream__endpoint=f"tcp://127.0.0.1:{port}")
        run.start()
        run.finish(2)
    assert f'stream.endpoint = "tcp://127.0.0.1:{port}" is in use' in run.text(), run.tail()
    return Verdict("refused", "at its start, exit code 2; the key, the address and the remedy are named")


@row("F33", "no explorer can ever come; none comes")
def starved(seed: int) -> Verdict:
    limit = 4.0
    hopeless = Run("hopeless", explorer__processes=0)
    hopeless.start()
    hopeless.finish(2)
    assert "no explorer could find this run" in hopeless.text(), hopeless.tail()
    endpoint = f"ipc://{scratch()}/hub"
    run = Run("starved", explorer__processes=0, stream__starvation_s=limit, stream__endpoint=endpoint)
    run.start()
    run.wait_for("it waits", lambda: (run.dir / "endpoint").exists())
    start = time.monotonic()
    run.finish(1)
    seconds = time.monotonic() - start
    mini_batch = "stream.starvation_s) for 8 completions of step 1"  # 2 prompts of 4: training begins with them
    assert mini_batch in run.text(), run.tail()
    assert "none has joined yet" in run.text(), run.tail()
    assert "most recent call first" in run.text(), "no stacks were shown"
    return Verdict(
        "stopped",
        "the first is refused by its settings; the second names step, count, and that none joined; stacks shown",
        seconds,
    )
