"""Public functions: log-prob of a linear head, policy loss, and both fused. `impl` is explicit and nothing falls back.

`impl`: "reference" (plain PyTorch and autograd, the specification), "torch" (chunked, in place, no graph over logits:
the CPU path), "triton" (library products and one Triton program per row), "auto" (torch on a CPU, triton on CUDA).

Shapes: T tokens of a packed batch, S sequences in it, V vocabulary, H hidden size. Metrics are float32 [T] and 0
where a token is masked: "ratio", "clipped_low", "clipped_high", "dual_clipped" (0 or 1) and "kl" (k3, before β and
kl_weight).
"""

import torch
from torch import Tensor

from kernels import autograd, reference
from kernels.arguments import (
    Implementation,
    LossRows,
    LossSettings,
    Ratio,
    Segments,
    check_head,
    check_rows,
    implementation,
    inverse_temperature,
    working_dtype,
)
from kernels.reference import LogProb

Metrics = dict[str, Tensor]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    impl: Implementation = "auto",
    fp32_logits: bool = True,
    resident: bool | None = None,
    chunk_rows: int | None = None,
) -> LogProb:
    """Log-prob of each target under a linear head and the head's entropy, differentiable in hidden and weight.

        z = hidden @ weight.T / temperature,  logprob_t = z[t, y_t] − logsumexp(z_t),  entropy_t = −Σ_v p log p

    Shapes: hidden [T, H], weight [V, H] of the same float dtype, targets [T] integers in [0, V), temperature a float or
    [T]. Results [T] in nats, float32 (float64 for float64 inputs). Without grad it is one product and no graph, and its
    log-probs equal those of `linear_policy_loss` bit for bit. A banned token's −inf logit has p = 0; a NaN stays NaN.

    fp32_logits: keep logits in float32 under bfloat16 operands (bfloat16 logits are wrong by 0.015 nats on average).
    resident: keep all logits for the backward pass (three products, T·V entries) or form them again (four, one chunk);
    None keeps them up to `kernels.autograd.RESIDENT_BYTES`. chunk_rows: rows of a chunk, a multiple of 16.
    """
    check_head(hidden, weight, targets)
    scale = inverse_temperature(temperature, hidden.shape[0], hidden)
    name = implementation(impl, hidden.device)
    if name == "reference":
        return reference.selected_logprob(hidden, weight, targets, temperature=temperature)
    plan = autograd.HeadPlan(autograd.backend(name), targets.contiguous(), scale, fp32_logits, chunk_rows)
    return autograd.linear_logprob(hidden, weight, plan, resident)


def policy_loss(
    logprob: Tensor,
    anchor_logprob: Tensor,
    advantage: Tensor,
    *,
    is_weight: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    impl: Implementation = "auto",
    ratio: Ratio = "token",
    cu_seqlens: Tensor | None = None,
    kl_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy loss and k3 KL penalty per token [T], differentiable in logprob.

        x_t = clamp(logprob_t − anchor_t, ±20)
        token:    r_t = e^{x_t}                                     (PPO; eq. 2 of arXiv:2605.30789)
        sequence: r_t = e^{mean of x over t's sequence}             (GSPO, arXiv:2507.18071, eq. 7)
        P_t = max(−A_t r_t, −A_t clip(r_t, 1 − clip_low, 1 + clip_high));  −A_t·dual_clip if A_t < 0 and r_t > dual_clip
        cispo:    P_t = −stop_gradient(clip(e^{x_t}, 1 − clip_low, 1 + clip_high))·A_t·logprob_t   (arXiv:2506.13585)
        K_t = min(e^d − d − 1, 10),  d = clamp(ref_t − logprob_t, ±20)
        loss_t = is_weight_t·P_t + kl_coef·kl_weight_t·K_t

    No gradient passes where a clamp holds (verl's `compute_policy_loss_vanilla`, `kl_penalty`). A weight of 0 takes
    its term out even if the term is infinite; mask False takes the token out of loss, metrics, gradient and sequence
    mean. A NaN in a token that counts stays NaN.

    Shapes: all tensors [T]; cu_seqlens [S+1], needed for ratio="sequence" (a CPU tensor saves a host sync).
    """
    tokens = logprob.numel()
    check_rows("logprob", logprob, tokens)
    settings = LossSettings(ratio, clip_low, clip_high, dual_clip, kl_coef)
    rows = _rows(
        logprob, tokens, settings, anchor_logprob, advantage, is_weight, ref_logprob, kl_weight, cu_seqlens, mask
    )
    name = implementation(impl, logprob.device)
    work = logprob.to(working_dtype(logprob.dtype))
    if name == "reference":
        return reference.policy_loss(work, rows, settings)
    return autograd.policy_loss(work, rows, settings, autograd.backend(name))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    anchor_logprob: Tensor,
    advantage: Tensor,
    *,
    is_weight: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    token_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    impl: Implementation = "auto",
    ratio: Ratio = "token",
    cu_seqlens: Tensor | None = None,
    kl_weight: Tensor | None = None,
    fp32_logits: bool = True,
    main_grad: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """`linear_logprob` and `policy_loss` in one pass: (loss, logprob, entropy, metrics), gradients formed in forward.

        loss = Σ_t token_weight_t·(policy_loss_t − entropy_coef·entropy_t)

    The scalar is differentiable in hidden and weight; logprob, entropy [T] and metrics are detached. token_weight [T]
    is the mask and every normaliser (None: 1); a token of weight 0 has no gradient and no metrics, whatever its
    anchor or advantage hold. Nothing of size [T, V] is made. Each pass may run backward once; backward multiplies the
    ready gradients by the scalar's upstream gradient on the device. A weight that needs no gradient costs two
    products.

    main_grad [V, H]: add the weight's gradient there, in forward, instead of returning it; the scalar's upstream
    gradient must then be 1 (put every factor into token_weight). Refused without grad and inside activation
    checkpointing, which runs forward twice. The other arguments are those of `linear_logprob` and `policy_loss`.
    """
    check_head(hidden, weight, targets)
    check_rows("token_weight", token_weight, hidden.shape[0])
    settings = LossSettings(ratio, clip_low, clip_high, dual_clip, kl_coef)
    mask = None if token_weight is None else token_weight != 0
    more = (anchor_logprob, advantage, is_weight, ref_logprob, kl_weight, cu_seqlens, mask)
    rows = _rows(hidden, hidden.shape[0], settings, *more)
    name = implementation(impl, hidden.device)
    head = (hidden, weight, targets, temperature)
    return _fused(head, rows, settings, entropy_coef, token_weight, name, fp32_logits, main_grad, chunk_rows)


def _fused(
    head: tuple[Tensor, Tensor, Tensor, float | Tensor],
    rows: LossRows,
    settings: LossSettings,
    entropy_coef: float,
    token_weight: Tensor | None,
    name: str,
    fp32_logits: bool,
    main_grad: Tensor | None,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    hidden, weight, targets, temperature = head
    scale = inverse_temperature(temperature, hidden.shape[0], hidden)
    if name == "reference":
        if main_grad is not None:
            raise ValueError("main_grad needs impl='torch' or 'triton': the reference leaves gradients to autograd")
        return reference.linear_policy_loss(
            hidden, weight, targets, rows, settings,
            entropy_coef=entropy_coef, token_weight=token_weight, temperature=temperature,
        )  # fmt: skip
    plan = autograd.HeadPlan(autograd.backend(name), targets.contiguous(), scale, fp32_logits, chunk_rows)
    weights = torch.ones_like(scale) if token_weight is None else token_weight.detach().to(scale.dtype).contiguous()
    job = autograd.LossJob(plan, rows, settings, weights, entropy_coef, main_grad)
    return autograd.linear_policy_loss(hidden, weight, job)


def _rows(
    like: Tensor,
    tokens: int,
    settings: LossSettings,
    anchor: Tensor,
    advantage: Tensor,
    is_weight: Tensor | None,
    ref: Tensor | None,
    kl_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> LossRows:
    """The per-token arguments, checked, detached and in one place."""
    named = {"anchor_logprob": anchor, "advantage": advantage, "is_weight": is_weight}
    named |= {"ref_logprob": ref, "kl_weight": kl_weight, "mask": mask}
    for name, value in named.items():
        check_rows(name, value, tokens)
    if settings.kl_coef and ref is None:
        raise ValueError(f"kl_coef = {settings.kl_coef} needs ref_logprob [T]; pass kl_coef=0 for no penalty")
    if (settings.ratio == "sequence") and cu_seqlens is None:
        raise ValueError("ratio='sequence' needs cu_seqlens [S+1], the packed sequences' bounds")
    segments = None
    if settings.ratio == "sequence":
        assert cu_seqlens is not None
        segments = Segments.of(cu_seqlens, tokens, like.device)

    def detached(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return LossRows(
        anchor.detach(), advantage.detach(), detached(is_weight), detached(ref), detached(kl_weight), mask, segments
    )
