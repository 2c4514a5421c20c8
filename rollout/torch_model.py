"""Qwen3 and Llama decoders as plain tensor functions over a preallocated key-value cache, no modules.

Shapes: R prompts, P slots of the longest prompt, B rows, N = R·P or B tokens of a call, E hidden size, V vocabulary,
L layers, H query heads, K key-value heads, D head size, S cache slots.

Prompts are padded on the left, so that all rows write their next key into the same slot; a row's positions count from
its own first token.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rollout.torch_cache import Arena, Cache, StaticCache
from rollout.torch_weights import Weights

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Store = Callable[[int, torch.Tensor, torch.Tensor], None]


class TorchModel:
    """A decoder's two forward passes: whole prompts, and one token per row.

    `static` says that few kernels matter more than few bytes, as on a GPU; both ways run on either device and agree up
    to rounding.

    Source: the definitions of Qwen3 and Llama in transformers 5 (RMSNorm, rotary positions, SwiGLU, grouped queries).
    """

    def __init__(self, model_dir: Path, *, device: str, dtype: torch.dtype, static: bool) -> None:
        self.device, self.dtype, self.static = torch.device(device), dtype, static
        self.weights = Weights(model_dir, device=self.device, dtype=dtype)
        self.shape = self.weights.shape
        self._eps = torch.tensor(self.shape.eps, device=self.device)
        self.rotations = self._rotation_table(1)
        self.arena = Arena(self.device, dtype)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array on the model's device."""
        return torch.from_numpy(array).to(self.device)

    def _rotation_table(self, positions: int) -> torch.Tensor:
        """exp(i·position·frequency), complex64 [positions, 1, 1, D/2]."""
        size = self.shape.head_dim
        frequency = 1.0 / self.shape.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
        return torch.polar(torch.ones_like(angle), angle).view(positions, 1, 1, -1).to(self.device)

    def reserve_positions(self, positions: int) -> None:
        """Make the rotary table long enough."""
        if len(self.rotations) < positions:
            self.rotations = self._rotation_table(positions)

    def _rms_scale(self, x: torch.Tensor) -> torch.Tensor:
        """1 / sqrt(mean(x²) + eps) over the last dimension, float32 [..., 1]; F.rms_norm takes twice as long on CPU."""
        return torch.add(self._eps, x.float().square().sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.static:
            return F.rms_norm(x, weight.shape, weight, self.shape.eps)
        return (x * self._rms_scale(x)).to(self.dtype).mul_(weight)

    def _hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [N, E] of token_ids int64 [N] at positions int64 [N] or [1]; `attend` mixes the tokens.

        attend(layer, query [N, K, H/K, D], key [N, K, D], value [N, K, D]) -> [N, H·D]
        """
        s = self.shape
        rotation = self.rotations[positions]
        x = self.weights.embedding[token_ids]
        for index, layer in enumerate(self.weights.layers):
            qkv = torch.mm(self._normed(x, layer.attention_norm), layer.qkv)
            qkv = qkv.view(len(x), s.kv_heads, -1, s.head_dim)
            qk = qkv[:, :, :-1].float()  # in float32 a view of qkv
            if layer.qk_norm is not None and self.static:
                qk = F.rms_norm(qk, qk.shape[-1:], eps=s.eps).mul_(layer.qk_norm)
            elif layer.qk_norm is not None:
                qk.mul_(self._rms_scale(qk)).mul_(layer.qk_norm)
            torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(rotation)
            qk = qk.to(self.dtype)
            x.addmm_(attend(index, qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]), layer.out)
            gate, up = torch.mm(self._normed(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x.addmm_(F.silu(gate, inplace=True).mul_(up), layer.down)
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.mm(self._normed(hidden, self.weights.norm), self.weights.head)

    @torch.inference_mode()
    def prefill(self, token_ids: torch.Tensor, lengths: torch.Tensor, store: Store) -> torch.Tensor:
        """Logits [R, V] after each prompt; store(layer, key, value), [R, K, P, D] each, keeps what decoding reads.

        token_ids int64 [R, P], padded on the left with any id of the vocabulary; lengths int64 [R], each at least 1.
        """
        s = self.shape
        rows, slots = token_ids.shape
        slot = torch.arange(slots, device=self.device)
        first = (slots - lengths).unsqueeze(1)
        real = slot >= first
        # Padding looks at itself: a softmax over nothing is NaN, and would spread.
        visible = (real.unsqueeze(1) & (slot <= slot.unsqueeze(1))) | torch.eye(slots, device=self.device).bool()
        if self.static:
            visible = visible.repeat(1, s.heads // s.kv_heads, 1)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (t.reshape(rows, slots, -1, s.head_dim).transpose(1, 2) for t in (query, key, value))
            store(index, key, value)
            if self.static:
                # The heads of a group as more queries of one head: with enable_gqa, no CUDA kernel takes a mask, and
                # the plain formula would hold all scores and repeated keys.
                query = query.reshape(rows, s.kv_heads, -1, s.head_dim)
            gqa = query.shape[1] != s.kv_heads
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1), enable_gqa=gqa)
            mixed = mixed.reshape(rows, s.heads, slots, s.head_dim)
            return mixed.transpose(1, 2).reshape(rows * slots, s.heads * s.head_dim)

        positions = (slot - first).clamp_(min=0)
        hidden = self._hidden(token_ids.flatten(), positions.flatten(), attend).view(rows, slots, s.hidden)
        return self._logits(hidden[:, -1])

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, cache: Cache | StaticCache) -> torch.Tensor:
        """Logits [B, V] after one more token per row, int64 [B], which joins the cache."""
        s = self.shape
        bias = cache.begin_step()

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = cache.write(index, key.flatten(0, 1), value.flatten(0, 1))
            scores = torch.baddbmm(bias, query.flatten(0, 1), keys.transpose(1, 2), alpha=s.head_dim**-0.5)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.dtype)
            return torch.bmm(weights, values).view(len(token_ids), s.heads * s.head_dim)

        hidden = self._hidden(token_ids, cache.positions, attend)
        cache.end_step()
        return self._logits(hidden)
