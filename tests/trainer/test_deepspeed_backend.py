"""Real DeepSpeed on gloo: stages 0 to 3 on 1, 2 and 4 ranks against the plain learner, and through checkpoints.

Three starts of processes do everything (imports take most of their time); the tests read what they wrote.
"""

import json
import math
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import msgspec
import pytest
import torch
import vllm_scores
from ranks import HANG_GUARD_S, REPOSITORY, start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.lora import whole_weights
from trainer.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1300)]

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
STAGES = (0, 1, 2, 3)
SAVED, NAN_LOSS, POISONED = 1, 1, 2  # a checkpoint after the first step; the second and third are skipped
PROGRAM = Path(__file__).with_name("deepspeed_ranks.py")
SETTINGS = {"learner.learning_rate": 2e-4, "learner.warmup_updates": 2, "learner.max_nonfinite_updates": 9}


def settings(stage, **more):
    return {**SETTINGS, "learner.backend": "deepspeed", "learner.zero_stage": stage, **more}


LORA = {"learner.lora_rank": 4, "learner.lora_alpha": 8, "learner.learning_rate": 2e-3}
VARIANTS = {  # of the one-rank start
    "persistent": settings(3),  # the parameters below half of the largest stay whole
    "packed": settings(3, **{"learner.micro_batch_tokens": 60, "learner.gradient_checkpointing": True}),
    "offload_optimizer": settings(2, **{"learner.offload": "optimizer"}),
    "offload_parameters": settings(3, **{"learner.offload": "parameters"}),
    "bf16_0": settings(0, **{"learner.dtype": "bfloat16"}),
    "bf16_1": settings(1, **{"learner.dtype": "bfloat16"}),
    "bf16_2": settings(2, **{"learner.dtype": "bfloat16"}),
    "bf16_3": settings(3, **{"learner.dtype": "bfloat16"}),
}


BENCHES = []  # made by the first test that asks


class Bench:
    """The steps, the plain learner, and where every job wrote."""

    def __init__(self, work, learner_dir, make_config, make_groups):
        self.work, self.learner_dir, self.make_config = work, learner_dir, make_config
        self.steps = [make_groups(seed=seed, explorer=1, learner=3) for seed in (1, 2, 3, 4)]
        group = self.steps[NAN_LOSS][0]
        spoiled = msgspec.structs.replace(group, advantages=(math.nan, *group.advantages[1:]))
        self.steps[NAN_LOSS] = [spoiled, *self.steps[NAN_LOSS][1:]]

    def job(self, name, overrides, *, save=0, checkpoint=None, model=None):
        out = self.work / name
        out.mkdir()
        config = msgspec.to_builtins(self.make_config(overrides))
        return {
            "out": str(out), "config": config, "save": save, "poisoned": POISONED,
            "checkpoint": str(checkpoint) if checkpoint else None, "model": str(model) if model else None,
            "persistent": 4000 if name == "persistent" else 0,  # else all are sharded at stage 3, tiny as they are
        }  # fmt: skip

    def plain(self, overrides, *, checkpoint=None, model=None):
        """The plain learner on one rank; it never sees the step that is poisoned."""
        config = self.make_config({**overrides, "learner.backend": "torch", "learner.offload": "none"})
        learner = Learner.load(
            config, model_dir=model or self.learner_dir, explorer_dir=None, world=WORLD, checkpoint=checkpoint
        )
        for step in range(learner.step, len(self.steps)):
            batch = pack_step(self.steps[step], config)
            if step != POISONED:
                learner.begin_step(batch)
                for mini_batch in batch.updates(1):
                    learner.update(mini_batch)
            learner.end_step()
        weights = whole_weights(learner.backend, learner.adapter, keep=True)
        return {name: tensor.clone() for name, tensor in weights}

    @cached_property
    def expected(self):
        return self.plain(SETTINGS)

    @cached_property
    def adapted(self):
        return self.plain(SETTINGS | LORA)

    def weights(self, name):
        return load_file(self.work / name / "weights.safetensors")

    def facts(self, name):
        return json.loads((self.work / name / "facts.json").read_text())

    def start(self, size, jobs):
        """`size` ranks that do the jobs, to their end."""
        (self.work / f"jobs_{size}.json").write_text(json.dumps(jobs))
        start_ranks(PROGRAM, [self.learner_dir, self.work], size, self.work)


@pytest.fixture
def bench(tmp_path_factory, learner_dir, tiny_config, made_up_groups, write_tiny_model):
    if not BENCHES:
        BENCHES.append(None)
        work = tmp_path_factory.mktemp("deepspeed")
        write_tiny_model(work / "untied", seed=1, tied=False)
        BENCHES[0] = make_bench(work, learner_dir, tiny_config, made_up_groups)
    assert BENCHES[0] is not None, "the first test to ask has said why there is nothing to read"
    return BENCHES[0]


def make_bench(work, learner_dir, make_config, make_groups):
    bench = Bench(work, learner_dir, make_config, make_groups)
    (work / "groups.msgpack").write_bytes(msgspec.msgpack.encode(bench.steps))
    for size in (4, 2, 1):
        jobs = [bench.job(f"ranks_{size}_stage_{s}", settings(s), save=SAVED) for s in STAGES]
        for stage in STAGES if size == 2 else ():
            other = STAGES[stage - 1]
            checkpoint = work / f"ranks_4_stage_{stage}" / "checkpoint"
            jobs.append(bench.job(f"resumed_{stage}", settings(stage), checkpoint=checkpoint))
            jobs.append(bench.job(f"resumed_{stage}_as_{other}", settings(other), checkpoint=checkpoint))
        if size == 2:
            jobs.append(bench.job("untied_head", settings(3), model=work / "untied"))
            for stage, other in ((2, 3), (3, 0)):
                jobs.append(bench.job(f"lora_{stage}", settings(stage, **LORA), save=SAVED))
                checkpoint = work / f"lora_{stage}" / "checkpoint"
                jobs.append(bench.job(f"lora_{stage}_as_{other}", settings(other, **LORA), checkpoint=checkpoint))
        for name, overrides in VARIANTS.items() if size == 1 else ():
            jobs.append(bench.job(name, overrides, save=SAVED))
            if name.startswith("bf16"):
                jobs.append(bench.job(f"{name}_resumed", overrides, checkpoint=work / name / "checkpoint"))
        bench.start(size, jobs)
    return bench


def largest_gap(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name].float() - expected[name].float()).abs().max()) for name in expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_and_rank_count_makes_the_plain_learners_updates(bench, stage, ranks):
    assert largest_gap(bench.weights(f"ranks_{ranks}_stage_{stage}"), bench.expected) <= 1e-5
    start = load_file(bench.learner_dir / "model.safetensors")
    assert largest_gap(bench.expected, start) > 1e-4


def test_every_way_of_training_fills_rank_0_s_buffers_with_what_it_writes_to_files(bench):
    """ZeRO 0 to 3 on 1, 2 and 4 ranks, offloaded, in bfloat16, untied, and adapters, which are merged."""
    names = sorted(file.parent.name for file in bench.work.glob("*/shared.safetensors"))
    assert {"ranks_2_stage_3", "ranks_4_stage_3", "offload_parameters", "bf16_3", "untied_head", "lora_3"} < {*names}
    for name in names:
        written, shared = bench.weights(name), load_file(bench.work / name / "shared.safetensors")
        assert shared.keys() == written.keys(), name
        assert all(torch.equal(shared[key], tensor) for key, tensor in written.items()), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(bench, stage, ranks):
    facts = bench.facts(f"ranks_{ranks}_stage_{stage}")
    skipped = [metrics["fault/skipped_updates"] for metrics in facts["metrics"]]
    assert skipped == [0, 1, 3, 3]  # the update that holds the NaN; both updates of the poisoned step
    assert (facts["updates"], facts["step"]) == (5, 4)
    norms = [metrics["grad_norm"] for metrics in facts["metrics"]]
    assert all(math.isfinite(norms[step]) for step in (0, 1, 3))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_norm_loss_and_ratio_are_the_plain_ones(bench, stage, ranks):
    facts, plain = bench.facts(f"ranks_{ranks}_stage_{stage}"), bench.facts("ranks_1_stage_0")
    for step in (0, 1, 3):  # the poisoned step measured nothing
        found, wanted = facts["metrics"][step], plain["metrics"][step]
        for name in ("loss", "grad_norm", "learner/ratio_mean", "learning_rate", "learner/ess"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_four_ranks_resumes_on_two(bench, stage):
    assert largest_gap(bench.weights(f"resumed_{stage}"), bench.expected) <= 1e-5
    assert bench.facts(f"resumed_{stage}")["updates"] == 5
    assert len(bench.facts(f"resumed_{stage}")["metrics"]) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_resumes_at_another_stage_and_without_deepspeed(bench, stage):
    assert largest_gap(bench.weights(f"resumed_{stage}_as_{STAGES[stage - 1]}"), bench.expected) <= 1e-5
    plain = bench.plain(SETTINGS, checkpoint=bench.work / f"ranks_4_stage_{stage}" / "checkpoint")
    assert largest_gap(plain, bench.expected) <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_directory_loads_in_transformers(bench, stage):
    folder = bench.work / f"ranks_4_stage_{stage}" / "checkpoint"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == load_file(bench.learner_dir / "model.safetensors").keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder).get_vocab()


def test_every_rank_sees_the_same_state(bench):
    for ranks in (2, 4):
        for stage in STAGES:
            states = [
                load_file(bench.work / f"ranks_{ranks}_stage_{stage}" / f"state_{r}.safetensors") for r in range(ranks)
            ]
            assert all(largest_gap(state, states[0]) == 0 for state in states)


@pytest.mark.parametrize("name", ["packed", "offload_optimizer", "offload_parameters"])
def test_packing_checkpointing_and_offload_change_nothing(bench, name):
    assert largest_gap(bench.weights(name), bench.expected) <= 1e-5


def test_the_reduce_bucket_is_no_larger_than_what_trains(bench):
    """DeepSpeed allocates it whole; here all parameters, and of a LoRA run only its adapters."""
    trained = sum(tensor.numel() for tensor in load_file(bench.learner_dir / "model.safetensors").values())
    for stage in STAGES[1:]:
        assert bench.facts(f"ranks_2_stage_{stage}")["bucket"] == trained
    state = load_file(bench.work / "lora_3" / "state_0.safetensors")
    adapters = sum(tensor.numel() for name, tensor in state.items() if name.startswith("exp_avg."))
    assert bench.facts("lora_2")["bucket"] == bench.facts("lora_3")["bucket"] == adapters < trained


def test_an_untied_head_is_sharded_too(bench):
    assert largest_gap(bench.weights("untied_head"), bench.plain(SETTINGS, model=bench.work / "untied")) <= 1e-5
    assert "lm_head.weight" in bench.weights("untied_head")


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_fp32_masters_and_resumes_with_the_same_bits(bench, stage):
    name = f"bf16_{stage}"
    state, resumed = (load_file(bench.work / job / "state_0.safetensors") for job in (name, f"{name}_resumed"))
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[key], resumed[key]) for key in state)
    weights = bench.weights(name)
    for key, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[f"master.{key}"].bfloat16())
    plain = bench.plain({**SETTINGS, "learner.dtype": "bfloat16"})
    assert largest_gap(weights, plain) <= (5e-3 if stage == 0 else 1e-3)


@pytest.mark.parametrize("name", ["lora_2", "lora_3", "lora_2_as_3", "lora_3_as_0"])
def test_adapters_get_the_plain_learners_updates_at_every_stage(bench, name):
    assert largest_gap(bench.weights(name), bench.adapted) <= 1e-5
    start = load_file(bench.learner_dir / "model.safetensors")
    assert largest_gap(bench.adapted, start) > 1e-3
    state = load_file(bench.work / name / "state_0.safetensors")
    assert state.keys() == {f"{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq") for key in trained_names(bench)}


def trained_names(bench):
    learner = Learner.load(
        bench.make_config(SETTINGS | LORA), model_dir=bench.learner_dir, explorer_dir=None, world=WORLD
    )
    return [name for name, _ in learner.backend.weights(trained=True)]


def test_vllm_serves_what_sharded_ranks_saved(bench):
    """Whole and adapted weights; the reference is transformers on the same directory."""
    folders = [bench.work / name / "checkpoint" for name in ("ranks_4_stage_3", "lora_3")]
    done = subprocess.run(
        [sys.executable, vllm_scores.__file__, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True, text=True, timeout=HANG_GUARD_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    drawn = json.loads(done.stdout.splitlines()[-1])
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        for prompt, (tokens, logprobs) in zip(vllm_scores.PROMPTS, drawn[str(folder)], strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert len(tokens) > 1
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
