"""The embedded engine as it runs on a GPU: on one with CUDA graphs, and on CPU with a stand-in for the capture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from core.schema import Sampling
from rollout import torch_batch, torch_cache
from rollout.engine import Request, Sampled
from rollout.torch_batch import StaticBatch
from rollout.torch_engine import TorchEngine
from rollout.torch_sampling import _pick, _pick_by_blocks, draw

VOCAB, MIB = 300, 2**20
SIZE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
OTHER = {"tie_word_embeddings": True, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
REQUESTS = [
    Request((8, 5, 9, 7, 53, 15, 255), seeds=(11, 12, 13)),
    Request((3,), seeds=(2**64 - 1, 0)),
    Request((8, 5, 9, 7, 53, 15, 255), seeds=(14,)),
    Request(tuple(range(2, 24)), seeds=(5, 6)),
    *(Request((5, 6, 7 + i), seeds=tuple(range(20 * i, 20 * i + 8))) for i in range(4)),
]
ROWS = sum(len(request.seeds) for request in REQUESTS)
OPTIONS: dict[str, dict] = {
    "plain": {},
    "stops": {"stop_token_ids": tuple(range(12))},
    "warm": {"temperature": 0.7, "top_p": 0.8, "stop_token_ids": (1, 2, 3)},
    "top_k": {"top_k": 7, "kind": "raw"},
}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Build = Callable[..., TorchEngine]


class Replay:
    """Stands in for a CUDA graph: runs the step again, where every address is still that of the capture."""

    def __init__(self, batch: StaticBatch) -> None:
        self.batch, self.addresses, self.logits = batch, self.seen(batch), batch._logits

    @staticmethod
    def seen(batch: StaticBatch) -> list:
        cache = batch._cache
        tensors = [cache.keys_values, cache.bias, cache.positions, cache.slot, batch._tokens]
        return [cache.width, *((tensor.data_ptr(), tensor.shape) for tensor in tensors)]

    def replay(self) -> None:
        assert self.seen(self.batch) == self.addresses
        self.logits.copy_(self.batch._model.decode(self.batch._tokens, self.batch._cache))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def captures(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and width of every capture."""
    found: list[tuple[int, int]] = []
    real = StaticBatch._capture

    def capture(batch: StaticBatch) -> None:
        found.append((len(batch._tokens), batch._cache.width))
        if device == "cuda":
            real(batch)
        else:
            batch._logits = torch.empty_like(batch._logits)
            batch._graph = Replay(batch)

    monkeypatch.setattr(StaticBatch, "_capture", capture)
    return found


@pytest.fixture
def build(device: str, captures: list, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Makes engines with blocks so small that a tiny batch has several."""
    monkeypatch.setattr(torch_cache, "STATIC_BLOCK", 16)
    monkeypatch.setattr(torch_batch, "_PREFILL_TOKENS", 48)
    return lambda directory, **options: TorchEngine(directory, device=device, _static=True, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, PreTrainedModel]]:
    """Two of one architecture, then another."""
    found = []
    for seed, (config, model) in enumerate([(Qwen3Config, Qwen3ForCausalLM)] * 2 + [(LlamaConfig, LlamaForCausalLM)]):
        torch.manual_seed(seed)
        found.append((tmp_path_factory.mktemp("model"), model(config(**SIZE, **HEADS, **OTHER)).eval()))
        found[-1][1].save_pretrained(found[-1][0])
    return found


def sampling(**options) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_tokens": 60, "stop_token_ids": (), **options})


def by_name(completions) -> dict[tuple[int, int], Sampled]:
    return {(one.request, one.sample): one for one in completions}


def expected(model: PreTrainedModel, sampled: Sampled, temperature: float = 1.0) -> np.ndarray:
    """transformers' log-probs of the completion's tokens."""
    prompt, tokens = REQUESTS[sampled.request].prompt_ids, torch.from_numpy(sampled.token_ids).long()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("which", [0, 2])
def test_it_draws_what_the_cpu_engine_draws(models, build, captures, which: int, name: str) -> None:
    directory, terms = models[which][0], sampling(**OPTIONS[name])
    ours, theirs = (by_name(e.generate(REQUESTS, terms)) for e in (build(directory), TorchEngine(directory)))
    same = [key for key in theirs if ours[key].token_ids.tolist() == theirs[key].token_ids.tolist()]
    assert len(ours) == len(theirs) == ROWS
    assert len(same) >= ROWS - 1  # rounding may turn one draw
    for key in same:
        assert ours[key].finish == theirs[key].finish
        np.testing.assert_allclose(ours[key].logprobs, theirs[key].logprobs, atol=1e-4)
    assert len({width for _, width in captures}) > 1
    if name == "stops":
        assert len({rows for rows, _ in captures}) > 1


@pytest.mark.parametrize("which", [0, 2])
def test_logprobs_are_those_of_transformers(models, build, which: int) -> None:
    directory, model = models[which]
    for sampled in build(directory).generate(REQUESTS, sampling(temperature=0.8, stop_token_ids=tuple(range(9)))):
        np.testing.assert_allclose(sampled.logprobs, expected(model, sampled, 0.8), atol=1e-4)


def test_bfloat16_gives_nearby_logprobs(models, build) -> None:
    directory, model = models[0]
    for sampled in build(directory, dtype="bfloat16").generate(REQUESTS, sampling()):
        assert np.abs(sampled.logprobs - expected(model, sampled)).mean() < 0.15


def test_weights_that_arrive_in_the_middle(models, build, tmp_path: Path) -> None:
    tensors = {name: value for name, value in models[1][1].state_dict().items() if name != "lm_head.weight"}
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "new.safetensors")
    engine, steps = build(models[0][0]), []

    def on_progress(tokens: int) -> None:
        steps.append(tokens)
        if len(steps) == 25:
            engine.load_weights(tmp_path / "new.safetensors", version=7)

    found = list(engine.generate(REQUESTS, sampling(stop_token_ids=(1, 2, 3)), on_progress=on_progress))
    assert sum(steps) == sum(len(sampled.token_ids) for sampled in found)
    assert len(found) == ROWS
    for sampled in found:
        assert sampled.versions == (((0, 0), (25, 7)) if len(sampled.token_ids) > 25 else ((0, 0),))
        old, new = (expected(model, sampled) for _, model in models[:2])
        np.testing.assert_allclose(sampled.logprobs, np.append(old[:25], new[25:]), atol=1e-4)


def test_the_same_call_is_bit_equal(models, build) -> None:
    engine, terms = build(models[0][0]), sampling(stop_token_ids=tuple(range(9)))

    def drawn() -> list:
        return [(one[:2], one.token_ids.tobytes(), one.logprobs.tobytes()) for one in engine.generate(REQUESTS, terms)]

    first = drawn()
    list(engine.generate(REQUESTS[:2], sampling()))
    assert drawn() == first


def test_iterators_closed_early_or_used_in_turn_disturb_nothing(models, build, device: str) -> None:
    engine, terms = build(models[0][0]), sampling(stop_token_ids=tuple(range(9)))
    quiet = by_name(engine.generate(REQUESTS, terms))
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    cancelled = engine.generate(REQUESTS, terms)
    next(cancelled)
    cancelled.close()
    first, second = engine.generate(REQUESTS, terms), engine.generate(REQUESTS[:3], sampling(max_tokens=90))
    found = by_name(one for pair in zip(first, second) for one in pair[:1])
    found |= by_name(first)
    second.close()
    for name, sampled in found.items():
        assert sampled.logprobs.tobytes() == quiet[name].logprobs.tobytes()
    # A longer rotary table stays.
    assert device == "cpu" or torch.cuda.memory_allocated() <= held + MIB


def test_broken_weights_are_an_error_and_not_a_token(models, build, tmp_path: Path) -> None:
    tensors = {name: value for name, value in models[0][1].state_dict().items() if name != "lm_head.weight"}
    broken = {name: value.clone().fill_(torch.nan) for name, value in tensors.items()}
    save_file(broken, tmp_path / "nan.safetensors")
    engine = build(models[0][0])
    engine.load_weights(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        list(engine.generate(REQUESTS, sampling()))
    engine.load_weights(models[0][0] / "model.safetensors")
    assert len(list(engine.generate(REQUESTS, sampling()))) == ROWS


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_two_levels_pick_what_one_does(device: str, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    probability = (torch.randn(4000, vocabulary, generator=generator) * 3).softmax(-1)
    probability[::2, ::3] = 0
    uniform = torch.rand(4000, generator=generator, dtype=torch.float64)
    uniform[:8] = torch.tensor([2.0**-53, 1 - 2.0**-53]).double().repeat(4)
    plain, blocks = _pick(probability, uniform), _pick_by_blocks(probability.to(device), uniform.to(device)).cpu()
    assert (plain != blocks).sum() <= 1
    assert (probability.gather(-1, blocks) > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_weights_a_cache_and_the_logits_of_a_step(tmp_path: Path) -> None:
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 2048}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024}
    Qwen3ForCausalLM(Qwen3Config(**size, **heads, **OTHER)).save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, device="cuda", dtype="bfloat16")
    list(engine.generate(REQUESTS[:1], sampling(max_tokens=20)))  # workspaces of cuBLAS
    held = torch.cuda.memory_allocated()
    requests = [Request(tuple(range(i, i + 64)), seeds=tuple(range(8 * i, 8 * i + 8))) for i in range(32)]
    torch.cuda.reset_peak_memory_stats()
    list(engine.generate(requests, sampling(max_tokens=960, stop_token_ids=tuple(range(6)))))
    cache, logits = 4 * 2 * 256 * 8 * 1024 * 64 * 2, 256 * 2048 * 4
    peak = torch.cuda.max_memory_allocated()
    print(f"peak {(peak - held) / MIB:.0f} MiB above {held / MIB:.0f}, cache {cache / MIB:.0f}")
    assert peak <= held + 1.3 * cache + 4 * logits
    assert torch.cuda.memory_allocated() <= held + MIB
    assert torch.cuda.memory_reserved() <= held + 256 * MIB


def test_logits_of_one_token_draw_it(device: str) -> None:
    logits = torch.full((3, 200), -torch.inf, device=device)
    logits[:, 150] = 1.0
    noise = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64, device=device)
    tokens, logprobs = draw(logits, noise, sampling())
    assert tokens.tolist() == [150] * 3
    assert logprobs.tolist() == [0.0] * 3
