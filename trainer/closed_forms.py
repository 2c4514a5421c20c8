"""RMSNorm and rotary embeddings of fp32 models on a CPU, with their gradients written out: what Liger is on a GPU.

transformers makes each of a dozen elementwise operations and autograd as many again, every one a pass over memory.
Shapes: N vectors of size D; other dimensions as transformers has them.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # norms without an offset, rotation by halves
Rotate = Callable[..., tuple[Tensor, Tensor]]


class RMSNorm(torch.autograd.Function):
    """y = w·n with n = x·r, r = (mean x² + ε)^(−1/2).

    dx = r·(w·dy − n·mean(w·dy·n)),  dw = Σ dy·n
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        r_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n_ND = x_ND * r_N1
        ctx.save_for_backward(n_ND, r_N1, weight_D)
        return (n_ND * weight_D).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        n_ND, r_N1, weight_D = ctx.saved_tensors
        dy_ND = grads[0].reshape(n_ND.shape)
        product_ND = dy_ND * n_ND
        mean_N = torch.mv(product_ND, weight_D).div_(-n_ND.shape[1])
        dweight_D = product_ND.sum(0)
        dx_ND = torch.mul(dy_ND, weight_D, out=product_ND).addcmul_(n_ND, mean_N[:, None]).mul_(r_N1)
        return dx_ND.view(grads[0].shape), dweight_D, None


class Rotation(torch.autograd.Function):
    """(a, b) to (a·cos − b·sin, b·cos + a·sin) by halves of the last dimension; the gradient turns the other way.

    cos and sin have two equal halves, as transformers makes them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out, sin = x * cos, sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def use_closed_forms(model: PreTrainedModel) -> bool:
    """Exchange the norms of this model, and the rotation of its family in this process; False where it is another."""
    if model.config.model_type not in MODEL_TYPES:
        return False
    family: Any = sys.modules[type(model).__module__]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_normed, module)
    if not isinstance(family.apply_rotary_pos_emb, partial):
        family.apply_rotary_pos_emb = partial(_rotated, family.apply_rotary_pos_emb)
    return True


def _normed(module: Any, hidden_states: Tensor) -> Tensor:
    if not _applies(hidden_states):
        return type(module).forward(module, hidden_states)
    found: Tensor = RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return found


def _rotated(
    original: Rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if not _applies(q):
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)


def _applies(x: Tensor) -> bool:
    """Below fp32, transformers rounds in places of its own."""
    return x.device.type == "cpu" and x.dtype == torch.float32
