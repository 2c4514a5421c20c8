"""Weights in a buffer of another process, as a worker reads them: whole, torn, damaged, or gone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rollout import shared_weights
from rollout.shared_memory import Opened, open_memory
from rollout.shared_weights import OVERWRITTEN, WHOLE, Overwritten, SharedWeights, require_whole, shared_shapes
from trainer.published import memory_is_shared
from trainer.weight_buffers import WeightBuffers, buffer_bytes

pytestmark = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")
CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = {"embedding": (300, 129), "norm": (7,), "scalar": (), "empty": (0, 3), "head": (129, 400)}


@pytest.fixture(autouse=True)
def mappings(monkeypatch: pytest.MonkeyPatch) -> dict:
    """None is open at first."""
    monkeypatch.setattr(shared_weights, "_mappings", {})
    return shared_weights._mappings


def tensors_of(version: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


WRITER = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_shared_weights import CPU, tensors_of
from trainer.weight_buffers import WeightBuffers, buffer_bytes

def told(tensors):
    for index, item in enumerate(tensors.items()):
        if index == 2 and pausing:
            print("half", flush=True)
            sys.stdin.readline()
        yield item

buffers = {}
print("ready", flush=True)
for line in sys.stdin:
    word, dtype, version = line.split()
    pausing, tensors = word == "pause", tensors_of(int(version), getattr(torch, dtype))
    if dtype not in buffers:
        buffers[dtype] = WeightBuffers(buffer_bytes(tensors.values()), CPU)
    print(*buffers[dtype].write(int(version), lambda buffer: buffer.fill(told(tensors))), flush=True)
"""


class Writer:
    """A trainer in a process of its own, which does what it is told."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", WRITER, str(Path(__file__).parent)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert self.said() == ["ready"]

    def said(self) -> list[str]:
        return self.process.stdout.readline().split()

    def tell(self, *words: object) -> list[str]:
        print(*words, file=self.process.stdin, flush=True)
        return self.said()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    process = Writer()
    yield process
    process.kill()


def opened(file: str | Path, digest: str, version: int) -> SharedWeights:
    return SharedWeights(Path(file), version=version, digest=digest, device=CPU)


def read_whole(file: str | Path, digest: str, version: int) -> dict[str, Tensor]:
    with opened(file, digest, version) as weights:
        found = dict(weights.tensors())
        require_whole([weights.outcome()], version=version)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_another_process_wrote_is_read_bit_for_bit(writer: Writer, dtype: str) -> None:
    for version in range(1, 5):  # both buffers, twice
        file, digest = writer.tell("write", dtype, version)
        assert_same(read_whole(file, digest, version), tensors_of(version, getattr(torch, dtype)))
        assert shared_shapes(Path(file), version=version) == SHAPES


def test_a_version_that_is_written_over_while_it_is_read_is_found(writer: Writer) -> None:
    first = writer.tell("write", "float32", 11)
    second = writer.tell("write", "float32", 12)
    with opened(*first, version=11) as weights:
        names = list(weights.shapes)
        for name in names[:1]:
            weights.read(name)
        assert writer.tell("pause", "float32", 13) == ["half"]
        for name in names[1:]:
            weights.read(name)
        assert weights.outcome() == OVERWRITTEN  # it is being written
        assert_same(read_whole(*second, version=12), tensors_of(12, torch.float32))
        third = writer.tell("go")
        assert weights.outcome() == OVERWRITTEN  # it holds a later one
    with pytest.raises(Overwritten, match="weights 11 were overwritten while they were read"):
        read_whole(*first, version=11)
    assert_same(read_whole(*third, version=13), tensors_of(13, torch.float32))


def test_the_weights_of_a_dead_trainer_cannot_be_read() -> None:
    trainer = Writer()
    file, digest = trainer.tell("write", "float32", 1)
    read_whole(file, digest, 1)
    trainer.kill()
    with pytest.raises(RuntimeError, match=r"weights 1: .* cannot be read .*that has ended.*rollout\.weights=memory"):
        opened(file, digest, 1)
    with pytest.raises(RuntimeError, match=r"cannot be read .*rollout\.weights=memory"):
        shared_shapes(Path(file), version=1)


@pytest.fixture
def buffers() -> Iterator[WeightBuffers]:
    """In this process."""
    made = WeightBuffers(buffer_bytes(tensors_of(1, torch.float32).values()), CPU)
    yield made
    made.close()


def write(buffers: WeightBuffers, version: int) -> tuple[Path, str]:
    return buffers.write(version, lambda buffer: buffer.fill(iter(tensors_of(version, torch.float32).items())))


def test_one_flipped_bit_is_found(buffers: WeightBuffers) -> None:
    file, digest = write(buffers, 1)
    memory = buffers._buffers[-1]._exported.memory
    for position in (0, 1000, 300 * 129 * 4 - 1):
        memory[position] ^= 1
        with pytest.raises(RuntimeError, match=rf"^weights 1: what arrived has digest [0-9a-f]{{64}}, not {digest}:"):
            read_whole(file, digest, 1)
        memory[position] ^= 1
    read_whole(file, digest, 1)


def test_what_is_no_file_of_weights_is_refused_at_once(tmp_path: Path, buffers: WeightBuffers) -> None:
    file, digest = write(buffers, 1)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "text").write_text("something else altogether")
    gone = file.read_bytes().replace(b"/proc/", b"/gone/")
    (tmp_path / "gone").write_bytes(gone)
    before = set(os.listdir("/proc/self/fd"))
    for name in ("missing", "pipe", "text", "gone"):
        with pytest.raises(RuntimeError, match=rf"weights 1: {tmp_path / name} cannot be read"):
            opened(tmp_path / name, digest, 1)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_buffer_is_opened_once_until_another_trainer_s_weights_come(
    mappings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def open_and_tell(handle, device) -> Opened:
        events.append(f"open {handle.name}")
        return open_memory(handle, device)._replace(close=lambda: events.append(f"close {handle.name}"))

    monkeypatch.setattr(shared_weights, "open_memory", open_and_tell)
    size = buffer_bytes(tensors_of(1, torch.float32).values())
    old, new = WeightBuffers(size, CPU), WeightBuffers(size, CPU)
    names = [buffer._exported.handle.name for buffer in (*old._buffers, *new._buffers)]
    for version in (1, 2, 3, 4):
        read_whole(*write(old, version), version)
    assert events == [f"open {names[0]}", f"open {names[1]}"]
    read_whole(*write(new, 1), 1)
    assert sorted(events[2:4]) == sorted([f"close {names[0]}", f"close {names[1]}"])
    assert events[4:] == [f"open {names[2]}"]
    assert len(mappings) == 1
    old.close()
    new.close()


def test_every_process_must_have_read_the_whole_version() -> None:
    require_whole([WHOLE, WHOLE], version=3)
    with pytest.raises(Overwritten):
        require_whole([WHOLE, OVERWRITTEN], version=3)
    with pytest.raises(RuntimeError, match=r"^weights 3: no peer access$") as caught:
        require_whole([OVERWRITTEN, "no peer access"], version=3)  # a later version would not help
    assert not isinstance(caught.value, Overwritten)


@pytest.mark.parametrize("words", [1, 31, 32768, 32769, 5 * 32768 + 3])
def test_a_checksum_shows_a_changed_word_and_swapped_ones(words: int) -> None:
    memory = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(words))
    sums, view = shared_weights.checksums(memory), memory.view(torch.int64)
    assert len(sums) == -(-words // 32768)
    for position in {0, words // 2, words - 1}:
        for bit in (0, 7, 62):
            view[position] ^= 1 << bit
            changed = (shared_weights.checksums(memory) != sums).nonzero().flatten().tolist()
            assert changed == [position // 32768]
            view[position] ^= 1 << bit
    for one, other in {(0, words - 1), (0, min(1, words - 1)), (words // 2, words - 1)}:
        if one != other:
            view[[one, other]] = view[[other, one]]
            assert not torch.equal(shared_weights.checksums(memory), sums)
            view[[one, other]] = view[[other, one]]
    assert torch.equal(shared_weights.checksums(memory), sums)


def test_the_digest_is_of_manifest_sums_and_their_order() -> None:
    one, other = torch.tensor([1]), torch.tensor([2, 3])
    digests = {
        shared_weights.digest_of(b"m", [one, other]),
        shared_weights.digest_of(b"m", [other, one]),
        shared_weights.digest_of(b"n", [one, other]),
    }
    assert len(digests) == 3
    assert shared_weights.digest_of(b"m", [one, other]) == shared_weights.digest_of(b"m", [torch.tensor([1, 2, 3])])


def test_a_tensor_takes_whole_blocks_of_256_bytes() -> None:
    assert [shared_weights.room(size) for size in (0, 1, 256, 257)] == [0, 256, 256, 512]
    assert [shared_weights.Place("a", "bfloat16", shape, 0).size for shape in ((), (3, 5), (0, 7))] == [2, 30, 0]
