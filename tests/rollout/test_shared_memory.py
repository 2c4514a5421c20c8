"""Memory of one process that another opens: of the host, and of a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from rollout.shared_memory import Handle, export_memory, open_memory
from trainer.published import memory_is_shared

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = (3 << 20) + 512
needs_memfd = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OTHER = """
import sys
import msgspec, torch
from rollout.shared_memory import Handle, open_memory

device = torch.device(sys.argv[1])
opened = open_memory(msgspec.json.decode(sys.argv[2], type=Handle), device)
for line in sys.stdin:
    start, size = map(int, line.split())
    target = torch.full((size,), 255, dtype=torch.uint8, device=device)
    opened.copy_to(start, target)
    values, counts = (found.tolist() for found in torch.unique(target.cpu(), return_counts=True))
    print(*(f"{value}x{count}" for value, count in zip(values, counts)), flush=True)
opened.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=needs_memfd), pytest.param("cuda:0", marks=needs_gpu)])
def test_another_process_sees_every_write_without_being_told(kind: str) -> None:
    """And its end, even by kill -9, is nothing to the owner."""
    exported = export_memory(SIZE, torch.device(kind))
    assert (exported.memory.dtype, tuple(exported.memory.shape)) == (torch.uint8, (SIZE,))
    assert not exported.memory.any()
    command = [sys.executable, "-c", OTHER, kind, msgspec.json.encode(exported.handle).decode()]
    others = [
        subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        for _ in range(2)
    ]  # fmt: skip

    def seen(other: subprocess.Popen[str], start: int, size: int) -> str:
        print(start, size, file=other.stdin, flush=True)
        return other.stdout.readline().strip()

    for value in (3, 4):
        exported.memory.fill_(value)
        exported.memory[256:512] = 9
        exported.memory.cpu()  # a writer waits for its device before it tells anybody
        for other in others:
            assert seen(other, 0, SIZE) == f"{value}x{SIZE - 256} 9x256"
            assert seen(other, 512, 1024) == f"{value}x1024"
    others[0].kill()
    others[0].communicate()
    exported.memory.fill_(5)
    exported.memory.cpu()
    assert seen(others[1], SIZE - 100, 100) == "5x100"
    assert others[1].communicate(timeout=60)[0].strip() == "closed"
    assert exported.memory.sum().item() == 5 * SIZE
    exported.close()


@needs_memfd
def test_memory_of_another_size_is_refused() -> None:
    exported = export_memory(4096, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="it has 4096 bytes, not 8192"):
        open_memory(msgspec.structs.replace(exported.handle, size=8192), torch.device("cpu"))
    exported.close()


def test_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="it lies in cuda memory, and this engine runs on cpu"):
        open_memory(Handle(kind="cuda", name="00" * 64, size=1, gpu="GPU-1"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ("uuid-7", r"memory of GPU uuid-7, and this process sees uuid-0, uuid-1: .*last, in CUDA_VISIBLE_DEVICES"),
        ("uuid-1", r"GPU uuid-0 cannot read the memory of GPU uuid-1 \(no peer access\)"),
    ],
)
def test_a_gpu_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, owner: str, message: str) -> None:
    """No GPU is needed: nothing is opened."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device.index}")
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: False)
    with pytest.raises(RuntimeError, match=message):
        open_memory(Handle(kind="cuda", name="00" * 64, size=1, gpu=owner), torch.device("cuda", 0))
