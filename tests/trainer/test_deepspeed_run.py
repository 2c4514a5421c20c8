"""A whole run whose learner is sharded by DeepSpeed over two ranks."""

import pytest
import run_parts
from run_parts import TORCHRUN, arguments
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainer.manifest import verify


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_a_run_of_two_ranks_with_parameters_sharded(tmp_path_factory, tmp_path, sequence_parallel):
    root = tmp_path_factory.getbasetemp()
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    words = arguments(
        root, run_dir, algorithm__steps=2, algorithm__anneal_steps=2, checkpoint__every=1, learner__backend="deepspeed",
        learner__zero_stage=3, learner__micro_batch_tokens=200, learner__sequence_parallel=sequence_parallel,
    )  # fmt: skip
    launcher = (*TORCHRUN, "--nproc-per-node", "2")
    process = run_parts.start(words, log=log, launcher=launcher, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    run_parts.finish(process, log=log)
    lines = run_parts.training_lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["fault/skipped_updates"] == 0 and line["grad_norm"] > 0 for line in lines)
    # The published weights are the sharded ones: rollouts of the second step came from them.
    assert lines[1]["sampling/sampling_logp_difference/max"] < 1e-4
    checkpoint = run_dir / "checkpoints" / "step_2"
    assert verify(checkpoint, 2) is None
    saved, final = (load_file(folder / "model.safetensors") for folder in (checkpoint, run_dir / "model"))
    start = AutoModelForCausalLM.from_pretrained(run_parts.tiny_family(root).learner).state_dict()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    for name, parameter in model.named_parameters():
        assert parameter.equal(final[name])
        assert parameter.equal(saved[name])
        assert not parameter.equal(start[name])
