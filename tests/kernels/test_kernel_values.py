"""Each implementation against float64: its error may not exceed that of plain PyTorch in the working dtype."""

from types import SimpleNamespace

import pytest
import torch

from kernels import ops, row_triton

IMPLS = ["torch", "triton"]
# Garbage behind a mask is computed and then dropped by where(); NumPy, not the GPU, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row, and a last block that is not full."""
    monkeypatch.setattr(row_triton, "LINE_BYTES", 512)
    monkeypatch.setattr(row_triton, "GRADIENT_BLOCK", 512)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 2), (5, 33), (17, 1187), (0, 33)])
@pytest.mark.parametrize("resident", [True, False])
def test_linear_logprob(impl, tokens, vocabulary, resident, head_case, run_scored, assert_no_worse):
    head = head_case(tokens, vocabulary, dtype=torch.float32)
    pull = torch.randn(2, tokens)
    ours = run_scored(impl, *head, pull, resident=resident, chunk_rows=16)
    theirs = run_scored("reference", *head, pull)
    truth = run_scored("reference", head[0].double(), head[1].double(), head[2], pull)
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_linear_policy_loss(impl, ratio, entropy_coef, head_case, loss_rows, run_fused, assert_no_worse):
    head = head_case(37, 601, dtype=torch.float32)
    temperature = 0.5 + torch.rand(37)
    rows = loss_rows(*head, temperature)
    cu_seqlens = torch.tensor([0, 1, 1, 14, 29, 37])
    options = {"ratio": ratio, "cu_seqlens": cu_seqlens, "entropy_coef": entropy_coef, "temperature": temperature}
    ours = run_fused(impl, *head, rows, chunk_rows=16, **options)
    theirs = run_fused("reference", *head, rows, **options)
    truth = run_fused("reference", head[0].double(), head[1].double(), head[2], rows, **options)
    for flag in ("clipped_low", "clipped_high", "dual_clipped"):
        assert torch.equal(ours.pop(flag), truth.pop(flag))
        theirs.pop(flag)
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_longer_than_a_chunk_takes_a_second_pass(impl, head_case, loss_rows, run_fused, assert_no_worse):
    head = head_case(40, 65, dtype=torch.float32)
    rows = loss_rows(*head)
    options = {"ratio": "sequence", "cu_seqlens": torch.tensor([0, 33, 40])}
    ours = run_fused(impl, *head, rows, chunk_rows=16, **options)
    theirs = run_fused("reference", *head, rows, **options)
    truth = run_fused("reference", head[0].double(), head[1].double(), head[2], rows, **options)
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_policy_loss_on_given_logprobs(impl, ratio, assert_no_worse):
    tokens = 67
    values = SimpleNamespace(logprob=-4 * torch.rand(tokens), mask=torch.rand(tokens) < 0.8)
    anchor = torch.where(values.mask, values.logprob + torch.randn(tokens), torch.nan)
    advantage, pull = torch.randn(tokens), torch.randn(tokens)
    ref = values.logprob + torch.randn(tokens)
    weights = {"is_weight": 2 * torch.rand(tokens) * (torch.rand(tokens) < 0.9), "kl_weight": torch.rand(tokens)}
    cu_seqlens = torch.tensor([0, 20, 20, 50, 67])

    def run(name, dtype):
        logprob = values.logprob.to(dtype, copy=True).requires_grad_()
        loss, metrics = ops.policy_loss(
            logprob, anchor, advantage, impl=name, ref_logprob=ref, kl_coef=0.1, ratio=ratio, cu_seqlens=cu_seqlens,
            mask=values.mask, **weights,
        )  # fmt: skip
        (loss * pull).sum().backward()
        return {"loss": loss.detach(), "gradient": logprob.grad, **metrics}

    assert_no_worse(run(impl, torch.float32), run("reference", torch.float32), run("reference", torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fp32_logits", [True, False])
def test_bfloat16_operands(impl, fp32_logits, head_case, loss_rows, run_fused, assert_no_worse):
    head = head_case(20, 300, dtype=torch.bfloat16)
    rows = loss_rows(*head)
    # The interpreter truncates where a GPU rounds to nearest, so its bfloat16 gradients have twice the rounding error,
    # and bfloat16 logits move a ratio across a clip: without clips only rounding is left.
    slack = 2e-2 if fp32_logits or impl == "torch" else 0.1
    wide = {} if fp32_logits else {"clip_low": 1.0, "clip_high": 1e3, "dual_clip": 1e4}
    ours = run_fused(impl, *head, rows, chunk_rows=16, fp32_logits=fp32_logits, **wide)
    theirs = run_fused("reference", *head, rows, **wide)
    truth = run_fused("reference", head[0].double(), head[1].double(), head[2], rows, **wide)
    for flag in ("clipped_low", "clipped_high", "dual_clipped"):
        ours.pop(flag), theirs.pop(flag), truth.pop(flag)
    assert ours["d_weight"].dtype == torch.bfloat16
    assert_no_worse(ours, theirs, truth, slack=slack)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_vocabulary_of_qwen3(impl, head_case, loss_rows, run_fused, assert_no_worse, monkeypatch):
    monkeypatch.setattr(row_triton, "LINE_BYTES", 1 << 16)
    monkeypatch.setattr(row_triton, "GRADIENT_BLOCK", 1 << 16)
    head = head_case(5, 151_936, width=4, dtype=torch.float32)
    rows = loss_rows(*head)
    ours = run_fused(impl, *head, rows, chunk_rows=16, entropy_coef=0.01)
    theirs = run_fused("reference", *head, rows, entropy_coef=0.01)
    truth = run_fused("reference", head[0].double(), head[1].double(), head[2], rows, entropy_coef=0.01)
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_frozen_operands_get_no_gradient(impl, head_case, loss_rows):
    hidden, weight, targets = head_case(20, 40, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    for frozen in ("hidden", "weight"):
        h, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
        loss, *_ = ops.linear_policy_loss(h, w, targets, rows.anchor, rows.advantage, impl=impl, **rows.options)
        loss.backward()
        assert (h.grad is None) == (frozen == "hidden")
        assert (w.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_head_costs_two_products(impl, head_case, loss_rows, monkeypatch):
    from kernels import products

    counted = []
    for name in ("logits", "hidden_gradient", "weight_gradient"):
        real = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda *a, real=real, name=name, **k: (counted.append(name), real(*a, **k))[1]
        )
    hidden, weight, targets = head_case(20, 40, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    arguments = (targets, rows.anchor, rows.advantage)
    ops.linear_policy_loss(hidden.requires_grad_(), weight, *arguments, impl=impl, chunk_rows=32, **rows.options)
    assert counted == ["logits", "hidden_gradient"]
    counted.clear()
    ops.linear_policy_loss(hidden, weight.requires_grad_(), *arguments, impl=impl, chunk_rows=32, **rows.options)
    assert counted == ["logits", "hidden_gradient", "weight_gradient"]
    counted.clear()
    with torch.no_grad():
        ops.linear_policy_loss(hidden, weight, *arguments, impl=impl, chunk_rows=32, **rows.options)
    assert counted == ["logits"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [None, [0, 9, 21, 37], [0, 33, 37]], ids=["token", "sequence", "two passes"])
def test_main_grad_receives_the_weight_gradient_in_place(impl, dtype, bounds, head_case, loss_rows, run_fused):
    """Twice, to 0.25, where a sum in bfloat16 would lose 5e-4: within float32's rounding of the float64 gradient, or
    for bfloat16 operands within that of dz, which the interpreter truncates by up to 2^-7."""
    hidden, weight, targets = head_case(37, 40, dtype=dtype)
    rows = loss_rows(hidden, weight, targets)
    options = {} if bounds is None else {"ratio": "sequence", "cu_seqlens": torch.tensor(bounds)}
    wanted = run_fused(impl, hidden, weight, targets, rows, chunk_rows=16, **options)
    truth = run_fused("reference", hidden.double(), weight.double(), targets, rows, **options)
    main_grad = torch.full(weight.shape, 0.25)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for _ in range(2):
        loss, *_ = ops.linear_policy_loss(
            h, w, targets, rows.anchor, rows.advantage, impl=impl, main_grad=main_grad, chunk_rows=16,
            **rows.options, **options,
        )  # fmt: skip
        loss.backward()
    assert w.grad is None
    assert torch.equal(h.grad, 2 * wanted["d_hidden"])
    exact = truth["d_weight"]
    slack = (1e-6 if dtype == torch.float32 or impl == "torch" else 2**-7) * float(exact.abs().max())
    torch.testing.assert_close((main_grad.double() - 0.25) / 2, exact, atol=slack + 1e-7, rtol=0)


def test_main_grad_refuses_a_scaled_loss(head_case, loss_rows):
    hidden, weight, targets = head_case(8, 40, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    loss, *_ = ops.linear_policy_loss(
        hidden, weight.requires_grad_(), targets, rows.anchor, rows.advantage,
        main_grad=torch.zeros_like(weight), **rows.options,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="upstream gradient of 1"):
        (loss / 2).backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_upstream_gradient_scales_both_gradients(impl, head_case, loss_rows, run_fused):
    hidden, weight, targets = head_case(9, 40, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    plain = run_fused(impl, hidden, weight, targets, rows)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, *_ = ops.linear_policy_loss(h, w, targets, rows.anchor, rows.advantage, impl=impl, **rows.options)
    (loss * 0.25).backward()
    assert torch.equal(h.grad, plain["d_hidden"] * 0.25)
    assert torch.equal(w.grad, plain["d_weight"] * 0.25)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_arguments_may_have_any_strides(impl, head_case, loss_rows, run_fused, run_scored):
    """Gradients too: the scalar loss alone does not show weights that were read from the wrong place."""
    hidden, weight, targets = head_case(6, 33, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    rows.options["token_weight"] = torch.full((6,), 0.5)
    rows.anchor = rows.anchor.nan_to_num()
    wanted = run_fused(impl, hidden, weight, targets, rows)
    every_other = {name: torch.stack([v, v], 1).flatten()[::2] for name, v in rows.options.items() if name != "kl_coef"}
    rows.options |= every_other | {"token_weight": torch.tensor(0.5).expand(6)}
    rows.anchor, rows.advantage = (torch.stack([v, v], 1).flatten()[::2] for v in (rows.anchor, rows.advantage))
    strided = torch.stack([targets, targets.flip(0)], 1).flatten()[::2]
    found = run_fused(impl, hidden, weight, strided, rows)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    pull = torch.randn(2, 6)
    scored = (run_scored(impl, hidden, weight, ids, pull) for ids in (targets, strided))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in scored)))
