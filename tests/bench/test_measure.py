"""The measuring protocol."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from bench import measure


def test_rounds_are_interleaved_after_warm_up():
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_the_summary_is_a_median_with_its_range():
    assert measure.summary([3.0, 1.0, 2.0]) == {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0}


@pytest.mark.skipif(not measure.STATUS.exists(), reason="reads /proc")
def test_held_memory_counts_what_is_alive_only():
    before = measure.held_bytes()
    alive, freed = torch.ones(16 << 20), torch.ones(64 << 20)
    del freed
    assert (64 << 20) * 0.9 < measure.held_bytes() - before < (64 << 20) * 1.5
    assert alive.sum() == 16 << 20


def test_peak_memory_sees_what_was_freed():
    peak = measure.peak_bytes(lambda: torch.ones(16 << 20).sum())
    assert peak is None or (64 << 20) * 0.9 < peak < (64 << 20) * 1.5


def test_records_carry_the_machine(tmp_path):
    for value in (1, 2):
        place = measure.record("x", [{"value": value}], tmp_path)
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert all({"time", "commit", "device", "threads", "torch", "triton"} <= row.keys() for row in rows)


def test_a_table_aligns_and_marks_what_is_missing():
    assert measure.table([{"a": 1.5, "b": "x"}, {"a": None}], ["a", "b"]) == "a    b\n1.5  x\n-    -"


def test_a_process_ends_with_all_it_started():
    """torchrun starts its ranks in sessions of their own: killing a process group leaves them on the GPU."""
    inner = "import time; time.sleep(60)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {inner!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))
        measure.end_tree(process)
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    measure.end_tree(process)  # one that has ended is no error
