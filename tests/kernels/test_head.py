"""The head as a module: in a Hugging Face model, tied and untied."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kernels.head import LogprobHead, LogprobModel

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 67,
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=request.param, **TINY))


def test_installing_keeps_parameters_names_and_logits(model):
    ids = torch.randint(0, 67, (2, 9))
    before, names = model(input_ids=ids).logits, list(dict(model.named_parameters()))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    head = LogprobHead.install(model)
    assert LogprobHead.install(model) is head is model.lm_head
    assert list(dict(model.named_parameters())) == names
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_model_answers_with_log_probs_and_a_loss(model):
    ids = torch.randint(0, 67, (2, 9))
    rows = torch.tensor([2, 3, 4, 12, 13])
    targets = ids.flatten()[rows + 1]
    advantage = torch.randn(5)
    wanted = torch.log_softmax(model(input_ids=ids).logits.flatten(0, 1)[rows], -1)[torch.arange(5), targets]
    (wanted * -advantage).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    scorer = LogprobModel(model)
    with torch.no_grad():
        logprob, _ = scorer({"input_ids": ids}, rows, targets)
    torch.testing.assert_close(logprob, wanted.detach(), atol=1e-5, rtol=1e-5)
    loss, trained, _, metrics = scorer({"input_ids": ids}, rows, targets, logprob, advantage)
    loss.backward()
    assert torch.equal(trained, logprob)
    assert torch.equal(metrics["ratio"], torch.ones(5))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_a_main_grad_takes_the_heads_gradient_and_leaves_the_embeddings_to_autograd(model):
    scorer, head = LogprobModel(model), model.get_output_embeddings()
    ids = torch.randint(0, 67, (2, 9))
    rows = torch.tensor([2, 3, 4, 12, 13])
    batch = {"input_ids": ids}, rows, ids.flatten()[rows + 1], -torch.rand(5), torch.randn(5)
    scorer(*batch)[0].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    place = torch.zeros_like(head.weight)
    head.main_grad = lambda: place
    with torch.no_grad():
        scorer(*batch)
    assert not place.any()
    scorer(*batch)[0].backward()
    assert place.any()
    tied = head.weight is model.get_input_embeddings().weight
    assert (head.weight.grad is not None) == tied
    for name, parameter in model.named_parameters():
        found = (parameter.grad if parameter.grad is not None else 0) + (place if parameter is head.weight else 0)
        torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=1e-5)


def test_a_head_with_a_bias_is_refused(model):
    model.set_output_embeddings(torch.nn.Linear(32, 67))
    with pytest.raises(ValueError, match="no bias"):
        LogprobHead.install(model)


@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_training_step_in_the_interpreter_gives_the_parameters_of_the_torch_path(model, ratio):
    scorer, start = LogprobModel(model), {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(0, 67, (2, 9))
    rows = torch.tensor([2, 3, 4, 12, 13])
    anchor, advantage = -4 - torch.rand(5), torch.randn(5)

    def parameters(impl):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        for _ in range(2):
            optimizer.zero_grad()
            loss, *_ = scorer(
                {"input_ids": ids}, rows, ids.flatten()[rows + 1], anchor, advantage, impl=impl, ratio=ratio,
                cu_seqlens=torch.tensor([0, 3, 5]), ref_logprob=anchor, kl_coef=0.05, entropy_coef=0.01,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
        return {k: v.clone() for k, v in model.named_parameters()}

    wanted, found = parameters("torch"), parameters("triton")
    assert any(not torch.equal(wanted[name], start[name]) for name in wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)
