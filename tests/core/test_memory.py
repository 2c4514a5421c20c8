from pathlib import Path

import pytest

from core.config import Config
from core.configfile import ConfigError, load_config
from core.memory import (
    GIB,
    ModelShape,
    activation_bytes,
    engine_need,
    head_bytes,
    host_bytes,
    model_shape,
    reduce_bucket,
    tokens_per_pass,
    trainer_parts,
)
from core.placement import Placement, place
from core.preflight import preflight

# Their published config.json.
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_1_7B = QWEN3_8B | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
LARGE, SMALL = model_shape(QWEN3_8B), model_shape(QWEN3_1_7B)
P = 8_190_735_360  # by hand: 2·151936·4096 + 36·(2·4096² + 2·4096·1024 + 3·4096·12288 + 2·4096 + 2·128) + 4096
PRESET = Path(__file__).resolve().parents[2] / "configs" / "qwen3_1.7b_to_8b.toml"


def config(*overrides: str) -> Config:
    return load_config(PRESET, overrides)


def test_parameter_counts_are_the_published_ones() -> None:
    assert LARGE.parameters == P
    assert SMALL.parameters == 1_720_574_976
    assert LARGE.cache_bytes(2) == 2 * 36 * 8 * 128 * 2
    internlm = model_shape({**QWEN3_8B, "model_type": "llama", "vocab_size": 92544, "intermediate_size": 14336,
                            "num_hidden_layers": 32})  # fmt: skip
    assert internlm.parameters == 7_737_708_544  # InternLM2.5-7B


def test_an_unknown_architecture_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="model_type 'mamba'"):
        model_shape({"model_type": "mamba"})


def test_plain_torch_holds_everything_on_every_rank() -> None:
    parts = trainer_parts(config(), LARGE, None, ranks=8)
    assert {name: parts[name] for name in ("weights", "gradients", "optimizer", "fp32 masters", "reference")} == {
        "weights": 2 * P, "gradients": (4 + 2) * P - 2 * 151936 * 4096, "optimizer": 8 * P, "fp32 masters": 4 * P,
        "reference": 2 * P,
    }  # fmt: skip
    single = trainer_parts(config("learner.dtype=float32", "loss.kl_coef=0"), LARGE, None, ranks=1)
    assert (single["weights"], single["gradients"], single["optimizer"]) == (4 * P, 4 * P, 8 * P)
    assert "fp32 masters" not in single
    assert "reference" not in single


def test_a_step_that_trains_in_parts_keeps_the_weights_of_pi_old() -> None:
    name = "weights of π_old"
    assert trainer_parts(config(), LARGE, None, ranks=1)[name] == 2 * P
    for words in (
        ["algorithm.stream_mini_batches=false"],
        ["algorithm.mini_batch_prompts=1024"],  # the whole step
        ["correction.learner.weight=none", "correction.learner.anchor=sampler"],
    ):
        assert name not in trainer_parts(config(*words), LARGE, None, ranks=1)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "masters"),
    [(0, 2, 6, 8, 4), (1, 2, 6, 2, 1), (2, 2, 1, 2, 1), (3, 0.5, 1, 2, 1)],
)
def test_zero_stages_shard_over_four_ranks(
    stage: int, weights: float, gradients: float, optimizer: float, masters: float
) -> None:
    parts = trainer_parts(config("learner.backend=deepspeed", f"learner.zero_stage={stage}"), LARGE, None, ranks=4)
    found = [parts[name] / P for name in ("weights", "gradients", "optimizer", "fp32 masters")]
    assert found == pytest.approx([weights, gradients, optimizer, masters])
    assert parts["reference"] == parts["weights"]  # spread as the trained model is


def test_deepspeed_reduces_through_a_bucket_no_larger_than_what_trains() -> None:
    words = ["learner.backend=deepspeed", "learner.zero_stage=2"]
    adapters = LARGE.adapter_parameters(8)
    assert reduce_bucket(P) == 500_000_000 > reduce_bucket(adapters) == adapters
    for more, bucket in (([], 500_000_000), (["learner.lora_rank=8"], adapters)):
        parts = trainer_parts(config(*words, *more), LARGE, None, ranks=2)
        assert parts["DeepSpeed buffers"] == bucket * (2 + 4)


def test_offloaded_states_are_in_host_memory() -> None:
    words = ["learner.backend=deepspeed", "learner.zero_stage=3"]
    optimizer = config(*words, "learner.offload=optimizer")
    parts = trainer_parts(optimizer, LARGE, SMALL, ranks=2)
    assert not {"optimizer", "fp32 masters"} & parts.keys()
    assert parts["explorer, scored"] == SMALL.parameters  # bf16, two ranks
    assert host_bytes(optimizer, LARGE, ranks=2) == 6 * P
    everything = config(*words, "learner.offload=parameters")
    assert "weights" not in trainer_parts(everything, LARGE, None, ranks=2)
    assert host_bytes(everything, LARGE, ranks=2) == 8 * P  # π_old's weights with the others
    whole = config(*words, "learner.offload=parameters", "algorithm.stream_mini_batches=false")
    assert host_bytes(whole, LARGE, ranks=2) == 7 * P
    assert host_bytes(config(), LARGE, ranks=2) == 0


def test_adapters_train_beside_weights_that_are_only_held() -> None:
    adapters = 32 * 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))  # rank x (inputs + outputs)
    assert LARGE.adapter_parameters(32) == adapters
    chosen = config("learner.lora_rank=32", "loss.kl_coef=0.001")
    parts = trainer_parts(chosen, LARGE, None, ranks=1)
    assert parts["weights"] == 2 * (P + adapters)
    assert (parts["gradients"], parts["optimizer"], parts["fp32 masters"]) == (6 * adapters, 8 * adapters, 4 * adapters)
    assert "reference" not in parts  # the learner without its adapters
    assert parts["head"] == head_bytes(LARGE, tokens_per_pass(chosen), 2, accumulator=False)  # frozen
    words = ("learner.backend=deepspeed", "learner.zero_stage=3", "learner.offload=optimizer", "learner.lora_rank=32")
    assert host_bytes(config(*words), LARGE, ranks=2) == 6 * adapters
    lines = preflight(chosen, place(chosen, 3), [80 * GIB] * 3, learner=LARGE, explorer=SMALL, ranks=1, vllm=True)
    assert any(line.startswith("GPU 0 (80.0 GiB)") for line in lines)  # which holds what needs ZeRO-3 otherwise


def test_activations_by_hand() -> None:
    shape = ModelShape(vocab=32, hidden=8, intermediate=16, layers=3, heads=2, kv_heads=1, head_dim=4, tied=True,
                       qk_norm=False, qkv_bias=False)  # fmt: skip
    # Per token and layer, in fp32: two norms keep their input and its fp32 form; q, k, v, rotated q and k, attention's
    # output (and, for k and v, what it reads) and its log-sum; gate, up, their activation and product; two sums.
    layer = 2 * (4 + 4) * 8 + 4 * (3 * 8 + 3 * 4) + 4 * 2 + 4 * (4 * 16 + 2 * 8)
    assert activation_bytes(shape, tokens=10, width=4, recompute="none") == 3 * 10 * layer
    assert activation_bytes(shape, tokens=10, width=4, recompute="full") == 3 * 10 * 4 * 8 + 10 * layer
    # Selective: besides the layer's input what q, k, v, o, gate, up and down write, attention's output and log-sum.
    outputs = 4 * (8 + 4 + 4 + 8 + 16 + 16 + 8 + 8) + 4 * 2
    selective = 3 * 10 * (4 * 8 + outputs) + 10 * layer
    assert activation_bytes(shape, tokens=10, width=4, recompute="selective") == selective
    # Shared by two ranks: attention's output twice, and keys and values of the one head for both of them.
    shared = layer + 4 * (8 + 2 * 4)
    assert activation_bytes(shape, tokens=10, width=4, recompute="none", sharers=2) == 3 * 10 * shared


def test_what_is_recomputed_moves_the_estimate_and_is_named_where_it_does_not_fit() -> None:
    sizes = [
        trainer_parts(config("learner.gradient_checkpointing=true", f"learner.recompute={mode}"), LARGE, None, ranks=1)
        for mode in ("full", "selective")
    ]
    assert sizes[0]["activations"] < sizes[1]["activations"]
    chosen = config("learner.gradient_checkpointing=true", "learner.recompute=selective")
    with pytest.raises(ConfigError, match=r"learner\.recompute=full"):
        preflight(chosen, place(chosen, 3), [80 * GIB] * 3, learner=LARGE, explorer=SMALL, ranks=1, vllm=True)


def test_the_head_holds_a_chunk_of_logits_and_for_deepspeed_an_fp32_accumulator() -> None:
    held = 4096 * 151936 * 2 + 2 * 1000 * 4096 * 2
    assert head_bytes(LARGE, tokens=1000, width=2) == held + 4 * 151936 * 4096
    assert head_bytes(LARGE, tokens=1000, width=2, accumulator=False) == held
    torch, deepspeed = (
        trainer_parts(config(f"learner.backend={backend}"), LARGE, None, ranks=1) for backend in ("torch", "deepspeed")
    )
    assert deepspeed["head"] - torch["head"] == 4 * 151936 * 4096
    # A tied weight keeps a bfloat16 gradient, the embedding's.
    tied = trainer_parts(config(), SMALL, None, ranks=1)
    assert tied["gradients"] == (4 + 2) * SMALL.parameters


def test_an_engine_needs_its_weights_and_a_longest_completion() -> None:
    need = engine_need(config("rollout.tensor_parallel=2"), LARGE, rows=512)
    assert need.weights == P
    assert need.sequence == (512 + 4096) * LARGE.cache_bytes(2) // 2
    assert need.rows == 512


def test_eight_gpus_of_80_gib_hold_the_preset_with_zero_3() -> None:
    chosen = config("learner.backend=deepspeed", "learner.zero_stage=3")
    placement = place(chosen, 8, ranks=4)
    lines = preflight(chosen, placement, [80 * GIB] * 8, learner=LARGE, explorer=SMALL, ranks=4, vllm=True)
    assert any(line.startswith("memory of a trainer rank: ") and "optimizer 15.3 GiB" in line for line in lines)
    assert sum(line.startswith("GPU ") for line in lines) == 6  # two are idle
    assert "GPU 4 (80.0 GiB): 72.0 GiB = 1 x learner rollout engine 72.0 GiB" in lines


def test_what_cannot_fit_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError) as raised:
        preflight(config(), place(config(), 1), [80 * GIB], learner=LARGE, explorer=SMALL, ranks=1, vllm=True)
    message = str(raised.value)
    assert "GPU 0 has 80.0 GiB and would hold" in message
    assert "learner.zero_stage=3" in message
    assert "learner.gradient_checkpointing" not in message  # the preset has it already


def test_a_share_too_small_for_the_model_is_refused() -> None:
    chosen = config("learner.backend=deepspeed", "learner.zero_stage=3", "rollout.memory_share=0.2")
    with pytest.raises(ConfigError) as raised:
        preflight(chosen, place(chosen, 8, ranks=4), [80 * GIB] * 8, learner=LARGE, explorer=SMALL, ranks=4, vllm=True)
    (line,) = str(raised.value).splitlines()
    assert line.startswith("GPU 4: a learner rollout engine may fill 16.0 GiB and needs 17.9 GiB")
    assert "rollout.tensor_parallel" in line


def test_evaluation_fits_where_training_does() -> None:
    """Four prompts a step: their 64 rows are what an engine caches at once, whatever a lease may hold."""
    chosen = config("algorithm.prompts_per_step=4", "algorithm.mini_batch_prompts=4")
    lines = preflight(chosen, Placement(), [], learner=LARGE, explorer=SMALL, ranks=1, vllm=False)
    assert sum("cache of 64 rows" in line for line in lines) == 2


def test_an_explorer_that_is_handed_over_must_hold_the_learner_too() -> None:
    words = ("learner.backend=deepspeed", "learner.zero_stage=3", "rollout.memory_share=0.2", "explorer.processes=1")
    for roles, refused in (("dedicated", ["GPU 4"]), ("handover", ["GPU 4", "GPU 5"])):
        chosen = config(*words, f"rollout.roles={roles}")
        with pytest.raises(ConfigError) as raised:
            preflight(
                chosen, place(chosen, 8, ranks=4), [80 * GIB] * 8, learner=LARGE, explorer=SMALL, ranks=4, vllm=True
            )
        assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == refused


def test_on_cpu_it_only_tells() -> None:
    lines = preflight(config(), Placement(), [], learner=LARGE, explorer=None, ranks=1, vllm=False)
    assert len(lines) == 3
    assert lines[1] == "host memory of rank 0: 30.5 GiB of published weights, two versions (rollout.weights)"
    assert lines[2].startswith("memory of a learner rollout engine: ")
    files = preflight(
        config("rollout.weights=files"), Placement(), [], learner=LARGE, explorer=None, ranks=1, vllm=False
    )
    assert files == [lines[0], lines[2]]


def test_two_versions_in_device_memory_count_on_the_gpu_of_rank_0() -> None:
    """2 x 15.3 GiB in bf16; workers read them there and hold none."""
    words = ("learner.backend=deepspeed", "learner.zero_stage=3")
    placement = place(config(*words), 8, ranks=4)

    def told(where: str, gib: int = 96) -> list[str]:
        chosen, sizes = config(*words, f"rollout.weights={where}"), [gib * GIB] * 8
        return preflight(chosen, placement, sizes, learner=LARGE, explorer=SMALL, ranks=4, vllm=True)

    memory, device = told("memory"), told("device")
    assert "memory of GPU 0 beside rank 0: 30.5 GiB of published weights, two versions (rollout.weights)" in device
    assert not any(line.startswith("host memory of rank 0") for line in device)
    changed = [line for line in device if line.startswith("GPU ") and line not in memory]
    assert [line.partition(" ")[2][0] for line in changed] == ["0"]
    assert changed[0].endswith(" + published weights 30.5 GiB")
    assert held(changed[0]) == pytest.approx(held(next(line for line in memory if "GPU 0 (" in line)) + 30.5, abs=0.11)
    with pytest.raises(ConfigError) as raised:
        told("device", 80)
    (line,) = [line for line in str(raised.value).splitlines() if line.startswith("GPU 0 has 80.0 GiB")]
    assert "published weights 30.5 GiB" in line
    assert "rollout.weights=memory" in line


def held(line: str) -> float:
    """GiB of a GPU's line."""
    return float(line.partition("): ")[2].split()[0])
