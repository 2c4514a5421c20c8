"""The twenty mistakes that fused log-prob and policy-loss kernels have shipped with, each a test by name."""

import inspect
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import arguments, linear_logprob, ops, policy_loss, products, ragged, reference, row_torch, row_triton
from kernels.packing import pack
from kernels.rows import RowStatistics, RowWeights

BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])
ROWS = {"torch": row_torch, "triton": row_triton}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_triton, "LINE_BYTES", 64)
    monkeypatch.setattr(row_triton, "GRADIENT_BLOCK", 64)


def row_statistics(impl, logits, targets):
    """Statistics of raw fp32 logits, without a head before them."""
    return ROWS[impl].statistics(logits.float().contiguous(), targets, torch.ones(len(targets)))


def row_gradient(impl, logits, targets, g, e=None):
    stats = row_statistics(impl, logits, targets)
    return ROWS[impl].gradient(logits.float().clone(), targets, torch.ones(len(targets)), stats, g, e, torch.float32)


def identity_head(logits):
    """A head whose logits are the given ones: hidden = logits, weight = identity."""
    return logits.clone(), torch.eye(logits.shape[1], dtype=logits.dtype)


@BOTH
def test_trap_01_the_running_maximum_does_not_start_at_zero(impl):
    logits = torch.randn(6, 200) - 1e4
    targets = torch.randint(0, 200, (6,))
    truth = reference.logprob_of_logits(logits.double(), targets)
    stats = row_statistics(impl, logits, targets)
    torch.testing.assert_close(stats.logprob.double(), truth.logprob, atol=2e-5, rtol=0)
    torch.testing.assert_close(stats.entropy.double(), truth.entropy, atol=2e-5, rtol=0)


def test_trap_02_bfloat16_logits_are_wrong_by_more_than_float32_ones(head_case):
    hidden, weight, targets = head_case(12, 150, dtype=torch.bfloat16)
    exact = reference.selected_logprob(hidden.double(), weight.double(), targets).logprob
    fine = ops.linear_logprob(hidden, weight, targets, impl="triton").logprob
    coarse = ops.linear_logprob(hidden, weight, targets, impl="triton", fp32_logits=False).logprob
    assert float((fine - exact).abs().max()) < 1e-4 < 1e-3 < float((coarse - exact).abs().max())


@pytest.mark.parametrize(
    ("impl", "stored", "rounding"),
    [("torch", torch.float32, 2e-6), ("triton", torch.float32, 2e-6), ("triton", torch.bfloat16, 1e-2)],
)
def test_trap_02_backward_sees_the_logits_that_forward_saw(impl, stored, rounding):
    """dz of the very logits in memory, in float64: bfloat16 ones in one pass only would put p off by 1 % and more."""
    logits = (10 * torch.randn(12, 150)).to(stored)
    targets, scale, g, e = torch.randint(0, 150, (12,)), 0.5 + torch.rand(12), torch.randn(12), torch.randn(12)
    z = logits.double().requires_grad_()
    exact = reference.logprob_of_logits(z, targets, temperature=1 / scale.double())
    (g * exact.logprob + e * exact.entropy).sum().backward()
    stats = ROWS[impl].statistics(logits, targets, scale)
    dz = ROWS[impl].gradient(logits.clone(), targets, scale, stats, g, e, stored)
    torch.testing.assert_close(stats.logprob.double(), exact.logprob.detach(), atol=1e-5, rtol=1e-6)
    error = (dz.double() - z.grad).norm(dim=1) / z.grad.norm(dim=1)
    assert float(error.max()) < rounding


def test_trap_02_logits_formed_twice_are_formed_alike(head_case, monkeypatch):
    seen = []
    for name in ("statistics", "gradient"):
        real = getattr(row_triton, name)
        monkeypatch.setattr(row_triton, name, lambda z, *a, real=real: (seen.append(z.clone()), real(z, *a))[1])
    hidden, weight, targets = head_case(12, 150, dtype=torch.bfloat16)
    logprob = ops.linear_logprob(hidden, weight.requires_grad_(), targets, impl="triton", resident=False).logprob
    logprob.sum().backward()
    forward, backward = seen
    assert forward.dtype == backward.dtype == torch.float32
    assert torch.equal(forward, backward)


@BOTH
@pytest.mark.parametrize("margin", [14.0, 30.0, 60.0])
def test_trap_03_a_confident_token_keeps_its_tiny_loss_and_gradient(impl, margin):
    logits = torch.zeros(1, 3)
    logits[0, 1] = margin
    targets = torch.tensor([1])
    truth = math.log1p(2 * math.exp(-margin))
    assert row_statistics(impl, logits, targets).logprob.item() == pytest.approx(-truth, rel=1e-5)
    dz = row_gradient(impl, logits, targets, torch.ones(1))[0]
    assert dz[1].item() == pytest.approx(-math.expm1(-truth), rel=1e-5)
    assert dz[0].item() == pytest.approx(-math.exp(-margin), rel=1e-5)


@BOTH
def test_trap_03_a_hopeless_token_a_hundred_nats_down_stays_finite(impl):
    logits = torch.zeros(1, 70)
    logits[0, 3], logits[0, 69] = -100.0, 50.0
    targets = torch.tensor([3])
    stats = row_statistics(impl, logits, targets)
    assert stats.logprob.item() == pytest.approx(-150.0, rel=1e-6)
    dz = row_gradient(impl, logits, targets, torch.ones(1), torch.ones(1))[0]
    assert torch.isfinite(dz).all()
    assert dz[3].item() == pytest.approx(1.0, rel=1e-6)


def test_trap_04_the_weight_gradient_accumulates_in_float32(head_case):
    hidden, weight, targets = head_case(128, 48, dtype=torch.bfloat16, planted=0.0)

    def d_weight(rows, h, w, impl):
        w = w.clone().requires_grad_()
        logprob, _ = ops.linear_logprob(h, w, targets, impl=impl, **({"chunk_rows": rows} if rows else {}))
        logprob.sum().backward()
        return w.grad.double()

    truth = d_weight(None, hidden.double(), weight.double(), "reference")
    error = {rows: float((d_weight(rows, hidden, weight, "triton") - truth).norm()) for rows in (16, 128)}
    assert error[16] <= 1.05 * error[128]


@BOTH
@pytest.mark.parametrize("vocabulary", [1, 63, 65, 1187])
def test_trap_05_columns_past_the_vocabulary_never_count(impl, vocabulary):
    logits = torch.randn(3, vocabulary) - 20
    targets = torch.randint(0, vocabulary, (3,))
    stats = row_statistics(impl, logits, targets)
    assert bool((stats.logprob <= 0).all())
    truth = reference.logprob_of_logits(logits.double(), targets)
    torch.testing.assert_close(stats.logprob.double(), truth.logprob, atol=1e-5, rtol=1e-6)
    assert float(row_gradient(impl, logits, targets, torch.ones(3)).sum(1).abs().max()) < 1e-5


@BOTH
def test_trap_05_a_padded_head_is_cut_to_the_tokenizers_ids(impl, head_case):
    hidden, weight, targets = head_case(5, 90, dtype=torch.float32)
    padded = torch.cat([weight, 10 * torch.ones(38, 16)])
    cut = ops.linear_logprob(hidden, padded[:90], targets, impl=impl)
    torch.testing.assert_close(cut.logprob, ops.linear_logprob(hidden, weight, targets, impl="reference").logprob)


def test_trap_06_row_addresses_are_64_bit(tmp_path):
    """Row and stride each fit in 32 bits, as on a GPU, and their product does not from row 4 on."""
    stride, start = (1 << 29) + 16, 1 << 31
    # A sparse file, of which only the rows are ever touched; an address that wrapped falls before them, into zeros.
    size = start + 5 * stride + 64
    place = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    (tmp_path / "sparse").unlink()
    targets, ones = torch.tensor([3, 39, 0, 7, 21, 38]), torch.ones(6)
    values = torch.randn(6, 40).bfloat16()
    truth = reference.logprob_of_logits(values.double(), targets)
    exact = torch.nn.functional.one_hot(targets, 40) - torch.softmax(values.double(), 1)

    def logits():
        return place.as_strided((6, 40), (stride, 1), start).copy_(values)

    stats = row_triton.statistics(logits(), targets, ones)
    torch.testing.assert_close(stats.logprob.double(), truth.logprob, atol=1e-5, rtol=0)
    dz = row_triton.gradient(logits(), targets, ones, stats, ones, None, torch.bfloat16)
    torch.testing.assert_close(dz.double(), exact, atol=0, rtol=1e-2)
    # On policy and with an advantage of −1 the loss is the ratio, whose slope in the log-prob is 1.
    rows, weights = arguments.LossRows(stats.logprob, -ones), RowWeights(ones, None)
    fused = row_triton.loss_and_gradient(
        logits(), targets, ones, rows, weights, arguments.LossSettings(), torch.bfloat16
    )
    assert torch.equal(fused.stats.logprob, stats.logprob)
    torch.testing.assert_close(fused.dz.double(), exact, atol=0, rtol=1e-2)


def test_trap_06_rows_sit_on_grid_axis_zero():
    for module in (linear_logprob, policy_loss, ragged):
        assert "program_id(1)" not in inspect.getsource(module)


@BOTH
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_trap_07_log_ratios_of_a_hundred_and_garbage_behind_the_mask(impl, ratio, head_case, run_fused, loss_rows):
    head = head_case(12, 40, dtype=torch.float32)
    rows = loss_rows(*head)
    garbage = torch.tensor([math.nan, math.inf, -math.inf])
    mask = torch.tensor([1.0] * 6 + [0.0] * 6)
    exact = ops.linear_logprob(*head, impl="reference").logprob
    rows.anchor = torch.where(mask != 0, exact + 100 * torch.tensor([1.0, -1.0] * 6), garbage.repeat(4))
    rows.advantage = torch.where(mask != 0, torch.tensor([1.0, 1, -1, -1] * 3), garbage.roll(1).repeat(4))
    rows.options |= {"token_weight": mask, "ref_logprob": torch.where(mask != 0, exact - 100, math.nan)}
    out = run_fused(impl, *head, rows, ratio=ratio, cu_seqlens=torch.tensor([0, 4, 12]))
    wanted = run_fused("reference", *head, rows, ratio=ratio, cu_seqlens=torch.tensor([0, 4, 12]))
    for name, value in out.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert not out["d_hidden"][6:].any()
    assert not out["ratio"][6:].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_trap_07_a_masked_token_gets_gradient_zero_from_an_infinite_slope(impl):
    logprob = torch.tensor([-1.0, -1.0]).requires_grad_()
    loss, _ = ops.policy_loss(logprob, torch.tensor([math.nan, -1.0]), torch.ones(2), impl=impl)
    torch.where(torch.tensor([False, True]), loss, 0).sum().backward()
    assert logprob.grad.tolist() == [0.0, -1.0]


@BOTH
def test_trap_08_banned_tokens_have_no_probability_and_no_nan(impl):
    logits = torch.randn(4, 130)
    logits[:, 5:90] = -math.inf
    targets = torch.tensor([0, 100, 129, 7])
    stats = row_statistics(impl, logits, targets)
    truth = reference.logprob_of_logits(logits.double(), targets)
    assert stats.logprob[3].item() == -math.inf
    torch.testing.assert_close(stats.logprob.double(), truth.logprob, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stats.entropy.double(), truth.entropy, atol=1e-6, rtol=1e-6)
    dz = row_gradient(impl, logits, targets, torch.ones(4), torch.ones(4))
    assert torch.isfinite(dz).all()
    assert not dz[:3, 5:90].any()


@BOTH
def test_trap_08_a_sampled_token_of_behaviour_logprob_minus_infinity_does_not_pull(impl):
    logprob = torch.tensor([-1.0, -1.0]).requires_grad_()
    loss, metrics = ops.policy_loss(logprob, torch.full((2,), -math.inf), torch.tensor([1.0, -1.0]), impl=impl)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logprob.grad.tolist() == [0.0, 0.0]
    assert metrics["ratio"].tolist() == pytest.approx([math.exp(20)] * 2)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_trap_09_an_empty_or_masked_batch_has_a_zero_loss_that_reaches_the_parameters(impl, tokens, ratio, head_case):
    hidden, weight, targets = head_case(tokens, 30, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, logprob, _, metrics = ops.linear_policy_loss(
        hidden, weight, targets, torch.full((tokens,), math.nan), torch.zeros(tokens), impl=impl, ratio=ratio,
        token_weight=torch.zeros(tokens), entropy_coef=0.1, cu_seqlens=torch.tensor([0, 0, tokens]),
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert logprob.shape == (tokens,)
    assert set(metrics) == {"ratio", "clipped_low", "clipped_high", "dual_clipped", "kl"}
    assert not weight.grad.any()
    assert not hidden.grad.any()


@BOTH
def test_trap_10_temperature_divides_in_float32_and_per_token(impl, head_case):
    hidden, weight, targets = head_case(9, 50, dtype=torch.bfloat16)
    temperature = 0.5 + torch.rand(9)
    truth = reference.selected_logprob(hidden.double(), weight.double(), targets, temperature=temperature.double())
    mixed = ops.linear_logprob(hidden, weight, targets, temperature=temperature, impl=impl).logprob
    torch.testing.assert_close(mixed.double(), truth.logprob, atol=1e-4, rtol=1e-5)
    for row, value in enumerate(temperature.tolist()):
        alone = ops.linear_logprob(hidden, weight, targets, temperature=value, impl=impl).logprob
        assert alone[row].item() == pytest.approx(mixed[row].item(), abs=1e-6)


def test_trap_10_a_temperature_of_zero_is_refused(head_case):
    head = head_case(3, 5)
    with pytest.raises(ValueError, match="greedy"):
        ops.linear_logprob(*head, temperature=0.0)
    with pytest.raises(ValueError, match="positive"):
        ops.linear_logprob(*head, temperature=torch.tensor([1.0, 0.0, 1.0]))


@BOTH
def test_trap_11_micro_batches_under_one_normaliser_add_up_to_the_batch(impl, head_case, loss_rows, run_fused):
    hidden, weight, targets = head_case(20, 40, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    whole = run_fused(impl, hidden, weight, targets, rows)
    total = 0
    for part in (slice(0, 3), slice(3, 20)):
        own = type(rows)(anchor=rows.anchor[part], advantage=rows.advantage[part])
        own.options = {k: v if isinstance(v, float) else v[part] for k, v in rows.options.items()}
        total = total + run_fused(impl, hidden[part], weight, targets[part], own)["d_weight"]
    torch.testing.assert_close(total, whole["d_weight"], atol=1e-6, rtol=1e-5)


@BOTH
def test_trap_12_no_token_predicts_across_a_sequence_boundary(impl):
    tokens = torch.tensor([10, 11, 12, 20, 21, 30, 31, 32])
    packed = pack(tokens, torch.tensor([0, 3, 5, 8]), torch.tensor([2, 2, 1]), impl=impl)
    assert packed.rows.tolist() == [1, 5, 6]
    assert packed.targets.tolist() == [12, 31, 32]
    assert packed.owner.tolist() == [0, 2, 2]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert packed.cu_answers.tolist() == [0, 1, 1, 3]


@BOTH
def test_trap_13_numbers_reach_the_kernel_as_float32_and_not_as_constants(impl):
    loss, _ = ops.policy_loss(torch.zeros(1), -torch.ones(1), torch.ones(1), impl=impl, clip_high=0.1)
    assert torch.equal(loss, -torch.tensor([1.1]))
    for kernel in (linear_logprob.loss_kernel, policy_loss.policy_loss_kernel):
        source = inspect.getsource(kernel.fn)
        for number in ("low", "high", "dual_clip", "kl_coef"):
            assert f"{number}: tl.constexpr" not in source
    assert "autotune" not in "".join(inspect.getsource(m) for m in (linear_logprob, policy_loss, ragged))


class Syncs(TorchDispatchMode):
    """Refuses operations that would wait for a GPU: reading a scalar, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "aten::equal", "masked_select")), (
            name
        )
        if name.startswith("aten::index"):
            places = [x for x in pytree.tree_leaves(args[1:]) if isinstance(x, torch.Tensor)]
            assert not any(x.dtype in (torch.bool, torch.uint8) for x in places), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Refuses to copy a tensor's values to Python, of which a CPU tensor's copies dispatch no operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("tolist", "item", "numpy", "__array__", "cpu"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x.item(),
        lambda x: x.numpy(),
        lambda x: bool(x > 0),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
    ids=["tolist", "item", "numpy", "bool", "mask", "put by mask", "nonzero", "equal"],
)
def test_trap_14_what_would_wait_is_noticed(wait):
    with Syncs(), Reads(), pytest.raises(AssertionError):
        wait(torch.ones(1))


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_trap_14_no_step_waits_for_the_device(ratio, head_case, loss_rows, run_fused, run_scored, monkeypatch):
    head = head_case(10, 40, dtype=torch.float32)
    rows = loss_rows(*head)
    # Range checks read values, and happen on CPU tensors only; so does reading cu_seqlens, which lives there.
    monkeypatch.setattr(ops, "check_head", lambda *_: None)
    segments = arguments.Segments.of(torch.tensor([0, 4, 10]), 10, torch.device("cpu"))
    monkeypatch.setattr(arguments.Segments, "of", staticmethod(lambda *_: segments))
    with Syncs(), Reads():
        out = run_fused("triton", *head, rows, ratio=ratio, cu_seqlens=segments.offsets, entropy_coef=0.01)
        run_scored("triton", *head, torch.ones(2, 10))
    assert torch.isfinite(out["loss"])


@BOTH
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
@pytest.mark.parametrize(
    ("dtype", "fp32_logits"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_trap_15_on_policy_the_ratio_is_exactly_one(impl, ratio, dtype, fp32_logits, head_case, monkeypatch):
    shapes, real = set(), products.logits
    monkeypatch.setattr(
        products, "logits", lambda h, w, out: (shapes.add((h.shape, w.shape, out.shape)), real(h, w, out))[1]
    )
    hidden, weight, targets = head_case(37, 101, dtype=dtype)
    options = {"temperature": 0.7, "impl": impl, "chunk_rows": 16, "fp32_logits": fp32_logits}
    with torch.no_grad():
        anchor = ops.linear_logprob(hidden, weight, targets, **options).logprob
    hidden.requires_grad_()
    for resident in (True, False):
        trained = ops.linear_logprob(hidden, weight, targets, resident=resident, **options).logprob
        assert torch.equal(trained, anchor)
    trained.sum().backward()
    cu_seqlens = torch.tensor([0, 9, 21, 37])
    _, logprob, _, metrics = ops.linear_policy_loss(
        hidden, weight, targets, anchor, torch.ones(37), ratio=ratio, cu_seqlens=cu_seqlens, **options
    )
    assert torch.equal(logprob, anchor)
    assert torch.equal(metrics["ratio"], torch.ones(37))
    # For another shape a library may pick another algorithm, and round in another way.
    assert shapes == {((16, 16), (101, 16), (16, 101))}


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_trap_16_a_tied_weight_gets_both_gradients(impl, head_case, loss_rows):
    _, weight, targets = head_case(8, 30, dtype=torch.float32)
    rows = loss_rows(weight[targets], weight, targets)

    def gradient(name):
        table = weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(targets.flip(0), table)
        ops.linear_policy_loss(hidden, table, targets, rows.anchor, rows.advantage, impl=name, **rows.options)[
            0
        ].backward()
        return table.grad

    torch.testing.assert_close(gradient(impl), gradient("reference"), atol=1e-6, rtol=1e-5)


@BOTH
def test_trap_17_gradients_in_forward_refuse_no_grad_and_checkpointing(impl, head_case, loss_rows):
    hidden, weight, targets = head_case(8, 30, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    weight.requires_grad_(), hidden.requires_grad_()
    main_grad = torch.zeros_like(weight)

    def run(h, w, place=main_grad):
        return ops.linear_policy_loss(
            h, w, targets, rows.anchor, rows.advantage, impl=impl, main_grad=place, **rows.options
        )[0]

    with torch.no_grad(), pytest.raises(ValueError, match="grad mode"):
        run(hidden, weight)
    with pytest.raises(ValueError, match="checkpointing"):
        checkpoint(run, hidden, weight, use_reentrant=False)
    assert not main_grad.any()
    loss = run(hidden, weight, None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()
    with torch.no_grad():
        assert run(hidden, weight, None).item() == loss.item()


@BOTH
def test_trap_18_rows_left_out_write_zeros(impl):
    logits = torch.randn(3, 70)
    logits[1] = math.nan
    dz = row_gradient(impl, logits, torch.tensor([1, 2, 3]), torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3))
    assert not dz[1].any()
    assert dz[0].any()


@BOTH
def test_trap_18_the_buffers_last_rows_never_enter_the_weight_gradient(impl, head_case, run_scored):
    hidden, weight, targets = head_case(19, 40, dtype=torch.float32)
    pull = torch.randn(2, 19)
    chunked = run_scored(impl, hidden, weight, targets, pull, chunk_rows=16, resident=False)
    whole = run_scored(impl, hidden, weight, targets, pull, chunk_rows=32, resident=True)
    torch.testing.assert_close(chunked["d_weight"], whole["d_weight"], atol=2e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("spoiled", ["hidden", "anchor", "advantage"])
def test_trap_19_a_row_that_is_not_finite_reaches_loss_and_gradient(impl, spoiled, head_case, loss_rows, run_fused):
    hidden, weight, targets = head_case(6, 30, dtype=torch.float32)
    rows = loss_rows(hidden, weight, targets)
    rows.options = {}
    rows.anchor = ops.linear_logprob(hidden, weight, targets, impl="reference").logprob
    {"hidden": hidden[2], "anchor": rows.anchor[2:3], "advantage": rows.advantage[2:3]}[spoiled].fill_(math.nan)
    out = run_fused(impl, hidden, weight, targets, rows)
    assert math.isnan(out["loss"].item())
    assert torch.isnan(out["d_hidden"][2]).any()
    assert torch.isfinite(out["d_hidden"][[0, 1, 3, 4, 5]]).all()


@BOTH
def test_trap_20_two_runs_are_equal_bit_for_bit(impl, head_case, loss_rows, run_fused):
    head = head_case(30, 90, dtype=torch.float32)
    rows = loss_rows(*head)
    first, second = (run_fused(impl, *head, rows, chunk_rows=16, entropy_coef=0.01) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_trap_20_no_kernel_uses_atomics():
    for module in (linear_logprob, policy_loss, ragged):
        assert "atomic_" not in inspect.getsource(module)


def test_statistics_are_named_as_the_kernels_write_them():
    assert RowStatistics._fields == ("logprob", "entropy", "maximum", "log_sum")
