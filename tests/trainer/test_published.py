"""Published weights: the file itself, who can change it, when it is gone, and how a worker takes it."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from rollout import fingerprint
from rollout.fingerprint import file_digest
from rollout.generation import Generator
from rollout.messages import Weights
from rollout.torch_engine import TorchEngine
from rollout.vllm_weights import ModelFiles
from trainer import published
from trainer.published import PublishedWeights, memory_is_shared
from trainer.tensor_files import write_stream

in_memory = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")


def write(stream, tensors: dict[str, Tensor]) -> None:
    write_stream(iter(tensors.items()), stream, tensors)


def model_tensors(directory: Path, scale: float = 2.0) -> dict[str, Tensor]:
    return {name: tensor * scale for name, tensor in load_file(directory / "model.safetensors").items()}


@pytest.fixture
def memory(tmp_path: Path) -> PublishedWeights:
    weights = PublishedWeights(tmp_path / "weights", in_memory=True)
    assert weights.in_memory
    yield weights
    weights.close()


def test_what_is_written_is_what_safetensors_reads() -> None:
    tensors = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
        "half": torch.randn(2, 3, 4).half(),
        **{f"model.layers.{index}.{'long.' * 40}weight": torch.randn(index + 1) for index in range(300)},
    }
    stream = BytesIO()
    write(stream, tensors)
    found = load(stream.getvalue())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_the_file_has_the_metadata_that_transformers_asks_for(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        write(stream, {"a": torch.ones(2)})
    with safe_open(tmp_path / "file", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_a_rank_that_cannot_write_lets_the_others_go_on() -> None:
    asked = []

    def gathered():
        for index in range(5):
            asked.append(index)
            yield str(index), torch.ones(2, dtype=torch.complex64 if index == 2 else torch.float32)

    with pytest.raises(KeyError):
        write_stream(gathered(), BytesIO(), map(str, range(5)))
    assert asked == [0, 1, 2, 3, 4]
    write_stream(gathered(), None, [])
    assert len(asked) == 10


@pytest.mark.parametrize("size", [0, 1, 40, 41, 80, 100])
def test_the_digest_is_of_the_pieces_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 40)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 16)
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    pieces = (hashlib.sha256(content[start : start + 40]).digest() for start in range(0, size, 40))
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"".join(pieces)).hexdigest()


def overwrite(file: Path) -> None:
    """Its mode keeps its owner from opening it, but not root, who gets as far as the seal."""
    with file.open("r+b", buffering=0) as stream:
        stream.write(b"x")


@in_memory
def test_nobody_can_change_published_memory(memory: PublishedWeights) -> None:
    file, digest = memory.write(1, lambda stream: write(stream, {"a": torch.ones(1000)}))
    descriptor = int(file.name)
    for change in (
        lambda: os.pwrite(descriptor, b"x", 0),
        lambda: os.ftruncate(descriptor, 10),
        lambda: os.ftruncate(descriptor, 1 << 20),
        lambda: overwrite(file),
    ):
        with pytest.raises(PermissionError):
            change()
    assert file_digest(file) == digest
    assert torch.equal(load_file(file)["a"], torch.ones(1000))
    assert file.stat().st_mode & 0o777 == 0o400
    assert not os.get_inheritable(descriptor)


@in_memory
def test_a_write_that_fails_leaves_nothing_behind(memory: PublishedWeights) -> None:
    before = set(os.listdir("/proc/self/fd"))

    def fail(stream) -> None:
        stream.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        memory.write(1, fail)
    assert set(os.listdir("/proc/self/fd")) == before


class Late:
    """An engine that keeps what it reads, and the courier of its worker; `newest` is what the trainer has said."""

    def __init__(self) -> None:
        self.newest: Weights | None = None
        self.before_read = lambda: None
        self.read, self.asked, self.loaded_versions = [], [], []

    def load_weights(self, file: Path, *, version: int) -> None:
        self.before_read()
        self.read.append(file.read_bytes())

    def newer_than(self, version: int) -> Weights | None:
        self.asked.append(version)
        return self.newest

    def loaded(self, version: int, started_s: float) -> None:
        self.loaded_versions.append(version)


@pytest.fixture(params=[pytest.param("memory", marks=in_memory), "files"])
def publish(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], Weights]]:
    published_weights = PublishedWeights(tmp_path / "weights", in_memory=request.param == "memory")

    def write_version(version: int) -> Weights:
        file, digest = published_weights.write(version, lambda stream: stream.write(f"version {version}".encode()))
        return Weights(version=version, file=str(file), digest=digest)

    yield write_version
    published_weights.close()


def test_a_worker_two_versions_late_takes_the_newest(publish: Callable[[int], Weights]) -> None:
    first, _, third = (publish(version) for version in (1, 2, 3))
    late = Late()
    late.newest = third
    generator = Generator(late, in_flight=False)
    generator.update(first, late)
    assert (late.asked, late.read, late.loaded_versions, generator.version) == ([1], [b"version 3"], [3], 3)


def test_so_does_one_whose_version_is_deleted_while_it_loads(publish: Callable[[int], Weights]) -> None:
    first, late = publish(1), Late()

    def two_more() -> None:
        late.before_read = lambda: None
        publish(2)
        late.newest = publish(3)

    late.before_read = two_more
    Generator(late, in_flight=False).update(first, late)
    if "/proc/" in first.file:  # it holds what it opened, and takes the newest next time
        assert (late.read, late.loaded_versions) == ([b"version 1"], [1])
    else:
        assert (late.asked, late.read, late.loaded_versions) == ([1], [b"version 3"], [3])


def test_without_a_later_version_the_first_error_ends_the_worker(publish: Callable[[int], Weights]) -> None:
    first, _, _ = (publish(version) for version in (1, 2, 3))
    late = Late()
    with pytest.raises(RuntimeError, match=r"^weights 1: .* (has digest|cannot be read)"):
        Generator(late, in_flight=False).update(first, late)
    assert (late.asked, late.loaded_versions) == ([1], [])


def test_a_worker_that_can_read_no_version_does_not_try_for_ever(tmp_path: Path) -> None:
    class NextIsPublished(Late):
        def newer_than(self, version: int) -> Weights:
            self.asked.append(version)
            return Weights(version=version + 1, file=str(tmp_path / "elsewhere"), digest="0" * 64)

    late = NextIsPublished()
    with pytest.raises(RuntimeError, match=r"^weights 5: .* cannot be read"):
        Generator(late, in_flight=False).update(late.newer_than(0), late)
    assert late.asked == [0, 1, 2, 3, 4]


TRAINER = """
import sys, time
from pathlib import Path
from trainer.published import PublishedWeights
weights = PublishedWeights(Path(sys.argv[1]), in_memory=True)
print(*weights.write(1, lambda stream: stream.write(bytes(1 << 20))), flush=True)
time.sleep(60)
"""


@in_memory
def test_a_killed_trainer_takes_its_weights_along(tmp_path: Path) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    file, digest = trainer.stdout.readline().split()
    assert file_digest(Path(file)) == digest  # from another process, as a worker reads it
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    assert not Path(file).exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=r"weights 1: .* cannot be read .*rollout\.weights=files"):
        Generator(None, in_flight=False).load(Weights(version=1, file=file, digest=digest))


def test_without_memory_files_they_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not permitted")

    monkeypatch.setattr(published.os, "memfd_create", refuse)
    weights = PublishedWeights(tmp_path / "weights", in_memory=True)
    assert not weights.in_memory
    file, digest = weights.write(3, lambda stream: write(stream, {"a": torch.ones(2)}))
    assert file == tmp_path / "weights" / "version_000003.safetensors"
    assert file_digest(file) == digest
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    monkeypatch.delattr(published.os, "memfd_create")
    assert not memory_is_shared()


@in_memory
def test_both_engines_take_weights_from_memory(learner_dir: Path, memory: PublishedWeights) -> None:
    tensors = model_tensors(learner_dir)
    file, digest = memory.write(4, lambda stream: write(stream, tensors))
    ModelFiles(learner_dir).check(file)
    engine = TorchEngine(learner_dir)
    generator = Generator(engine, in_flight=False)
    generator.load(Weights(version=4, file=str(file), digest=digest))
    assert (generator.version, engine.version) == (4, 4)
    assert torch.equal(engine._model.weights.embedding, tensors["model.embed_tokens.weight"])


@in_memory
def test_what_is_hashed_is_what_is_loaded(memory: PublishedWeights) -> None:
    """While a worker loads, its version is deleted and the number of the descriptor goes to another."""
    file, digest = memory.write(1, lambda stream: stream.write(b"first"))
    read = []

    class Engine:
        def load_weights(self, path: Path, *, version: int) -> None:
            memory.close()
            other, _ = memory.write(2, lambda stream: stream.write(b"second"))
            assert other == file
            read.append(path.read_bytes())

    Generator(Engine(), in_flight=False).load(Weights(version=1, file=str(file), digest=digest))
    assert read == [b"first"]


def test_a_damaged_file_is_refused(learner_dir: Path, tmp_path: Path) -> None:
    weights = PublishedWeights(tmp_path / "weights", in_memory=False)
    file, digest = weights.write(1, lambda stream: write(stream, model_tensors(learner_dir)))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    generator = Generator(TorchEngine(learner_dir), in_flight=False)
    with pytest.raises(RuntimeError, match=rf"weights 1: .* has digest [0-9a-f]{{64}}, not {digest}$"):
        generator.load(Weights(version=1, file=str(file), digest=digest))
    assert generator.version == 0
