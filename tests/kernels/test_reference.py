"""The specification itself: against formulas written out by hand, and every derivative against finite differences."""

import math
from types import SimpleNamespace

import pytest
import torch

from kernels import ops
from kernels.reference import selected_logprob


def check_gradient(function, *inputs, values=None):
    """Autograd against central differences in float64, for a function that may run backward only once.

    `values`: what to difference instead, where `function` holds something fixed in its gradient.
    """
    inputs = [x.clone().requires_grad_() for x in inputs]
    pull = [torch.randn(out.shape, dtype=torch.float64) for out in function(*inputs)]

    def scalar(of=values or function):
        return sum((out * p).sum() for out, p in zip(of(*inputs), pull))

    scalar(function).backward()
    for x in inputs:
        numeric = torch.zeros_like(x).flatten()
        with torch.no_grad():
            for i in range(x.numel()):
                place, kept = x.view(-1)[i : i + 1], float(x.view(-1)[i])
                place.fill_(kept + 1e-6)
                above = float(scalar())
                place.fill_(kept - 1e-6)
                numeric[i] = (above - float(scalar())) / 2e-6
                place.fill_(kept)
        torch.testing.assert_close(x.grad, numeric.view_as(x), atol=1e-6, rtol=1e-6)


def test_selected_logprob_is_a_log_softmax():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    targets, temperature = torch.randint(0, 9, (5,)), 0.5 + torch.rand(5)
    log_p = torch.log_softmax(hidden @ weight.T / temperature[:, None], -1)
    logprob, entropy = selected_logprob(hidden, weight, targets, temperature=temperature)
    torch.testing.assert_close(logprob, log_p[torch.arange(5), targets])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=log_p).entropy())


def test_selected_logprob_works_in_the_dtype_asked_for(head_case):
    hidden, weight, targets = head_case(5, 9)
    assert selected_logprob(hidden, weight, targets).logprob.dtype == torch.float64
    assert selected_logprob(hidden.bfloat16(), weight.bfloat16(), targets).logprob.dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("advantage", "ratio", "wanted"),
    [
        (1.0, 1.1, {"loss": -1.1}),
        (1.0, 1.5, {"loss": -1.2, "clipped_high": 1}),
        (1.0, 0.5, {"loss": -0.5}),
        (-1.0, 0.5, {"loss": 0.8, "clipped_low": 1}),
        (-1.0, 1.5, {"loss": 1.5}),
        (-1.0, 9.0, {"loss": 3.0, "dual_clipped": 1}),
        (0.0, 9.0, {"loss": 0.0}),
    ],
)
def test_each_arm_of_the_clipped_objective(impl, advantage, ratio, wanted):
    logprob = torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)
    loss, metrics = ops.policy_loss(logprob, torch.tensor([-2.0]), torch.tensor([advantage]), impl=impl)
    loss.sum().backward()
    assert loss.item() == pytest.approx(wanted["loss"])
    assert metrics["ratio"].item() == pytest.approx(ratio)
    for flag in ("clipped_low", "clipped_high", "dual_clipped"):
        assert metrics[flag].item() == wanted.get(flag, 0)
    held = any(wanted.get(flag) for flag in ("clipped_low", "clipped_high", "dual_clipped"))
    assert logprob.grad.item() == pytest.approx(0.0 if held else -advantage * ratio)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_kl_estimate_and_where_it_applies(impl):
    logprob, ref = torch.zeros(4), torch.tensor([0.5, -1.0, 30.0, 0.5])
    share = torch.tensor([1.0, 0.5, 1.0, 0.0])
    loss, metrics = ops.policy_loss(
        logprob, logprob, torch.zeros(4), ref_logprob=ref, kl_coef=2.0, kl_weight=share, impl=impl
    )
    k3 = [math.exp(0.5) - 1.5, math.exp(-1.0), 10.0, 0.0]
    assert metrics["kl"].tolist() == pytest.approx(k3, rel=1e-5)
    assert loss.tolist() == pytest.approx([2 * k3[0], k3[1], 20.0, 0.0], rel=1e-5)


def test_cispo_keeps_a_gradient_where_ppo_clips():
    logprob = torch.tensor([-1.0], requires_grad=True)
    loss, _ = ops.policy_loss(logprob, torch.tensor([-3.0]), torch.ones(1), ratio="cispo")
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.2)
    assert logprob.grad.item() == pytest.approx(-1.2)


def test_the_sequence_ratio_is_a_geometric_mean_of_live_tokens():
    logprob, anchor = torch.tensor([-1.0, -2.0, -3.0, -1.0]), torch.tensor([-1.5, -1.8, math.nan, -1.1])
    _, metrics = ops.policy_loss(
        logprob, anchor, torch.ones(4), ratio="sequence", cu_seqlens=torch.tensor([0, 3, 3, 4]),
        mask=torch.tensor([True, True, False, True]),
    )  # fmt: skip
    assert metrics["ratio"].tolist() == pytest.approx([math.exp(0.15), math.exp(0.15), 0.0, math.exp(0.1)])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_finite_differences_of_the_fused_loss(impl, ratio, head_case, loss_rows):
    head = SimpleNamespace(tokens=7, vocabulary=6)
    hidden, weight, targets = head_case(head.tokens, head.vocabulary, width=3)
    hidden = hidden * 0.3
    rows = loss_rows(hidden, weight, targets, dtype=torch.float64)
    temperature, options = 0.8, dict(rows.options)

    def loss(h, w, **change):
        return ops.linear_policy_loss(
            h, w, targets, rows.anchor, rows.advantage, impl=impl, ratio=ratio, entropy_coef=0.1,
            temperature=temperature, cu_seqlens=torch.tensor([0, 3, 3, 7]), **{**options, **change},
        )[:1]  # fmt: skip

    if ratio != "cispo":
        return check_gradient(loss, hidden, weight)
    # cispo holds its clipped ratio fixed in the gradient. Clipped at 1 from both sides the ratio is a constant, to
    # which the weight then gives the value it has here.
    logprob, _ = selected_logprob(hidden, weight, targets, temperature=temperature)
    ratios = (logprob - rows.anchor).exp().nan_to_num(1.0)
    fixed = {"clip_low": 0.0, "clip_high": 0.0, "is_weight": options["is_weight"] * ratios.clamp(0.8, 1.2)}
    live = options["token_weight"] != 0
    assert 0 < int(((ratios < 0.8) | (ratios > 1.2))[live].sum()) < int(live.sum())
    torch.testing.assert_close(loss(hidden, weight)[0], loss(hidden, weight, **fixed)[0])
    check_gradient(loss, hidden, weight, values=lambda h, w: loss(h, w, **fixed))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("resident", [True, False])
def test_finite_differences_of_the_log_prob(impl, resident, head_case):
    hidden, weight, targets = head_case(5, 6, width=3)

    def both(h, w):
        return tuple(ops.linear_logprob(h, w, targets, impl=impl, temperature=0.8, resident=resident))

    check_gradient(both, hidden * 0.3, weight)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_finite_differences_of_the_policy_loss(impl, ratio):
    anchor = -torch.rand(9).double()
    logprob = anchor + 0.5 * torch.randn(9).double()
    advantage, ref = torch.randn(9).double(), anchor + 0.3 * torch.randn(9).double()

    def loss(x):
        return ops.policy_loss(
            x, anchor, advantage, impl=impl, ratio=ratio, ref_logprob=ref, kl_coef=0.3,
            cu_seqlens=torch.tensor([0, 4, 9]),
        )[:1]  # fmt: skip

    check_gradient(loss, logprob)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 1, 9])}, r"targets must lie in \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, -100])}, "pass only rows that have a label"),
        ({"targets": torch.tensor([0, 1])}, r"targets must have shape \[3\]"),
        ({"targets": torch.zeros(3)}, "int32 or int64"),
        ({"weight": torch.zeros(0)}, "ZeRO-3 shard"),
        ({"weight": torch.zeros(6, 4, dtype=torch.float64)}, "share a floating dtype"),
        ({"advantage": torch.zeros(4)}, r"advantage must have shape \[3\]"),
        ({"token_weight": torch.zeros(4)}, r"token_weight must have shape \[3\]"),
        ({"kl_coef": 0.1}, "needs ref_logprob"),
        ({"kl_coef": -0.1}, "kl_coef must be"),
        ({"clip_low": 1.5}, "clip_low must lie"),
        ({"clip_high": -0.1}, "clip_high must be"),
        ({"dual_clip": 1.0}, "dual_clip must exceed 1"),
        ({"ratio": "gspo"}, "ratio must be"),
        ({"ratio": "sequence"}, "needs cu_seqlens"),
        ({"ratio": "sequence", "cu_seqlens": torch.tensor([0, 2])}, "rise from 0 to T = 3"),
        ({"impl": "fused"}, "impl must be"),
        ({"impl": "reference", "main_grad": torch.zeros(6, 4)}, "main_grad needs impl"),
        ({"main_grad": torch.zeros(6, 3)}, "main_grad must have the weight's shape"),
        ({"chunk_rows": 10}, "multiple of 16"),
    ],
)
def test_impossible_arguments_are_refused_by_name(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.tensor([0, 1, 5]),
        "anchor_logprob": torch.zeros(3), "advantage": torch.zeros(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.linear_policy_loss(**{**arguments, **change})


def test_triton_refuses_what_it_cannot_compute(monkeypatch):
    from kernels import ragged_triton

    with pytest.raises(ValueError, match="float64"):
        ops.linear_logprob(torch.zeros(1, 2).double(), torch.zeros(3, 2).double(), torch.tensor([0]), impl="triton")
    monkeypatch.setattr(ragged_triton.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        ops.linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), impl="triton")


def test_auto_is_the_torch_path_on_a_cpu(head_case, monkeypatch):
    from kernels import autograd

    asked = []
    real = autograd.backend
    monkeypatch.setattr(autograd, "backend", lambda name: (asked.append(name), real(name))[1])
    ops.linear_logprob(*head_case(3, 5))
    assert asked == ["torch"]
