"""Tests of the vLLM engine with the real vLLM; run by test_vllm_engine.py in a process of their own.

Reference everywhere: transformers' logits of the same weights, in float32 on the CPU. VLLM_CASES_DEVICE=cuda runs
those marked `gpu` on a GPU:

    TRITON_INTERPRET=0 VLLM_CASES_DEVICE=cuda python -m pytest -m gpu tests/rollout/vllm_cases.py
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from core.schema import Sampling
from rollout.engine import Request, Sampled
from rollout.shared_weights import Overwritten
from rollout.vllm_engine import VllmEngine
from trainer.weight_buffers import WeightBuffers, buffer_bytes

pytestmark = [
    # vLLM's own imports and its CPU worker warn; its log level is ERROR, so nothing else shows.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

VOCAB, POSITIONS, STOP, END = 59, 512, 1, 7
DEVICE = os.environ.get("VLLM_CASES_DEVICE", "cpu")
# vLLM's attention multiplies float32 in TF32 on a GPU.
TOLERANCE = 1e-4 if DEVICE == "cpu" else 1e-2
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": POSITIONS, "initializer_range": 0.15,
    "bos_token_id": 0, "eos_token_id": END,
}  # fmt: skip
SAMPLING = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(STOP,))
PROMPTS = ((8, 5, 9, 7, 53, 15, 55), (20,), tuple(range(2, 50)))
REQUESTS = [Request(prompt, tuple(range(100 * index + 1, 100 * index + 5))) for index, prompt in enumerate(PROMPTS)]


class Family(NamedTuple):
    """An engine, the model it was started with, and two more sets of weights of the same shape."""

    engine: VllmEngine
    directory: Path
    models: list[PreTrainedModel]
    files: list[Path]


def build(root: Path, *, tied: bool) -> tuple[list[PreTrainedModel], list[Path]]:
    models, files = [], []
    for index in range(3):
        torch.manual_seed(index)
        if tied:
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
        directory = root / str(index)
        model.eval().save_pretrained(directory)
        models.append(model)
        files.append(directory / "model.safetensors")
    return models, files


def start(directory: Path, cache_bytes: int, *, dtype: str = "float32", **options: Any) -> VllmEngine:
    """On a GPU two engines share it, and compiling models of two layers would take longer than the cases."""
    room = {"cpu_cache_bytes": cache_bytes} if DEVICE == "cpu" else {"memory_share": 0.1, "enforce_eager": True}
    return VllmEngine(directory, device=DEVICE, dtype=dtype, **room, **options)


def family(root: Path, *, tied: bool) -> Iterator[Family]:
    models, files = build(root, tied=tied)
    engine = start(files[0].parent, 64 << 20)
    yield Family(engine, files[0].parent, models, files)
    engine.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield from family(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield from family(tmp_path_factory.mktemp("untied"), tied=False)


def logits_of(model: PreTrainedModel, prompt: Sequence[int], tokens: np.ndarray) -> torch.Tensor:
    """Logits [L, V] that drew each of the L tokens."""
    ids = torch.tensor([[*prompt, *tokens.tolist()]])
    with torch.inference_mode():
        return model(ids).logits[0, len(prompt) - 1 : -1]


def logprobs_of(
    model: PreTrainedModel, prompt: Sequence[int], tokens: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    scores = (logits_of(model, prompt, tokens) / temperature).log_softmax(-1)
    return scores.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].numpy()


def assert_parity(
    model: PreTrainedModel, requests: Sequence[Request], results: Sequence[Sampled], temperature: float = 1.0
) -> None:
    assert len(results) == sum(len(request.seeds) for request in requests)
    for result in results:
        expected = logprobs_of(model, requests[result.request].prompt_ids, result.token_ids, temperature)
        np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=TOLERANCE)


def by_name(results: Sequence[Sampled]) -> dict[tuple[int, int], list[int]]:
    return {(result.request, result.sample): result.token_ids.tolist() for result in results}


def check_updates(group: Family) -> None:
    """Parity with every set of weights, and back, each after the other has filled caches and packed its products."""
    long = [Request(tuple(2 + index * 7 % 50 for index in range(300)), (1, 2, 3))]
    for index in (1, 2, 0):
        group.engine.load_weights(group.files[index])
        for requests in (REQUESTS, long):
            assert_parity(group.models[index], requests, list(group.engine.generate(requests, SAMPLING)))


@pytest.mark.gpu
def test_tied_logprobs_match_transformers_before_and_after_updates(tied: Family) -> None:
    assert_parity(tied.models[0], REQUESTS, list(tied.engine.generate(REQUESTS, SAMPLING)))
    check_updates(tied)


@pytest.mark.gpu
def test_untied_logprobs_match_transformers_before_and_after_updates(untied: Family) -> None:
    assert_parity(untied.models[0], REQUESTS, list(untied.engine.generate(REQUESTS, SAMPLING)))
    check_updates(untied)


@pytest.mark.gpu
def test_results_have_the_protocol_types(tied: Family) -> None:
    assert tied.engine.vocab_size == VOCAB
    results = list(tied.engine.generate(REQUESTS, SAMPLING))
    assert sorted(by_name(results)) == [(request, sample) for request in range(3) for sample in range(4)]
    for result in results:
        assert isinstance(result, Sampled)
        assert (result.token_ids.dtype, result.logprobs.dtype) == (np.int32, np.float32)
        assert result.token_ids.shape == result.logprobs.shape
    assert list(tied.engine.generate([], SAMPLING)) == []
    assert list(tied.engine.generate([Request((5,), ())], SAMPLING)) == []


@pytest.mark.gpu
def test_processed_logprobs_are_at_the_sampling_temperature(tied: Family) -> None:
    sampling = Sampling(temperature=0.7, max_tokens=24, stop_token_ids=())
    assert_parity(tied.models[0], REQUESTS, list(tied.engine.generate(REQUESTS, sampling)), temperature=0.7)


def kept(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits with the tokens outside top-k, then outside top-p, at minus infinity."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    return logits.masked_fill(outside.gather(1, order.argsort(-1)), -torch.inf)


def check_truncated(group: Family, top_p: float, top_k: int) -> None:
    sampling = Sampling(temperature=0.9, top_p=top_p, top_k=top_k, max_tokens=24, stop_token_ids=())
    for result in group.engine.generate(REQUESTS, sampling):
        logits = logits_of(group.models[0], REQUESTS[result.request].prompt_ids, result.token_ids)
        scores = kept(logits, sampling).log_softmax(-1)
        expected = scores.gather(1, torch.from_numpy(result.token_ids.astype(np.int64))[:, None])[:, 0].numpy()
        np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=TOLERANCE)
        assert (
            np.abs(
                result.logprobs
                - logprobs_of(group.models[0], REQUESTS[result.request].prompt_ids, result.token_ids, 0.9)
            ).max()
            > 0.01
        )


@pytest.mark.gpu
def test_top_p_and_top_k_logprobs_are_renormalised(tied: Family) -> None:
    check_truncated(tied, 0.8, 0)
    check_truncated(tied, 1.0, 5)
    check_truncated(tied, 0.9, 8)


@pytest.mark.gpu
def test_a_completion_is_a_function_of_its_seed(tied: Family) -> None:
    first, again = (list(tied.engine.generate(REQUESTS, SAMPLING)) for _ in range(2))
    assert by_name(first) == by_name(again)
    bits = [{(r.request, r.sample): r.logprobs.tobytes() for r in results} for results in (first, again)]
    assert bits[0] == bits[1]
    alone = list(tied.engine.generate([Request(PROMPTS[0], (3,))], SAMPLING))
    assert by_name(alone)[0, 0] == by_name(first)[0, 2]
    large = list(tied.engine.generate([Request(PROMPTS[0], (2**64 - 1, 0, 2**63, 2**64 - 1))], SAMPLING))
    tokens = by_name(large)
    assert tokens[0, 0] == tokens[0, 3] != tokens[0, 1]


@pytest.mark.gpu
def test_first_tokens_follow_the_distribution(tied: Family) -> None:
    count = 3000
    sampling = Sampling(temperature=1.3, max_tokens=1, stop_token_ids=())
    seeds = tuple(np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64).tolist())
    drawn = [int(r.token_ids[0]) for r in tied.engine.generate([Request(PROMPTS[0], seeds)], sampling)]
    logits = logits_of(tied.models[0], PROMPTS[0], np.array([0], np.int32))[0]
    expected = (logits / 1.3).softmax(-1).numpy()
    observed = np.bincount(drawn, minlength=VOCAB) / count
    assert (np.abs(observed - expected) < 4.5 * np.sqrt(expected / count) + 1 / count).all()


@pytest.mark.gpu
def test_stop_tokens_and_lengths(tied: Family) -> None:
    requests = [Request(PROMPTS[0], tuple(range(40)))]
    sampling = Sampling(temperature=1.5, max_tokens=20, stop_token_ids=(STOP, 3))
    results = list(tied.engine.generate(requests, sampling))
    assert {result.finish for result in results} == {"stop", "length"}
    for result in results:
        stops = np.isin(result.token_ids, (STOP, 3))
        assert not stops[:-1].any()
        assert stops[-1] == (result.finish == "stop")
        assert result.finish == "stop" or len(result.token_ids) == 20
    config = json.loads((tied.directory / "generation_config.json").read_text())
    assert config["eos_token_id"] == END
    assert any(END in result.token_ids[:-1] for result in results), "the model's own end token must not stop anything"


@pytest.mark.gpu
def test_completions_come_as_they_finish_and_every_step_is_reported(tied: Family) -> None:
    steps: list[int] = []
    arrived: list[tuple[int, int]] = []
    sampling = Sampling(temperature=1.5, max_tokens=60, stop_token_ids=(STOP, 3, 4))
    requests = [Request(PROMPTS[0], tuple(range(30)))]
    for result in tied.engine.generate(requests, sampling, on_progress=steps.append):
        arrived.append((len(steps), len(result.token_ids)))
    assert all(step == length for step, length in arrived)
    assert len({step for step, _ in arrived}) > 5
    assert sum(steps) == sum(length for _, length in arrived)
    assert steps[0] == 30


def count_switched(
    group: Family, requests: Sequence[Request], results: Sequence[Sampled], which: dict[int, int]
) -> int:
    """Completions that saw new weights, after a check that each stretch of tokens has its own weights' log-probs."""
    for result in results:
        starts = [start for start, _ in result.versions]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        for (start, version), end in zip(result.versions, [*starts[1:], len(result.token_ids)]):
            model = group.models[which[version]]
            expected = logprobs_of(model, requests[result.request].prompt_ids, result.token_ids)[start:end]
            np.testing.assert_allclose(result.logprobs[start:end], expected, rtol=0, atol=TOLERANCE)
    return sum(len(result.versions) > 1 for result in results)


def check_update_in_flight(group: Family) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=40, stop_token_ids=(STOP,))
    requests = [*REQUESTS, Request(tuple(2 + index * 7 % 50 for index in range(200)), (1, 2))]
    group.engine.load_weights(group.files[0], version=10)
    steps = 0

    def on_progress(tokens: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 8:
            group.engine.load_weights(group.files[1], version=11)
        if steps == 20:
            group.engine.load_weights(group.files[2], version=15)

    results = list(group.engine.generate(requests, sampling, on_progress=on_progress))
    assert len(results) == 14
    assert count_switched(group, requests, results, {10: 0, 11: 1, 15: 2}) > 7
    longest = max(results, key=lambda result: len(result.token_ids))
    assert longest.versions == ((0, 10), (8, 11), (20, 15))
    group.engine.load_weights(group.files[0])
    assert group.engine.version == 16
    assert_parity(group.models[0], REQUESTS, list(group.engine.generate(REQUESTS, SAMPLING)))


@pytest.mark.gpu
def test_tied_weights_change_between_two_tokens(tied: Family) -> None:
    check_update_in_flight(tied)


@pytest.mark.gpu
def test_untied_weights_change_between_two_tokens(untied: Family) -> None:
    check_update_in_flight(untied)


@pytest.mark.gpu
def test_weights_change_between_two_completions(tied: Family) -> None:
    sampling = Sampling(temperature=1.5, max_tokens=60, stop_token_ids=(STOP, 3, 4))
    requests = [Request(PROMPTS[0], tuple(range(20)))]
    tied.engine.load_weights(tied.files[0], version=0)
    iterator = tied.engine.generate(requests, sampling)
    results = [next(iterator)]
    tied.engine.load_weights(tied.files[1], version=1)
    results += iterator
    tied.engine.load_weights(tied.files[0], version=2)
    assert len(results) == 20
    assert results[0].versions == ((0, 0),)
    assert sum(len(result.versions) == 2 for result in results) > 10


def test_reloads_do_not_grow_memory(tied: Family) -> None:
    process = psutil.Process()

    def reload_and_measure(times: int) -> int:
        for index in range(times):
            tied.engine.load_weights(tied.files[index % 3])
            assert len(list(tied.engine.generate(REQUESTS, SAMPLING))) == 12
        return int(process.memory_info().rss)

    settled = reload_and_measure(6)
    grown = reload_and_measure(20) - settled
    tied.engine.load_weights(tied.files[0])
    assert grown < 4e6, f"20 reloads of a model of 0.9 MB took {grown} bytes"


def check_shared_weights(group: Family) -> None:
    """What a buffer gives is what the file gives; what was written over or is damaged is told. On the CPU only: a
    process cannot open the GPU memory that it exported itself."""
    tensors = [load_file(file, device=DEVICE) for file in group.files]
    buffers = WeightBuffers(buffer_bytes(tensors[0].values()), torch.device(DEVICE))
    published = {}
    for version, index in ((21, 1), (22, 2), (23, 0)):
        file, digest = buffers.write(version, lambda buffer, index=index: buffer.fill(iter(tensors[index].items())))
        published[version] = {"file": file, "version": version, "digest": digest}
        group.engine.load_shared(**published[version])
        assert group.engine.version == version
        found = list(group.engine.generate(REQUESTS, SAMPLING))
        assert_parity(group.models[index], REQUESTS, found)
        group.engine.load_weights(group.files[index], version=version)
        assert by_name(list(group.engine.generate(REQUESTS, SAMPLING))) == by_name(found)
    with pytest.raises(RuntimeError, match="weights 22: what arrived has digest"):
        group.engine.load_shared(**published[22] | {"digest": "0" * 64})
    with pytest.raises(Overwritten):
        group.engine.load_shared(**published[21])
    group.engine.load_shared(**published[23])
    assert_parity(group.models[0], REQUESTS, list(group.engine.generate(REQUESTS, SAMPLING)))
    buffers.close()
    with pytest.raises(RuntimeError, match=r"cannot be read .*rollout\.weights=memory"):
        group.engine.load_shared(**published[23])


def test_tied_weights_come_from_memory_of_the_trainer_s_device(tied: Family) -> None:
    check_shared_weights(tied)


def test_untied_weights_come_from_memory_of_the_trainer_s_device(untied: Family) -> None:
    check_shared_weights(untied)


@pytest.mark.gpu
def test_refused_weights_change_nothing(tied: Family, untied: Family, tmp_path: Path) -> None:
    before = by_name(list(tied.engine.generate(REQUESTS, SAMPLING)))
    tensors = load_file(tied.files[1])
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "missing.safetensors")
    save_file(tensors | {name: tensors[name].T.contiguous()}, tmp_path / "shape.safetensors")
    save_file(tensors | {"model.extra": tensors[name].clone()}, tmp_path / "unknown.safetensors")
    headless = {key: value for key, value in load_file(untied.files[1]).items() if key != "lm_head.weight"}
    save_file(headless, tmp_path / "headless.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "short.safetensors").write_bytes(tied.files[1].read_bytes()[:-100])
    for file, message in {
        "missing": r"missing \['model.layers.1.mlp.down_proj.weight'\]",
        "shape": r"down_proj.weight has shape \[192, 96\]",
        "unknown": r"unknown \['model.extra'\]",
        "text": "not a readable safetensors file",
        "short": "not a readable safetensors file",
        "none": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            tied.engine.load_weights(tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        untied.engine.load_weights(tmp_path / "headless.safetensors")
    assert by_name(list(tied.engine.generate(REQUESTS, SAMPLING))) == before


def test_a_tied_matrix_may_be_stored_twice(tied: Family, tmp_path: Path) -> None:
    tensors = load_file(tied.files[1])
    file = tmp_path / "twice.safetensors"
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    tied.engine.load_weights(file)
    assert_parity(tied.models[1], REQUESTS, list(tied.engine.generate(REQUESTS, SAMPLING)))
    tied.engine.load_weights(tied.files[0])


@pytest.mark.gpu
def test_broken_weights_are_noticed(tied: Family, tmp_path: Path) -> None:
    tensors = load_file(tied.files[0])
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    tied.engine.load_weights(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        list(tied.engine.generate(REQUESTS, SAMPLING))
    tied.engine.load_weights(tied.files[0])
    assert_parity(tied.models[0], REQUESTS, list(tied.engine.generate(REQUESTS, SAMPLING)))


def test_bad_requests_are_refused(tied: Family) -> None:
    generate = tied.engine.generate
    for request, message in {
        Request((), (1,)): "empty prompt", Request((5, VOCAB), (1,)): "not all in 0 … 58",
        Request((-1,), (1,)): "not all in 0 … 58", Request((5,) * 489, (1,)): "489 prompt [+] 24 new tokens exceed",
        Request((5,), (2**64,)): "a seed is outside", Request((5,), (-1,)): "a seed is outside",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            generate([REQUESTS[0], request], SAMPLING)
    with pytest.raises(ValueError, match=r"temperature 0.001 is below 0.01"):
        generate(REQUESTS, Sampling(temperature=0.001, max_tokens=4, stop_token_ids=()))
    assert len(list(generate([Request((5,) * 488, (1,))], SAMPLING))) == 1


@pytest.mark.gpu
def test_an_iterator_may_be_left_but_not_shared(tied: Family) -> None:
    iterator = tied.engine.generate(REQUESTS, SAMPLING)
    next(iterator)
    with pytest.raises(ValueError, match="another iterator"):
        next(tied.engine.generate(REQUESTS, SAMPLING))
    iterator.close()
    assert_parity(tied.models[0], REQUESTS, list(tied.engine.generate(REQUESTS, SAMPLING)))


def test_bad_arguments_are_refused(tied: Family, tmp_path: Path) -> None:
    for arguments, message in (
        ({"device": "cuda"}, "the installed vLLM is for 'cpu'"), ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"dtype": "float64"}, "not one of"), ({"max_model_len": 513}, "outside 2 … 512"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            VllmEngine(tied.directory, **({"device": "cpu", "dtype": "float32"} | arguments))
    with pytest.raises(ValueError, match=r"has no config.json"):
        VllmEngine(tmp_path, device="cpu", dtype="float32")


# Closing an engine ends all that vLLM has in the process: the cases below start theirs when the shared ones are closed.


@pytest.fixture(scope="module")
def closed(tied: Family, untied: Family) -> Family:
    tied.engine.close()
    untied.engine.close()
    return tied


def test_the_process_is_left_alone(closed: Family) -> None:
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not psutil.Process().children(recursive=True)


@pytest.mark.gpu
def test_raw_logprobs_are_without_temperature(closed: Family) -> None:
    engine = start(closed.directory, 16 << 20, kind="raw")
    sampling = Sampling(temperature=0.6, max_tokens=24, stop_token_ids=(STOP,), kind="raw")
    assert_parity(closed.models[0], REQUESTS, list(engine.generate(REQUESTS, sampling)))
    with pytest.raises(ValueError, match=r"gives raw log-probs, not processed"):
        engine.generate(REQUESTS, SAMPLING)
    engine.close()


def test_waiting_and_preempted_rows_are_exact(closed: Family) -> None:
    # Keys and values of 3 blocks of 128 tokens for 5 rows that need 2 blocks each: rows wait, and running ones are
    # preempted and computed again.
    engine = VllmEngine(
        closed.directory, device="cpu", dtype="float32", max_model_len=256, max_rows=4, cpu_cache_bytes=400_000
    )
    requests = [Request(PROMPTS[0], tuple(range(5)))]
    sampling = Sampling(temperature=1.0, max_tokens=140, stop_token_ids=())
    assert_parity(closed.models[0], requests, list(engine.generate(requests, sampling)))
    engine.close()


@pytest.mark.gpu
def test_bfloat16_stays_near_float32(closed: Family) -> None:
    engine = start(closed.directory, 16 << 20, dtype="bfloat16")
    for index in (0, 1):
        engine.load_weights(closed.files[index])
        for result in engine.generate(REQUESTS, SAMPLING):
            expected = logprobs_of(closed.models[index], REQUESTS[result.request].prompt_ids, result.token_ids)
            assert np.abs(result.logprobs - expected).mean() < 0.1
    engine.close()


def test_tensor_parallel_workers_take_their_parts_of_new_weights(closed: Family) -> None:
    engine = VllmEngine(
        closed.directory, device="cpu", dtype="float32", tensor_parallel_size=2, cpu_cache_bytes=32 << 20
    )
    group = closed._replace(engine=engine)
    assert_parity(closed.models[0], REQUESTS, list(engine.generate(REQUESTS, SAMPLING)))
    check_updates(group)
    check_update_in_flight(group)
    check_shared_weights(group)
    engine.close()
    assert not [child for child in psutil.Process().children() if "Worker" in child.name()]
