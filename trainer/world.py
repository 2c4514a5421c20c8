"""The trainer's ranks: who am I, and the few collectives the trainer needs. One process needs no network at all.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors on a GPU travel by NCCL; bytes,
barriers and CPU tensors by gloo. Nothing is pickled: torch's object collectives are not used.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self

import torch
import torch.distributed as dist

# Rank 0 may work by itself for hours: a step whose completions are long, an evaluation, a checkpoint. The others then
# wait for it in calls of the control group. Its own waits have deadlines, and a rank that dies ends the others.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This rank among `size` ranks. All ranks make the same calls in the same order.

    `line`: the `line_size` consecutive ranks that share each line of tokens (learner.sequence_parallel).

    Example: World(rank=0, size=1, device=torch.device("cpu"))
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo; None in a single process
    line: dist.ProcessGroup | None = None  # None where every rank has lines of its own
    line_size: int = 1

    @classmethod
    def join(
        cls, device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout_s: float = 900.0, line_size: int = 1
    ) -> Self:
        """Read torchrun's environment and meet the other ranks.

        `timeout_s` bounds the collectives of training, which all ranks reach at about the same time. ValueError for a
        half-set environment, a missing GPU, more local ranks than GPUs, or ranks that `line_size` does not divide.
        """
        rank, size, torch_device = find_rank(device, line_size=line_size)
        if size == 1:
            return cls(rank=0, size=1, device=torch_device)
        backend = "gloo"
        if torch_device.type == "cuda":
            torch.cuda.set_device(torch_device)
            backend = "nccl"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        line = dist.new_subgroups(line_size, timeout=timeout)[0] if line_size > 1 else None
        return cls(rank=rank, size=size, device=torch_device, control=control, line=line, line_size=line_size)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which owns the workers, the buffer and the run directory."""
        return self.rank == 0

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank, however long it takes. Rank 0 passes them, the others None."""
        assert (payload is not None) == self.is_main, "rank 0 broadcasts bytes, the other ranks pass None"
        if self.size == 1:
            assert payload is not None
            return payload
        length = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64)
        dist.broadcast(length, src=0, group=self.control)
        data = torch.empty(int(length), dtype=torch.uint8)
        if payload:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if len(data):
            dist.broadcast(data, src=0, group=self.control)
        return data.numpy().tobytes()

    def await_main(self) -> None:
        """Wait until rank 0, which was at work by itself, comes here as well."""
        self.broadcast_bytes(b"here" if self.is_main else None)

    def highest(self, value: int) -> int:
        """The largest of all ranks' values, however long they take."""
        found = torch.tensor([value])
        if self.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over the ranks, the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group_of(tensor))

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N, …]: `tensor` of every rank, in the ranks' order."""
        if self.size == 1:
            return tensor[None]
        found = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(found), tensor, group=self._group_of(tensor))
        return found

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """The bytes of every rank, which has some, in the ranks' order."""
        lengths = self.gathered(torch.tensor([len(payload)]))[:, 0].tolist()
        padded = torch.frombuffer(bytearray(payload.ljust(max(lengths), b"\0")), dtype=torch.uint8)
        return [row[:length].numpy().tobytes() for row, length in zip(self.gathered(padded), lengths)]

    def agree(self, what: str, value: str) -> None:
        """Raise ValueError on every rank unless all ranks hold the same `value`; `what` names it in the message."""
        if self.size == 1:
            return
        digest = torch.frombuffer(bytearray(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
        digests = [torch.empty_like(digest) for _ in range(self.size)]
        dist.all_gather(digests, digest, group=self.control)
        others = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
        if others:
            raise ValueError(
                f"{what} differs between rank 0 and rank {', '.join(map(str, others))} (here, rank {self.rank}: "
                f"{value[:200]!r}); start every rank with the same files and arguments"
            )

    def barrier(self, where: str, *, timeout_s: float = 120.0) -> None:
        """Wait until every rank has come to the barrier named `where`.

        RuntimeError names the ranks that did not come within `timeout_s` seconds; ValueError says that ranks stand at
        barriers of different names.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.control, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited {timeout_s:g} s at '{where}' for the other ranks: {error}"
            ) from error
        self.agree("the barrier", where)

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        if self.size > 1:
            dist.destroy_process_group()

    def _group_of(self, tensor: torch.Tensor) -> dist.ProcessGroup | None:
        return None if tensor.device.type == self.device.type else self.control


def find_rank(device: Literal["auto", "cpu", "cuda"] = "auto", *, line_size: int = 1) -> tuple[int, int, torch.device]:
    """This rank, the number of ranks and this rank's device, met or not; ValueError for what `World.join` refuses."""
    rank, size, local_rank = _torchrun_environment()
    if size % line_size:
        raise ValueError(
            f"learner.sequence_parallel = {line_size} ranks share a line of tokens, and there are {size}: start "
            f"{line_size} trainer ranks or a multiple of it (torchrun --nproc-per-node), or use "
            "learner.sequence_parallel=1"
        )
    return rank, size, _choose_device(device, local_rank)


def _torchrun_environment() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in names if name in os.environ]
    if not found:
        return 0, 1, 0
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(found)} set but {', '.join(missing)} missing in the environment; "
            "start with torchrun, or unset them"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} is outside 0 … WORLD_SIZE - 1 = {size - 1}; start with torchrun")
    return rank, size, local_rank


def _choose_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError('run.device = "cuda" but torch sees no GPU; set run.device = "cpu" or "auto"')
    if local_rank >= available:
        raise ValueError(
            f"local rank {local_rank} has no GPU: torch sees {available}; start at most {available} ranks on this node"
        )
    return torch.device("cuda", local_rank)
