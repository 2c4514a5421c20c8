from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.penalty
from core.schema import Sampling
from rollout.engine import Request, engine_kind
from rollout.torch_engine import TorchEngine
from trainer.answering import Evaluator
from trainer.evaluate_options import parser
from trainer.penalty import PenalisedSampling, PenalisedTorchEngine, evaluation_engine


def drawn(engine: TorchEngine, sampling: Sampling) -> list[list[int]]:
    requests = [Request((5, 6, 7), seeds=(1, 2, 3, 4)), Request((8, 9), seeds=(5, 6, 7, 8))]
    found = sorted(engine.generate(requests, sampling), key=lambda one: (one.request, one.sample))
    return [one.token_ids.tolist() for one in found]


def test_a_large_penalty_draws_no_token_twice(learner_dir: Path) -> None:
    engine = PenalisedTorchEngine(learner_dir)
    settings = {"temperature": 1.0, "max_tokens": 20, "stop_token_ids": (1,)}
    free, none = drawn(engine, Sampling(**settings)), drawn(engine, PenalisedSampling(**settings))
    assert free == none == drawn(TorchEngine(learner_dir), Sampling(**settings))
    assert any(len(set(tokens)) < len(tokens) for tokens in free)
    penalised = drawn(engine, PenalisedSampling(**settings, presence_penalty=1000.0))
    assert [tokens[0] for tokens in penalised] == [tokens[0] for tokens in free]  # nothing was drawn before the first
    assert all(len(set(tokens)) == len(tokens) for tokens in penalised)
    # Prompt tokens are free to be drawn.
    many = PenalisedSampling(temperature=1.0, max_tokens=55, stop_token_ids=(), presence_penalty=1000.0)
    assert any({5, 6, 7} & set(tokens) for tokens in drawn(engine, many))


def test_the_penalty_lowers_a_logit_by_as_much(learner_dir: Path) -> None:
    engine = PenalisedTorchEngine(learner_dir)
    request = Request((5, 6, 7), seeds=(1,))
    settings = {"temperature": 1.0, "max_tokens": 2, "stop_token_ids": ()}
    (penalised,) = engine.generate([request], PenalisedSampling(**settings, presence_penalty=2.0))
    first, second = penalised.token_ids.tolist()
    model = AutoModelForCausalLM.from_pretrained(learner_dir)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, first]])).logits[0, -1]
    logits[first] -= 2.0
    assert penalised.logprobs[1] == pytest.approx(float(logits.log_softmax(-1)[second]), abs=1e-4)


class Requests:
    """vLLM's engine, of which the wrapper needs one method."""

    def __init__(self) -> None:
        self.penalties: list[float] = []

    def add_request(self, name: str, prompt: object, params: object) -> None:
        self.penalties.append(params.presence_penalty)


def test_vllm_gets_it_with_every_request() -> None:
    inner = Requests()
    engine = trainer.penalty._Penalising(inner)
    for penalty in (0.0, 1.5):
        engine.presence_penalty = penalty
        engine.add_request("0.0", None, type("Params", (), {})())
    assert engine.penalties == inner.penalties == [0.0, 1.5]


def test_auto_is_vllm_on_a_gpu_but_not_for_the_embedded_models(
    learner_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert engine_kind("auto", "cuda") == "vllm"
    for model, kind in ((str(learner_dir), "vllm"), ("embedded:learner", "torch")):
        words = [model, "--benchmarks", "countdown", "--device", "cuda", "--out", str(tmp_path)]
        assert Evaluator(learner_dir, parser().parse_args(words), on_progress=print)._kind == kind


def test_auto_is_torch_without_a_gpu(learner_dir: Path) -> None:
    assert engine_kind("auto", "cpu") == "torch"
    assert engine_kind("vllm", "cpu") == "vllm"
    with pytest.raises(ValueError, match="'fast' is not one of auto, torch, vllm"):
        engine_kind("fast", "cpu")
    assert isinstance(evaluation_engine("torch", learner_dir, device="cpu", dtype="float32"), PenalisedTorchEngine)
