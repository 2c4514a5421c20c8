"""New weights between two tokens: which weights drew which token, and how stale a row may be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.faults.parts import ScriptedWorker, Sink, make_completion, make_lease
from core.schema import Sampling, Source, check_spans
from rollout.engine import Request
from rollout.fingerprint import file_digest
from rollout.generation import Generator
from rollout.messages import Acknowledge, Grant, Lease, Weights
from rollout.pool import WorkerPool
from rollout.torch_engine import TorchEngine

MODELS = 3
SAMPLING = Sampling(temperature=0.8, max_tokens=20, stop_token_ids=(3,))
REQUESTS = [Request((8, 5, 9, 7), seeds=(1, 2, 3, 4)), Request((6,), seeds=(5, 6, 7, 8)), Request((4, 2), seeds=(9,))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Qwen3ForCausalLM]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=31, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=24, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return [Qwen3ForCausalLM(config).eval() for _ in range(MODELS)]


@pytest.fixture(scope="module")
def files(models: list[Qwen3ForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    models[0].save_pretrained(folder)
    paths = [folder / f"version_{i}.bin" for i in range(MODELS)]
    for model, path in zip(models, paths):
        weights = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, path)
    return paths


def engine_of(files: list[Path]) -> TorchEngine:
    return TorchEngine(files[0].parent)


def generate(engine: TorchEngine, change: Callable[[int], None]) -> dict[tuple[int, int], object]:
    """All completions; `change(step)` is called between decode steps."""
    step = 0

    def on_progress(tokens: int) -> None:
        nonlocal step
        step += 1
        change(step)

    found = engine.generate(REQUESTS, SAMPLING, on_progress=on_progress)
    return {(sampled.request, sampled.sample): sampled for sampled in found}


def test_every_token_has_the_log_prob_of_the_weights_it_is_labelled_with(
    models: list[Qwen3ForCausalLM], files: list[Path]
) -> None:
    engine = engine_of(files)

    def change(step: int) -> None:
        if step in (4, 9):
            engine.load_weights(files[1 if step == 4 else 2], version=10 + step)

    found = generate(engine, change)
    assert len(found) == 9
    assert {sampled.versions for sampled in found.values()} >= {((0, 0), (4, 14), (9, 19))}
    model_of = {0: models[0], 14: models[1], 19: models[2]}
    for (request, _), sampled in found.items():
        prompt, tokens = REQUESTS[request].prompt_ids, sampled.token_ids
        assert len(sampled.versions) == 1 + (len(tokens) > 4) + (len(tokens) > 9)
        ends = [*(start for start, _ in sampled.versions[1:]), len(tokens)]
        for (start, version), end in zip(sampled.versions, ends):
            with torch.no_grad():
                logits = model_of[version](torch.tensor([[*prompt, *tokens.tolist()]])).logits[0]
            logprobs = torch.log_softmax(logits / SAMPLING.temperature, dim=-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, torch.from_numpy(tokens).long()[:, None])[start:end, 0]
            np.testing.assert_allclose(sampled.logprobs[start:end], expected.numpy(), atol=2e-5)


def test_loading_the_same_weights_changes_no_token(files: list[Path]) -> None:
    quiet = generate(engine_of(files), lambda step: None)
    engine = engine_of(files)
    again = generate(engine, lambda step: engine.load_weights(files[0]) if step % 3 == 0 else None)
    assert any(len(sampled.versions) > 3 for sampled in again.values())
    for name, sampled in quiet.items():
        np.testing.assert_array_equal(again[name].token_ids, sampled.token_ids)
        np.testing.assert_allclose(again[name].logprobs, sampled.logprobs, atol=2e-5)
        assert sampled.versions == ((0, 0),)


class Desk:
    """What a generator sees of a courier: weights that arrive after some decode steps."""

    name = "learner-0.x"

    def __init__(self, weights: Weights, after: int) -> None:
        self.weights, self.after = weights, after
        self.steps, self.loaded_versions, self.delivered = 0, [], []

    def on_progress(self, tokens: int) -> None:
        self.steps += 1

    def newer_weights(self) -> Weights | None:
        fresh = self.steps >= self.after and self.weights.version not in self.loaded_versions
        return self.weights if fresh else None

    def loaded(self, version: int, started_s: float) -> None:
        self.loaded_versions.append(version)

    def deliver(self, completion: object) -> None:
        self.delivered.append(completion)


def short(lease: Lease) -> Lease:
    """With ids that the models here have, and long enough to be interrupted."""
    import msgspec

    return msgspec.structs.replace(lease, sampling=Sampling(temperature=1.0, max_tokens=20, stop_token_ids=()))


@pytest.mark.parametrize(
    ("source", "purpose", "in_flight", "spans"),
    [
        (Source.LEARNER, "train", True, ((0, 0), (5, 1))),
        (Source.LEARNER, "train", False, ()),
        (Source.LEARNER, "eval", True, ()),
        (Source.EXPLORER, "train", True, ()),
    ],
)
def test_only_training_leases_of_the_learner_take_weights_in_flight(
    files: list[Path], source: Source, purpose: str, in_flight: bool, spans: tuple[tuple[int, int], ...]
) -> None:
    desk = Desk(Weights(version=1, file=str(files[1]), digest=file_digest(files[1])), after=5)
    generator = Generator(engine_of(files), in_flight=in_flight)
    generator.serve(short(make_lease(source=source, purpose=purpose)), desk)
    assert len(desk.delivered) == 16
    assert {completion.spans for completion in desk.delivered} == {spans}
    assert {completion.version for completion in desk.delivered} == {0}  # the oldest
    assert (desk.loaded_versions, generator.version) == (([1], 1) if spans else ([], 0))
    for completion in desk.delivered:
        check_spans(completion)


@pytest.mark.parametrize("spans", [((1, 2),), ((0, 2), (0, 3)), ((0, 2), (2, 2)), ((0, 3), (1, 4)), ((0, 2), (3, 4))])
def test_spans_that_cannot_be_are_refused(spans: tuple[tuple[int, int], ...]) -> None:
    completion = make_completion(make_lease(), 0, 0, version=2, spans=spans, tokens=3)
    with pytest.raises(ValueError, match="do not begin with version 2"):
        check_spans(completion)
    check_spans(make_completion(make_lease(), 0, 0, version=2, spans=((0, 2), (2, 4)), tokens=3))


def test_a_staler_completion_is_rejected_counted_and_asked_for_again(
    make_pool: Callable[..., WorkerPool], sink: Sink, model: Path, files: list[Path]
) -> None:
    pool = make_pool()
    pool.publish_weights(5, files[0], file_digest(files[0]))
    worker = ScriptedWorker(pool.endpoint, role=Source.LEARNER)
    worker.enter(model)
    worker.hear(Weights)
    lease = make_lease(slots=1, samples=1, source=Source.LEARNER, version=4, step=6)
    pool.submit([lease])
    worker.hear(Grant)
    worker.say(worker.deliver(1, lease, 0, 0, version=3, spans=((0, 3), (1, 5))))
    worker.hear(Acknowledge)
    assert pool.counters()["sources"]["learner"]["rejected"] == {"stale": 1}
    assert not sink.completions
    for _ in range(4):  # beats that do not name the lease
        worker.say(worker.heartbeat(produced=1))
    assert worker.hear(Grant).lease == lease
    worker.say(worker.deliver(2, lease, 0, 0, version=4, spans=((0, 4), (1, 5))))
    sink.wait(1, pool.check)
    assert sink.completions[0].spans == ((0, 4), (1, 5))
    assert pool.counters()["balanced"]
    worker.close()
