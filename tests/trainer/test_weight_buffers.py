"""Rank 0's two buffers: what another process finds in them, what a failing write does, and what is left of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.config import Config, Rollout
from rollout.shared_weights import checksums
from trainer.published import PublishedWeights, memory_is_shared, open_weights
from trainer.weight_buffers import WeightBuffer, WeightBuffers, buffer_bytes

pytestmark = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")
CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("first", "second", "third")

READER = """
import hashlib, sys
from pathlib import Path
import torch
from rollout.shared_weights import Overwritten, SharedWeights, require_whole

print("ready", flush=True)
for line in sys.stdin:
    word, file, digest, version = line.split()
    version, hashed = int(version), hashlib.sha256()
    try:
        with SharedWeights(Path(file), version=version, digest=digest, device=torch.device(sys.argv[1])) as weights:
            for index, name in enumerate(weights.shapes):
                if word == "pause" and index == 1:
                    print("half", flush=True)
                    sys.stdin.readline()
                tensor = weights.read(name)
                hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                hashed.update(tensor.flatten().view(torch.uint8).cpu().numpy().tobytes())
            require_whole([weights.outcome()], version=version)
        print(hashed.hexdigest(), flush=True)
    except Overwritten:
        print("overwritten", flush=True)
    except RuntimeError as error:
        print("error", str(error).replace(chr(10), " "), flush=True)
"""


def tensors_of(version: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The second is no contiguous tensor."""
    generator = torch.Generator().manual_seed(version)
    whole = torch.randn((3, 70, 90), generator=generator).to(dtype)
    return {"first": whole[0], "second": whole[1].t(), "third": whole[2, 0]}


def hash_of(tensors: dict[str, Tensor]) -> str:
    import hashlib

    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class Reader:
    """A worker in a process of its own."""

    def __init__(self, device: str = "cpu") -> None:
        command = [sys.executable, "-c", READER, device]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert self.said() == "ready"

    def said(self) -> str:
        return self.process.stdout.readline().strip()

    def tell(self, *words: object) -> str:
        print(*words, file=self.process.stdin, flush=True)
        return self.said()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.end()


@pytest.fixture
def buffers() -> Iterator[WeightBuffers]:
    made = WeightBuffers(buffer_bytes(tensors_of(1).values()), CPU)
    yield made
    made.close()


def write(buffers: WeightBuffers, version: int, dtype: torch.dtype = torch.float32) -> tuple[Path, str]:
    return buffers.write(version, lambda buffer: buffer.fill(iter(tensors_of(version, dtype).items())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_process_reads_what_was_written_bit_for_bit(reader: Reader, dtype: torch.dtype) -> None:
    buffers = WeightBuffers(buffer_bytes(tensors_of(1, dtype).values()), CPU)
    earlier = ()
    for version in range(1, 6):
        file, digest = write(buffers, version, dtype)
        expected = hash_of(tensors_of(version, dtype))
        assert reader.tell("read", file, digest, version) == expected
        if earlier:  # the version before is there until the next is written
            assert reader.tell("read", *earlier) == hash_of(tensors_of(version - 1, dtype))
        earlier = (file, digest, version)
    buffers.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_too(dtype: torch.dtype) -> None:
    """The digest that the GPU makes is the CPU's, a late reader is told, and so is one whose GPU reads other bytes."""
    device, reader = torch.device("cuda", 0), Reader("cuda:0")
    on_gpu, on_cpu = (WeightBuffers(buffer_bytes(tensors_of(1).values()), where) for where in (device, CPU))

    def publish(version: int) -> tuple[Path, str]:
        tensors = {name: tensor.to(device) for name, tensor in tensors_of(version, dtype).items()}
        return on_gpu.write(version, lambda buffer: buffer.fill(iter(tensors.items())))

    first, second = publish(1), publish(2)
    assert reader.tell("read", *first, 1) == hash_of(tensors_of(1, dtype))
    assert reader.tell("pause", *first, 1) == "half"
    third = publish(3)
    assert reader.tell("go") == "overwritten"
    for version, published in ((2, second), (3, third)):
        assert reader.tell("read", *published, version) == hash_of(tensors_of(version, dtype))
    write(on_cpu, 3, dtype)
    sums = [checksums(buffers._buffers[-1]._exported.memory).tolist() for buffers in (on_gpu, on_cpu)]
    assert sums[0] == sums[1]
    on_gpu._buffers[-1]._exported.memory[77] ^= 1
    torch.cuda.synchronize()
    assert reader.tell("read", *third, 3).startswith("error weights 3: what arrived has digest")
    reader.end()
    on_gpu.close()
    on_cpu.close()


def test_a_reader_in_the_middle_learns_that_the_version_after_the_next_came(
    reader: Reader, buffers: WeightBuffers
) -> None:
    first, second = write(buffers, 1), write(buffers, 2)
    assert reader.tell("pause", *first, 1) == "half"
    third = write(buffers, 3)
    assert reader.tell("go") == "overwritten"
    assert reader.tell("pause", *second, 2) == "half"
    buffers._buffers[0].begin()  # nothing is written yet
    assert reader.tell("go") == "overwritten"
    assert reader.tell("read", *third, 3) == hash_of(tensors_of(3))


def test_a_byte_that_does_not_arrive_is_an_error(reader: Reader, buffers: WeightBuffers) -> None:
    file, digest = write(buffers, 1)
    buffers._buffers[-1]._exported.memory[77] ^= 1
    said = reader.tell("read", file, digest, 1)
    assert said.startswith("error weights 1: what arrived has digest")
    assert digest in said


def test_versions_alternate_between_two_buffers_that_stay_where_they_are(buffers: WeightBuffers) -> None:
    assert len(buffers._buffers) == 2
    files, digests = zip(*(write(buffers, version) for version in (1, 2, 3, 4)))
    assert files[:2] == files[2:]
    assert len(set(files)) == 2
    assert len(set(digests)) == 4


def test_a_rank_that_cannot_fill_its_buffer_lets_the_others_go_on(buffers: WeightBuffers) -> None:
    """Every tensor is gathered by all ranks together."""
    write(buffers, 1)
    write(buffers, 2)
    wrong = tensors_of(3) | {"second": torch.zeros(2, 2)}
    asked = []

    def gathered(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for item in tensors.items():
            asked.append(item[0])
            yield item

    for tensors, error in ((wrong, AssertionError), ({"other": torch.zeros(2)} | tensors_of(3), KeyError)):
        asked.clear()
        with pytest.raises(error):
            buffers.write(3, lambda buffer, tensors=tensors: buffer.fill(gathered(tensors)))
        assert asked == list(tensors)


@pytest.mark.parametrize("left_out", NAMES)
def test_a_tensor_that_is_left_out_is_missed(buffers: WeightBuffers, left_out: str) -> None:
    """The buffer would go on with its value of two versions ago."""
    write(buffers, 1)
    write(buffers, 2)
    tensors = {name: tensor for name, tensor in tensors_of(3).items() if name != left_out}
    with pytest.raises(AssertionError, match="2 tensors of 3"):
        buffers.write(3, lambda buffer: buffer.fill(iter(tensors.items())))


def test_tensors_that_are_more_than_was_counted_are_refused() -> None:
    buffer = WeightBuffer(buffer_bytes(tensors_of(1).values()) - 256, CPU, "owner")
    with pytest.raises(AssertionError, match="no room for third"):
        buffer.fill(iter(tensors_of(1).items()))
    buffer.close()


def test_closing_leaves_neither_descriptor_nor_mapping() -> None:
    before, size = set(os.listdir("/proc/self/fd")), buffer_bytes(tensors_of(1).values())
    mapped = Path("/proc/self/maps").read_text().count("memfd:weights")
    buffers = WeightBuffers(size, CPU)
    file, _ = write(buffers, 1)
    assert len(set(os.listdir("/proc/self/fd")) - before) >= 3
    buffers.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count("memfd:weights") == mapped
    assert not file.exists()


def test_others_can_only_read_and_children_inherit_nothing(buffers: WeightBuffers) -> None:
    file, _ = write(buffers, 1)
    for path in (file, Path(buffers._buffers[-1]._exported.handle.name)):
        assert path.stat().st_mode & 0o777 == 0o400
        assert not os.get_inheritable(int(path.name))
        for size in (10, 1 << 24):
            with pytest.raises(PermissionError):
                os.ftruncate(int(path.name), size)  # a reader's mapping would end in SIGBUS


@pytest.mark.parametrize(("where", "kind"), [("device", WeightBuffers), ("memory", PublishedWeights)])
def test_the_setting_says_where_weights_lie(where: str, kind: type, tmp_path: Path) -> None:
    left = tmp_path / "weights" / "version_000003.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"of a killed start, which had them in files")
    said: list[str] = []
    weights = open_weights(Config(rollout=Rollout(weights=where)), tmp_path, 4096, CPU, said.append)
    assert type(weights) is kind
    assert not left.exists()
    assert not said
    weights.close()
