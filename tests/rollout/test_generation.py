"""How a worker takes new weights from memory of the trainer's device."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.faults.parts import make_lease
from core.schema import Sampling, Source
from rollout.engine import Request
from rollout.generation import Generator
from rollout.messages import Weights
from rollout.shared_weights import Overwritten, SharedWeights
from rollout.torch_engine import TorchEngine
from trainer.published import memory_is_shared
from trainer.weight_buffers import WeightBuffers, buffer_bytes

pytestmark = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")
SAMPLING = Sampling(temperature=0.8, max_tokens=12, stop_token_ids=(3,))
REQUESTS = [Request((8, 5, 9, 7), seeds=(1, 2, 3, 4)), Request((6,), seeds=(5, 6, 7, 8))]


def make_models(root: Path, *, tied: bool) -> list[Path]:
    """Directories of three models of one shape, and of one that has a layer more."""
    torch.manual_seed(0)
    for index in range(4):
        config = Qwen3Config(
            vocab_size=31, hidden_size=32, intermediate_size=64, num_hidden_layers=2 + index // 3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=24,
            tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(root / str(index))
    return [root / str(index) for index in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Path]]:
    return {tied: make_models(tmp_path_factory.mktemp(f"tied_{tied}"), tied=tied) for tied in (True, False)}


Publish = Callable[..., Weights]


@pytest.fixture
def publish() -> Iterator[Publish]:
    """Write a model's weights into the next buffer."""
    made: dict[Path, WeightBuffers] = {}

    def write(version: int, directory: Path, scale: float = 1.0) -> Weights:
        tensors = {name: tensor * scale for name, tensor in load_file(directory / "model.safetensors").items()}
        if directory.parent not in made:
            made[directory.parent] = WeightBuffers(2 * buffer_bytes(tensors.values()), torch.device("cpu"))
        file, digest = made[directory.parent].write(version, lambda buffer: buffer.fill(iter(tensors.items())))
        return Weights(version=version, file=str(file), digest=digest, shared=True)

    yield write
    for buffers in made.values():
        buffers.close()


def drawn(engine: TorchEngine) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """Tokens and log-probs of every completion, bit for bit."""
    found = engine.generate(REQUESTS, SAMPLING)
    return {(one.request, one.sample): (one.token_ids.tobytes(), one.logprobs.tobytes()) for one in found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_weights_draw_what_those_of_a_file_draw(
    models: dict[bool, list[Path]], publish: Publish, tied: bool, dtype: str
) -> None:
    by_file, by_memory = (TorchEngine(models[tied][0], dtype=dtype) for _ in range(2))
    before = drawn(by_memory)
    by_file.load_weights(models[tied][1] / "model.safetensors", version=5)
    weights = publish(5, models[tied][1])
    by_memory.load_shared(Path(weights.file), version=5, digest=weights.digest)
    assert by_memory.version == by_file.version == 5
    assert drawn(by_memory) == drawn(by_file) != before


def test_another_model_s_weights_change_nothing(models: dict[bool, list[Path]], publish: Publish) -> None:
    engine = TorchEngine(models[True][0])
    before = drawn(engine)
    for other in (models[True][3], models[False][0]):
        weights = publish(1, other)
        with pytest.raises(ValueError, match="not this model's weights"):
            engine.load_shared(Path(weights.file), version=1, digest=weights.digest)
    assert (engine.version, drawn(engine)) == (0, before)


def test_damaged_weights_are_no_version_of_the_engine(models: dict[bool, list[Path]], publish: Publish) -> None:
    engine = TorchEngine(models[True][0])
    weights = publish(1, models[True][1])
    with pytest.raises(RuntimeError, match=rf"weights 1: what arrived has digest .*, not {'0' * 64}"):
        engine.load_shared(Path(weights.file), version=1, digest="0" * 64)
    assert engine.version == 0


class Desk:
    """What a generator sees of a courier; `next_version` is what the trainer comes to say."""

    name = "learner-0.x"

    def __init__(self, *pending: Weights, next_version: Callable[[], Weights] | None = None) -> None:
        self.pending, self.next_version = list(pending), next_version
        self.steps, self.asked, self.loaded_versions, self.delivered = 0, [], [], []

    def on_progress(self, tokens: int) -> None:
        self.steps += 1

    def newer_weights(self) -> Weights | None:
        return self.pending.pop(0) if self.pending and self.steps >= 5 else None

    def newer_than(self, version: int) -> Weights:
        assert self.next_version is not None
        self.asked.append(version)
        return self.next_version()

    def loaded(self, version: int, started_s: float) -> None:
        self.loaded_versions.append(version)

    def deliver(self, completion: object) -> None:
        self.delivered.append(completion)


@pytest.fixture
def while_reading(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is put here happens after the first tensor of a load, one for each load."""
    events: list[Callable[[], object]] = []
    real = SharedWeights.read

    def read(weights: SharedWeights, name: str) -> torch.Tensor:
        found = real(weights, name)
        if len(weights._sums) == 1 and events:
            events.pop(0)()
        return found

    monkeypatch.setattr(SharedWeights, "read", read)
    return events


def test_what_is_written_over_while_it_is_loaded_is_loaded_anew(
    models: dict[bool, list[Path]], publish: Publish, while_reading: list[Callable[[], object]]
) -> None:
    """Twice in a row; only what is whole is said to be loaded."""
    directory = models[True][1]
    published = [publish(version, directory, 1 + version) for version in (1, 2)]
    while_reading += [lambda: published.append(publish(3, directory, 4)), lambda: publish_two()]

    def publish_two() -> None:
        published.extend(publish(version, directory, 1 + version) for version in (4, 5))

    generator = Generator(TorchEngine(models[True][0]), in_flight=True)
    desk = Desk(next_version=lambda: published[-1])
    generator.update(published[0], desk)
    assert (desk.asked, desk.loaded_versions) == ([1, 3], [5])
    assert (generator.version, generator.engine.version) == (5, 5)
    expected = load_file(directory / "model.safetensors")["model.embed_tokens.weight"] * 6
    assert torch.equal(generator.engine._model.weights.embedding, expected)


def test_without_a_courier_to_ask_it_is_an_error(
    models: dict[bool, list[Path]], publish: Publish, while_reading: list[Callable[[], object]]
) -> None:
    first, _ = publish(1, models[True][1]), publish(2, models[True][1])
    while_reading.append(lambda: publish(3, models[True][1]))
    generator = Generator(TorchEngine(models[True][0]), in_flight=True)
    with pytest.raises(Overwritten):
        generator.load(first)
    assert generator.version == 0


def test_no_token_is_drawn_from_parts_of_two_versions(
    models: dict[bool, list[Path]], publish: Publish, while_reading: list[Callable[[], object]]
) -> None:
    """Version 1 is written over while a lease in work takes it: every later token is of version 3."""
    import msgspec

    first, _ = publish(1, models[True][1]), publish(2, models[True][1])
    newest: list[Weights] = []
    while_reading.append(lambda: newest.append(publish(3, models[True][2])))
    generator = Generator(TorchEngine(models[True][0]), in_flight=True)
    desk = Desk(first, next_version=lambda: newest[-1])
    lease = make_lease(source=Source.LEARNER)
    endless = Sampling(temperature=1.0, max_tokens=12, stop_token_ids=())
    generator.serve(msgspec.structs.replace(lease, sampling=endless), desk)
    assert (desk.asked, desk.loaded_versions) == ([1], [3])
    assert {completion.spans for completion in desk.delivered} == {((0, 0), (5, 3))}
    assert torch.equal(
        generator.engine._model.weights.embedding,
        load_file(models[True][2] / "model.safetensors")["model.embed_tokens.weight"],
    )
