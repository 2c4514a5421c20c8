"""Cases for the kernels. Triton runs in its interpreter here (tests/conftest.py)."""

from types import SimpleNamespace

import pytest
import torch

from kernels import ops, reference


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(before)


def make_head(tokens, vocabulary, width=16, dtype=torch.float64, planted=0.7):
    """Rows with logits of deviation 3, most of them sure of their target by 10 to 20 nats, as trained models are."""
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,))
    hidden *= 3 / hidden.norm(dim=1, keepdim=True).clamp(min=1e-9)
    sure = (torch.rand(tokens) < planted).double() * (10 + 10 * torch.rand(tokens).double())
    direction = weight[targets]
    hidden += (sure / direction.square().sum(1))[:, None] * direction
    return hidden.to(dtype), weight.to(dtype), targets


def make_loss_rows(hidden, weight, targets, temperature=1.0, dtype=torch.float32):
    """Behaviour log-probs near the head's own, 1 in 10 off by up to 3 nats, advantages of both signs, and a mask."""
    tokens = targets.shape[0]
    exact = reference.selected_logprob(hidden.double(), weight.double(), targets, temperature=temperature).logprob
    noise = 0.1 * torch.randn(tokens).double() + 3 * torch.randn(tokens).double() * (torch.rand(tokens) < 0.1)
    keep = torch.rand(tokens) < 0.8
    anchor = torch.where(keep, exact + noise, torch.nan)
    return SimpleNamespace(
        anchor=anchor.to(dtype),
        advantage=torch.randn(tokens).to(dtype),
        options={
            "is_weight": (2 * torch.rand(tokens)).to(dtype) * (torch.rand(tokens) < 0.9),
            "ref_logprob": (exact + 0.3 * torch.randn(tokens).double()).to(dtype),
            "kl_weight": (torch.rand(tokens) < 0.7).to(dtype),
            "kl_coef": 0.05,
            "token_weight": (torch.rand(tokens) * keep / tokens).to(dtype),
        },
    )


def fused(impl, hidden, weight, targets, rows, **options):
    """linear_policy_loss and its gradients as one flat dict of tensors."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, logprob, entropy, metrics = ops.linear_policy_loss(
        hidden, weight, targets, rows.anchor, rows.advantage, impl=impl, **{**rows.options, **options}
    )
    loss.backward()
    return {
        "loss": loss.detach(), "logprob": logprob, "entropy": entropy, **metrics,
        "d_hidden": hidden.grad, "d_weight": weight.grad,
    }  # fmt: skip


def scored(impl, hidden, weight, targets, pull, **options):
    """linear_logprob and the gradients of a weighted sum of its two results."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy = ops.linear_logprob(hidden, weight, targets, impl=impl, **options)
    (logprob * pull[0].to(logprob) + entropy * pull[1].to(entropy)).sum().backward()
    return {
        "logprob": logprob.detach(), "entropy": entropy.detach(),
        "d_hidden": hidden.grad, "d_weight": weight.grad,
    }  # fmt: skip


def check_no_worse(ours, theirs, truth, slack=4e-6):
    """|ours − truth| ≤ |theirs − truth| + slack · (largest |truth|, at least 1e-3), element by element.

    A scalar is a sum that cancels; its terms are of order 1.
    """
    assert ours.keys() == theirs.keys()
    for name, exact in truth.items():
        exact = exact.double()
        room = slack * max(float(exact.abs().max()) if exact.numel() else 0.0, 1e-3 if exact.dim() else 1.0)
        error, bound = (ours[name].double() - exact).abs(), (theirs[name].double() - exact).abs() + room
        assert bool((error <= bound).all()), (name, float((error - bound).max()), float(error.max()))


@pytest.fixture
def head_case():
    return make_head


@pytest.fixture
def loss_rows():
    return make_loss_rows


@pytest.fixture
def run_fused():
    return fused


@pytest.fixture
def run_scored():
    return scored


@pytest.fixture
def assert_no_worse():
    return check_no_worse
