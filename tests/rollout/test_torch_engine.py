"""The embedded engine against transformers' own Qwen3 and Llama, and its promises about seeds and determinism."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from core.schema import Sampling
from rollout.engine import Request, Sampled
from rollout.torch_engine import TorchEngine
from rollout.torch_sampling import draw, row_keys, truncate, uniforms

VOCAB = 59
CONFIGS = {
    "qwen3_tied": (Qwen3Config, {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_grouped_untied": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}),
    "llama_grouped": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 500.0}),
}
MIXED = [
    Request((8, 5, 9, 7, 53, 15, 55), seeds=(11, 12, 13)),
    Request((3,), seeds=(2**64 - 1, 0)),
    Request((8, 5, 9, 7, 53, 15, 55), seeds=(14,)),
    Request(tuple(range(2, 24)), seeds=(5, 6)),
]


def save_model(name: str, directory: Path, *, seed: int = 0) -> PreTrainedModel:
    config_class, options = CONFIGS[name]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=40 if config_class is Qwen3Config else 64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(seed)
    model = (Qwen3ForCausalLM if config_class is Qwen3Config else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    base = tmp_path_factory.mktemp("models")
    return {name: (base / name, save_model(name, base / name)) for name in CONFIGS}


@pytest.fixture(scope="module")
def engine(models) -> TorchEngine:
    return TorchEngine(models["qwen3_tied"][0])


def sampling(**options) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_tokens": 20, "stop_token_ids": (), **options})


def by_name(completions) -> dict[tuple[int, int], Sampled]:
    return {(c.request, c.sample): c for c in completions}


def teacher_forced(model: PreTrainedModel, prompt, tokens) -> torch.Tensor:
    """Logits [L, V] that transformers gives for each sampled token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]], dtype=torch.int64)).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def kept_only(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The plain definition, one row at a time."""
    out = torch.full_like(logits, -torch.inf)
    for row, values in enumerate(logits):
        order = values.argsort(descending=True)
        if top_k:
            order = order[:top_k]
        mass = values[order].double().softmax(0)
        before = mass.cumsum(0) - mass
        order = order[before < top_p]
        out[row, order] = values[order]
    return out


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.8, "kind": "raw"},
    ],
)
def test_logprobs_are_those_of_transformers(models, name, options):
    directory, model = models[name]
    terms = sampling(**options)
    completions = list(TorchEngine(directory).generate(MIXED, terms))
    assert len(completions) == 8
    for completion in completions:
        prompt = MIXED[completion.request].prompt_ids
        logits = teacher_forced(model, prompt, completion.token_ids)
        if terms.kind == "processed":
            logits = kept_only(logits / terms.temperature, terms.top_p, terms.top_k)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids).long()[:, None])[:, 0]
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-4)


def test_cold_sampling_is_transformers_greedy_decoding(models):
    directory, model = models["qwen3_grouped_untied"]
    prompts = torch.randint(2, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
    requests = [Request(tuple(row.tolist()), seeds=(3,)) for row in prompts]
    ours = by_name(TorchEngine(directory).generate(requests, sampling(temperature=1e-4)))
    with torch.no_grad():
        theirs = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
    for row in range(4):
        assert ours[row, 0].token_ids.tolist() == theirs[row, 6:].tolist()


def test_the_cache_grows_over_many_blocks(models):
    directory, model = models["qwen3_grouped_untied"]
    (completion,) = TorchEngine(directory).generate([Request((4, 5), seeds=(9,))], sampling(max_tokens=94))
    logits = teacher_forced(model, (4, 5), completion.token_ids)
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids).long()[:, None])[:, 0]
    assert len(completion.token_ids) == 94
    np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-4)


def test_stop_tokens_end_a_completion_and_are_part_of_it(engine):
    free = by_name(engine.generate(MIXED, sampling(max_tokens=30)))
    stops = (7, 8, 9)
    stopped = by_name(engine.generate(MIXED, sampling(max_tokens=30, stop_token_ids=stops)))
    finishes = set()
    for name, completion in stopped.items():
        tokens = completion.token_ids.tolist()
        finishes.add(completion.finish)
        assert tokens == free[name].token_ids[: len(tokens)].tolist()
        np.testing.assert_allclose(completion.logprobs, free[name].logprobs[: len(tokens)], atol=1e-4)
        assert not set(tokens[:-1]) & set(stops)
        assert (tokens[-1] in stops) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(tokens) == 30
    assert finishes == {"stop", "length"}
    assert {c.finish for c in free.values()} == {"length"}


def test_a_stop_token_in_the_last_place_is_a_stop(engine):
    free = by_name(engine.generate(MIXED[:1], sampling(max_tokens=1)))
    stop = int(free[0, 0].token_ids[0])
    assert by_name(engine.generate(MIXED[:1], sampling(max_tokens=1, stop_token_ids=(stop,))))[0, 0].finish == "stop"


def test_rows_that_finish_leave_and_the_others_stay_what_they_are(engine):
    requests = [Request((5, 6, 7 + i % 3), seeds=tuple(range(20 * i, 20 * i + 20))) for i in range(6)]
    terms = sampling(max_tokens=40, stop_token_ids=(1, 2, 3, 4, 5, 6))
    finished = list(engine.generate(requests, terms))
    lengths = [len(c.token_ids) for c in finished]
    assert lengths == sorted(lengths)
    assert len(by_name(finished)) == 120
    full = by_name(engine.generate(requests, sampling(max_tokens=40)))
    for completion in finished:
        reference = full[completion.request, completion.sample]
        assert completion.token_ids.tolist() == reference.token_ids[: len(completion.token_ids)].tolist()
        np.testing.assert_allclose(completion.logprobs, reference.logprobs[: len(completion.logprobs)], atol=1e-4)


def test_the_same_lease_is_bit_equal_also_in_a_fresh_process(models, engine, tmp_path):
    terms = sampling(max_tokens=24, stop_token_ids=(1, 2))
    requests = [Request((8, 5, 9, i), seeds=tuple(range(100 * i, 100 * i + 8))) for i in range(16)]
    first = list(engine.generate(requests, terms))
    list(engine.generate(MIXED, terms))
    again = list(engine.generate(requests, terms))
    script = (
        "import sys, numpy, torch; from pathlib import Path; from core.schema import Sampling\n"
        "from rollout.engine import Request; from rollout.torch_engine import TorchEngine\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "requests = [Request((8, 5, 9, i), seeds=tuple(range(100 * i, 100 * i + 8))) for i in range(16)]\n"
        "terms = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=(1, 2))\n"
        "done = list(TorchEngine(Path(sys.argv[1])).generate(requests, terms))\n"
        "sys.stdout.write(b''.join(c.token_ids.tobytes() + c.logprobs.tobytes() for c in done).hex())\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", script, str(models["qwen3_tied"][0])],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    def as_bytes(completions):
        return b"".join(c.token_ids.tobytes() + c.logprobs.tobytes() for c in completions)

    assert as_bytes(again) == as_bytes(first)
    assert fresh.stdout == as_bytes(first).hex()
    assert [c[:2] for c in again] == [c[:2] for c in first]


def test_another_batch_gives_the_same_completion_up_to_rounding(engine):
    together = by_name(engine.generate(MIXED, sampling()))
    for index, request in enumerate(MIXED):
        for sample, seed in enumerate(request.seeds):
            (alone,) = engine.generate([Request(request.prompt_ids, seeds=(seed,))], sampling())
            assert alone.token_ids.tolist() == together[index, sample].token_ids.tolist()
            np.testing.assert_allclose(alone.logprobs, together[index, sample].logprobs, atol=1e-4)


def test_seeds_decide_the_completion(engine):
    request = Request((8, 5, 9), seeds=(1, 1, 2, 3, 2**63, 2**63 + 1))
    completions = by_name(engine.generate([request], sampling()))
    drawn = [tuple(completions[0, sample].token_ids.tolist()) for sample in range(6)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 5


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """In standard deviations above its mean; bins of fewer than 5 expected are merged."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 5:
        counts = np.append(counts[:-2], counts[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}])
def test_frequencies_are_the_softmax(models, engine, options):
    prompt, samples = (8, 5, 9), 20_000
    terms = sampling(max_tokens=1, **options)
    completions = list(engine.generate([Request(prompt, seeds=tuple(range(samples)))], terms))
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=VOCAB)
    logits = teacher_forced(models["qwen3_tied"][1], prompt, (0,)) / terms.temperature
    probabilities = kept_only(logits, terms.top_p, terms.top_k).double().softmax(-1)[0].numpy()
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts, probabilities) < 4


def test_later_tokens_follow_the_softmax_too(models, engine):
    samples = 6000
    completions = list(engine.generate([Request((8, 5, 9), seeds=tuple(range(samples)))], sampling(max_tokens=3)))
    firsts = [int(c.token_ids[0]) for c in completions]
    common = max(set(firsts), key=firsts.count)
    seconds = [int(c.token_ids[1]) for c in completions if c.token_ids[0] == common]
    logits = teacher_forced(models["qwen3_tied"][1], (8, 5, 9, common), (0,))
    probabilities = logits.double().softmax(-1)[0].numpy()
    assert len(seconds) > 200
    assert chi_square(np.bincount(seconds, minlength=VOCAB), probabilities) < 4


def test_noise_is_uniform_inside_the_open_interval_and_unrelated_between_neighbours():
    keys = row_keys(np.arange(50_000, dtype=np.uint64))
    now, later = uniforms(keys, range(2))
    assert np.array_equal(uniforms(keys[7:9], range(1, 5))[0], later[7:9])
    assert 0 < now.min() < 1e-3 < 0.999 < now.max() < 1
    assert abs(now.mean() - 0.5) < 0.006
    counts = np.histogram(now, bins=100, range=(0, 1))[0]
    assert chi_square(counts, np.full(100, 0.01)) < 4
    assert abs(np.corrcoef(now, later)[0, 1]) < 0.02
    assert abs(np.corrcoef(now[:-1], now[1:])[0, 1]) < 0.02
    assert len(np.unique(now)) == len(now)


def test_the_extremes_of_the_noise_draw_a_token_of_positive_probability():
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 1], logits[:, 3] = 0.3, -0.2
    extremes = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, extremes, sampling())
    assert tokens.tolist() == [1, 3]
    assert torch.isfinite(logprobs).all()


def test_truncation_keeps_at_least_the_best_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 5.0]])
    assert torch.isfinite(truncate(logits, top_k=1, top_p=1.0)).sum(-1).tolist() == [1, 3]
    assert torch.isfinite(truncate(logits, top_k=0, top_p=1e-6)).sum(-1).tolist() == [1, 1]
    assert torch.equal(truncate(logits, top_k=0, top_p=1.0), logits)
    assert torch.equal(truncate(logits, top_k=3, top_p=1.0), logits)


def test_progress_counts_every_token_drawn(engine):
    drawn = []
    completions = list(engine.generate(MIXED, sampling(stop_token_ids=(7, 8, 9)), on_progress=drawn.append))
    assert sum(drawn) == sum(len(c.token_ids) for c in completions)
    assert drawn[0] == 8


def test_nothing_asked_nothing_drawn(engine):
    assert list(engine.generate([], sampling())) == []
    assert list(engine.generate([Request((5,), seeds=())], sampling())) == []


def test_loaded_weights_replace_the_old_ones(models, tmp_path):
    directory, old = models["qwen3_tied"]
    new = save_model("qwen3_tied", tmp_path / "new", seed=1)
    engine = TorchEngine(directory)
    before = by_name(engine.generate(MIXED, sampling()))
    engine.load_weights(tmp_path / "new" / "model.safetensors")
    (sampled,) = engine.generate([Request((8, 5), seeds=(4,))], sampling())
    expected = teacher_forced(new, (8, 5), sampled.token_ids).log_softmax(-1)
    expected = expected.gather(-1, torch.tensor(sampled.token_ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(sampled.logprobs, expected.numpy(), atol=1e-4)
    engine.load_weights(directory / "model.safetensors")
    after = by_name(engine.generate(MIXED, sampling()))
    assert all(after[name].logprobs.tobytes() == before[name].logprobs.tobytes() for name in before)
    assert old is not new


def test_a_file_that_stores_the_tied_head_twice_is_read(models, tmp_path):
    directory = models["qwen3_tied"][0]
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "w.safetensors")
    engine = TorchEngine(directory)
    before = by_name(engine.generate(MIXED, sampling()))
    engine.load_weights(tmp_path / "w.safetensors")
    assert by_name(engine.generate(MIXED, sampling()))[0, 0].token_ids.tolist() == before[0, 0].token_ids.tolist()


def test_refused_weights_change_nothing(models, tmp_path):
    directory = models["qwen3_tied"][0]
    engine = TorchEngine(directory)
    before = by_name(engine.generate(MIXED, sampling()))
    tensors = {name: tensor + 1 for name, tensor in load_file(directory / "model.safetensors").items()}
    name = "model.layers.1.mlp.down_proj.weight"
    files = {
        "missing": {key: value for key, value in tensors.items() if key != name},
        "unknown": {**tensors, "model.layers.9.mlp.down_proj.weight": tensors[name].clone()},
        "shape": {**tensors, name: tensors[name].T.contiguous()},
    }
    for problem, content in files.items():
        save_file(content, tmp_path / f"{problem}.safetensors")
        with pytest.raises(ValueError, match=problem):
            engine.load_weights(tmp_path / f"{problem}.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        engine.load_weights(tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="not a readable"):
        engine.load_weights(tmp_path / "broken.safetensors")
    after = by_name(engine.generate(MIXED, sampling()))
    assert all(after[key].logprobs.tobytes() == before[key].logprobs.tobytes() for key in before)


def test_sharded_weights_are_read(models, tmp_path):
    directory, model = models["qwen3_grouped_untied"]
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded = by_name(TorchEngine(tmp_path).generate(MIXED, sampling()))
    whole = by_name(TorchEngine(directory).generate(MIXED, sampling()))
    assert all(sharded[key].logprobs.tobytes() == whole[key].logprobs.tobytes() for key in whole)


def test_broken_weights_are_an_error_and_not_a_token(models, tmp_path):
    directory = models["qwen3_tied"][0]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    engine = TorchEngine(directory)
    engine.load_weights(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        list(engine.generate(MIXED, sampling()))
    engine.load_weights(directory / "model.safetensors")
    assert len(list(engine.generate(MIXED, sampling()))) == 8


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), seeds=(1,)), "empty prompt"),
        (Request((5, VOCAB), seeds=(1,)), "vocabulary"),
        (Request((-1,), seeds=(1,)), "vocabulary"),
        (Request((5,) * 80, seeds=(1,)), "96 positions"),
        (Request((5,), seeds=(2**64,)), "seed"),
        (Request((5,), seeds=(-1,)), "seed"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_drawn(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([Request((5,), seeds=(1,)), request_], sampling())


def test_a_stop_token_that_cannot_be_drawn_is_refused(engine):
    with pytest.raises(ValueError, match="stop tokens"):
        engine.generate(MIXED, sampling(stop_token_ids=(1, VOCAB)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"architectures": None}, "not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_models_it_cannot_run_are_refused_by_name(models, tmp_path, change, message):
    config = json.loads((models["qwen3_tied"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        TorchEngine(tmp_path)


def test_missing_files_and_keys_are_named(models, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        TorchEngine(tmp_path)
    config = json.loads((models["qwen3_tied"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TorchEngine(tmp_path)
    del config["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="intermediate_size"):
        TorchEngine(tmp_path)
    with pytest.raises(ValueError, match="float8"):
        TorchEngine(models["qwen3_tied"][0], dtype="float8")


def test_a_configuration_of_transformers_4_is_read(models, tmp_path):
    directory, _ = models["llama_tied"]
    config = json.loads((directory / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    old = by_name(TorchEngine(tmp_path).generate(MIXED, sampling()))
    new = by_name(TorchEngine(directory).generate(MIXED, sampling()))
    assert all(old[key].logprobs.tobytes() == new[key].logprobs.tobytes() for key in new)


def test_bfloat16_weights_give_nearby_logprobs(models):
    directory, model = models["qwen3_grouped_untied"]
    completions = list(TorchEngine(directory, dtype="bfloat16").generate(MIXED, sampling()))
    for completion in completions:
        logits = teacher_forced(model, MIXED[completion.request].prompt_ids, completion.token_ids)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids).long()[:, None])[:, 0]
        assert np.abs(completion.logprobs - expected.numpy()).mean() < 0.1


def test_a_closed_engine_holds_no_weights(models):
    engine = TorchEngine(models["qwen3_tied"][0])
    engine.close()
    with pytest.raises(AttributeError):
        engine.generate(MIXED, sampling())
