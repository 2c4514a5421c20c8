"""The trainer's log-probs and losses are the kernels': a step trained with Triton ends where the CPU path ends."""

from pathlib import Path

import pytest
import run_parts
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_a_training_step_with_triton_gives_the_parameters_of_the_torch_path(tmp_path: Path) -> None:
    trained = {}
    for kernels in ("torch", "triton"):
        words = run_parts.arguments(
            tmp_path, tmp_path / kernels, learner__kernels=kernels, algorithm__steps=2, algorithm__anneal_steps=2,
            algorithm__prompts_per_step=4, algorithm__mini_batch_prompts=2, data__eval="",
        )  # fmt: skip
        log = tmp_path / f"{kernels}.log"
        run_parts.finish(run_parts.start(words, log=log, TRITON_INTERPRET="1"), log=log)
        trained[kernels] = load_file(tmp_path / kernels / "model" / "model.safetensors")
    start = load_file(run_parts.tiny_family(tmp_path).learner / "model.safetensors")
    for name, weights in trained["torch"].items():
        assert not torch.equal(weights, start[name])
        torch.testing.assert_close(trained["triton"][name], weights, rtol=0, atol=1e-5)
