"""Every kernel compiles for its chips without one: no spills, within the chip's registers and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills_or_exceeds_the_chip(compiled):
    assert [(row["kernel"], row["chip"], aot.problems(row)) for row in compiled if aot.problems(row)] == []
    assert {row["chip"] for row in compiled} == {"sm_80", "sm_90a", "sm_100a"}


def test_every_kernel_is_compiled(compiled):
    import kernels.linear_logprob
    import kernels.policy_loss
    import kernels.ragged

    modules = (kernels.linear_logprob, kernels.policy_loss, kernels.ragged)
    kernels_there = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {row["function"] for row in compiled} == kernels_there


def test_a_spill_is_reported():
    row = {"chip": "sm_90a", "registers": 255, "warps": 16, "shared_bytes": 1 << 20,
           "spill_stores": 8, "spill_loads": 0, "stack_bytes": 0}  # fmt: skip
    faults = " ".join(aot.problems(row))
    assert "8 bytes of spill_stores" in faults
    assert "255 registers × 512 threads exceed 65536" in faults
    assert "shared memory" in faults
