"""What a process of vLLM tells the engine about shared weights that it could not load; vLLM itself is not needed."""

import pytest
import torch

from rollout.shared_weights import Overwritten, require_whole
from rollout.vllm_weights import WeightLoading
from trainer.published import memory_is_shared
from trainer.weight_buffers import WeightBuffers

pytestmark = pytest.mark.skipif(not memory_is_shared(), reason="no memfd_create(2) or no /proc here")


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("no kernel for it")])
def test_an_error_without_words_does_not_pass_for_success(error: RuntimeError) -> None:
    buffers = WeightBuffers(1024, torch.device("cpu"))
    file, digest = buffers.write(1, lambda buffer: buffer.fill(iter([("a", torch.ones(3))])))

    def refuse(**_: object) -> None:
        raise error

    loading = WeightLoading()
    loading.device, loading.reload_weights = torch.device("cpu"), refuse
    said = loading.load_shared(str(file), 1, digest)
    with pytest.raises(RuntimeError, match=r"weights 1: (NotImplementedError|no kernel for it)") as caught:
        require_whole([said], version=1)
    assert not isinstance(caught.value, Overwritten)
    assert loading.load_shared("/nowhere", 1, digest).startswith("weights 1: /nowhere cannot be read")
    buffers.close()
