"""Memory that one process writes and others on its machine read: of a GPU, or of the host where there is none.

What differs between the two is here and nowhere else: `export_memory` and `open_memory`. A handle is plain text, so it
travels like any other message, and nothing is unpickled.

On a GPU the driver's own calls are used (libcuda.so.1 by ctypes), not torch's `_share_cuda_` and `_new_shared_cuda`:
torch counts readers in a file of /dev/shm that a killed reader never takes itself out of, and a killed owner leaves
behind; it shares the whole segment that its allocator put a tensor into, under `expandable_segments` through a file
descriptor that the reader may only fetch if it may trace the owner; it opens memory in a context on the *owner's* GPU,
which costs half a GB there for each reader; and its event is of the moment of sharing, not of a later write. Memory
from `cuMemAlloc` has one handle of 64 bytes, is opened once by a reader on its own GPU, and needs no count: the owner
frees it by ending.
"""

import ctypes
import fcntl
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is
_HANDLE_BYTES = 64


class Handle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What another process opens.

    Example: Handle(kind="cpu", name="/proc/71/fd/9", size=4096)
    """

    kind: Literal["cpu", "cuda"]
    name: str  # a path, or CUDA's IPC handle in hex
    size: int  # bytes
    gpu: str = ""  # its UUID


class Exported(NamedTuple):
    """Memory of this process, zeros at first: `memory` uint8 [size] on its device. It is there until `close`, or on a
    GPU as long as this process: CUDA leaves undefined what a reader has of memory that was freed under it.

    Example: exported = export_memory(4096, torch.device("cpu")); exported.memory.fill_(7)
    """

    memory: Tensor
    handle: Handle
    close: Callable[[], None]


class Opened(NamedTuple):
    """Memory of another process. `copy_to(start, target)` fills a contiguous uint8 tensor with what begins at `start`;
    on a GPU in the order of the current stream.

    Example: open_memory(handle, torch.device("cpu")).copy_to(0, torch.empty(4096, dtype=torch.uint8))
    """

    copy_to: Callable[[int, Tensor], None]
    close: Callable[[], None]


def export_memory(size: int, device: torch.device) -> Exported:
    """`size` bytes on `device` that other processes can open. OSError or RuntimeError where there is no room for them.

    Example: export_memory(1 << 30, torch.device("cuda", 0)).handle
    """
    return _export_cuda(size, device) if device.type == "cuda" else _export_cpu(size)


def open_memory(handle: Handle, device: torch.device) -> Opened:
    """Memory of another process, for tensors on `device`. RuntimeError or OSError where it cannot be opened.

    Example: open_memory(Handle(kind="cpu", name="/proc/71/fd/9", size=4096), torch.device("cpu"))
    """
    if handle.kind != device.type:
        raise RuntimeError(f"it lies in {handle.kind} memory, and this engine runs on {device.type}")
    return _open_cuda(handle, device) if handle.kind == "cuda" else _open_cpu(handle)


def memory_file(size: int) -> int:
    """A descriptor of a file without a name, zeros, that stays of this size. OSError where there is no room for it.

    Example: os.pwrite(memory_file(64), b"content", 0)
    """
    descriptor = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size)  # no room is an error now, not a SIGBUS at some later write
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        os.fchmod(descriptor, 0o400)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _export_cpu(size: int) -> Exported:
    descriptor = memory_file(size)
    try:
        memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    except BaseException:
        os.close(descriptor)
        raise
    handle = Handle(kind="cpu", name=f"/proc/{os.getpid()}/fd/{descriptor}", size=size)
    return Exported(memory, handle, lambda: os.close(descriptor))


def _open_cpu(handle: Handle) -> Opened:
    with open(handle.name, "rb") as stream:
        found = os.fstat(stream.fileno()).st_size
        if found != handle.size:
            raise RuntimeError(f"it has {found} bytes, not {handle.size}")
        memory = np.frombuffer(mmap.mmap(stream.fileno(), handle.size, prot=mmap.PROT_READ), np.uint8)

    def copy_to(start: int, target: Tensor) -> None:
        target.numpy()[:] = memory[start : start + len(target)]

    return Opened(copy_to, lambda: None)  # unmapped when nobody refers to it


class _Ipc(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


class _Raw:
    """Memory as torch.as_tensor takes it over: no copy."""

    def __init__(self, address: int, size: int) -> None:
        shape = {"shape": (size,), "typestr": "|u1", "data": (address, False)}
        self.__cuda_array_interface__ = {**shape, "strides": None, "version": 3}


@functools.cache
def _driver() -> Any:
    """CUDA's driver library: one name and one interface for all releases of the toolkit."""
    library = ctypes.CDLL("libcuda.so.1")
    address = ctypes.POINTER(ctypes.c_uint64)
    for name, arguments in {
        "cuMemAlloc_v2": (address, ctypes.c_size_t),
        "cuIpcGetMemHandle": (ctypes.POINTER(_Ipc), ctypes.c_uint64),
        "cuIpcOpenMemHandle_v2": (address, _Ipc, ctypes.c_uint),
        "cuIpcCloseMemHandle": (ctypes.c_uint64,),
        "cuMemcpyDtoDAsync_v2": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
        "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    }.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(name: str, *arguments: Any) -> None:
    """RuntimeError with CUDA's own name of what went wrong."""
    if code := getattr(_driver(), name)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{name.partition('_')[0]}: {(text.value or str(code).encode()).decode()}")


def _export_cuda(size: int, device: torch.device) -> Exported:
    address, ipc = ctypes.c_uint64(), _Ipc()
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # torch's context is now this thread's, as the driver's calls need it
        torch.cuda.empty_cache()  # what torch keeps unused is room for this
        _call("cuMemAlloc_v2", ctypes.byref(address), size)
        _call("cuIpcGetMemHandle", ctypes.byref(ipc), address)
        memory = torch.as_tensor(_Raw(address.value, size), device=device).zero_()
    handle = Handle(kind="cuda", name=bytes(ipc.reserved).hex(), size=size, gpu=gpu_name(device))
    return Exported(memory, handle, lambda: None)


def _open_cuda(handle: Handle, device: torch.device) -> Opened:
    own = torch.cuda.current_device() if device.index is None else device.index
    seen = [gpu_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    if handle.gpu not in seen:
        raise RuntimeError(
            f"it lies in the memory of GPU {handle.gpu}, and this process sees {', '.join(seen)}: name that one too, "
            "last, in CUDA_VISIBLE_DEVICES"
        )
    owner = seen.index(handle.gpu)
    if owner != own and not torch.cuda.can_device_access_peer(own, owner):
        raise RuntimeError(f"GPU {seen[own]} cannot read the memory of GPU {handle.gpu} (no peer access)")
    address = ctypes.c_uint64()
    ipc = _Ipc((ctypes.c_ubyte * _HANDLE_BYTES)(*bytes.fromhex(handle.name)))
    with torch.cuda.device(own):
        torch.cuda.synchronize()
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), ipc, _LAZY_PEER_ACCESS)

    def copy_to(start: int, target: Tensor) -> None:
        assert start + target.nbytes <= handle.size, (start, target.shape, handle.size)
        with torch.cuda.device(own):
            stream = torch.cuda.current_stream().cuda_stream
            _call("cuMemcpyDtoDAsync_v2", target.data_ptr(), address.value + start, target.nbytes, stream)

    def close() -> None:
        with torch.cuda.device(own):
            torch.cuda.synchronize()
            _call("cuIpcCloseMemHandle", address)

    return Opened(copy_to, close)


def gpu_name(device: torch.device) -> str:
    """A GPU's UUID, the same in every process.

    Example: gpu_name(torch.device("cuda", 0))
    """
    return str(torch.cuda.get_device_properties(device).uuid)
