import json

import pytest
import torch

from trainer.world import World

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

TWO_RANKS = """
import json, time
import torch
from trainer.world import World

world = World.join("cpu", timeout_s=60)
found = {"rank": world.rank, "size": world.size, "main": world.is_main}
for name, payload in (("bytes", b"\\x00payload\\xff"), ("nothing", b"")):
    found[name] = world.broadcast_bytes(payload if world.is_main else None).hex()
total = torch.tensor([1.0, 10.0]) * (world.rank + 1)
world.sum_(total)
everyone = world.gathered(torch.tensor([float(world.rank), -2.0]))
parts = world.gather_bytes(b"\\x00" * world.rank + b"end")
found["parts"] = [part.hex() for part in parts]
found |= {"sum": total.tolist(), "gathered": everyone.tolist(), "highest": world.highest(5 - world.rank)}
world.agree("the configuration", "same")
world.barrier("start")
for what, act in (
    ("agree", lambda: world.agree("the configuration", f"seed {world.rank}")),
    ("names", lambda: world.barrier(f"place {world.rank}")),
):
    try:
        act()
    except ValueError as error:
        found[what] = str(error)
if world.is_main:
    try:
        world.barrier("checkpoint", timeout_s=1.0)
    except RuntimeError as error:
        found["late"] = str(error)
else:
    time.sleep(3)
print(json.dumps(found))
"""


PATIENT = """
import time
import torch
from trainer.world import World

world = World.join("cpu", timeout_s=5)  # which the ranks have to meet, too
if world.is_main:
    time.sleep(7)
world.await_main()
print(world.broadcast_bytes(b"late" if world.is_main else None).decode(), world.highest(world.rank))
world.leave()
"""


def test_the_other_ranks_wait_for_rank_0_longer_than_for_each_other(run_ranks):
    """A long evaluation or a hard step is no fault."""
    assert [output.strip() for output in run_ranks(PATIENT, 2)] == ["late 1", "late 1"]


def test_a_single_process_needs_no_network(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    world = World.join("cpu")
    value = torch.tensor([1.5])
    world.sum_(value)
    assert world.gathered(value).tolist() == [[1.5]]
    world.barrier("anywhere")
    world.agree("anything", "x")
    world.leave()
    assert (world.rank, world.size, world.is_main, world.device.type) == (0, 1, True, "cpu")
    assert value.tolist() == [1.5]
    assert world.broadcast_bytes(b"abc") == b"abc"
    assert world.gather_bytes(b"abc") == [b"abc"]
    assert world.highest(3) == 3
    world.await_main()
    assert not torch.distributed.is_initialized()


def test_torchrun_with_one_rank_needs_no_network(monkeypatch):
    for name, value in zip(NAMES, ("0", "1", "0")):
        monkeypatch.setenv(name, value)
    assert World.join("cpu").size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK missing"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is outside"),
    ],
)
def test_a_broken_environment_is_refused(monkeypatch, environment, message):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        World.join("cpu")


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"run\.device"):
        World.join("cuda")
    assert World.join("auto").device.type == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in zip(NAMES, ("1", "2", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="local rank 1 has no GPU"):
        World.join("auto")


def test_two_ranks_exchange_agree_and_name_who_is_late(run_ranks):
    first, second = (json.loads(output) for output in run_ranks(TWO_RANKS, 2))
    assert (first["rank"], second["rank"], first["main"], second["main"]) == (0, 1, True, False)
    for found in (first, second):
        assert bytes.fromhex(found["bytes"]) == b"\x00payload\xff"
        assert found["nothing"] == ""
        assert found["sum"] == [3.0, 30.0]
        assert [bytes.fromhex(part) for part in found["parts"]] == [b"end", b"\x00end"]
        assert found["gathered"] == [[0.0, -2.0], [1.0, -2.0]]
        assert "the configuration differs between rank 0 and rank 1" in found["agree"]
        assert "the barrier differs between rank 0 and rank 1" in found["names"]
    assert "'checkpoint'" in first["late"]
    assert "1" in first["late"].split("for the other ranks:")[1]
