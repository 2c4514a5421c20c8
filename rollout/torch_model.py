"""Qwen3 and Llama decoders as plain tensor functions over a preallocated key-value cache, no modules.

Shapes: R prompts, P slots of the longest prompt, B rows, N = R·P or B tokens of a call, E hidden size, V vocabulary,
L layers, H query heads, K key-value heads, D head size, S cache slots.

Prompts are padded on the left, so that all rows write their next key into the same slot; a row's positions count from
its own first token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rollout.torch_weights import Weights

# On CPU, softmax and batched products over whole vectors are several times faster than over a ragged end.
SLOT_BLOCK = 16

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Cache:
    """Keys and values of B rows, all filled up to the same slot.

    All S slots take part in every step, masked by `bias` (0 where a row may look, -inf at its padding and at slots not
    yet written): a contiguous read of some empty slots is faster than a strided read of the full ones. So S is kept
    near what is filled, and grows by a quarter.
    """

    keys: list[torch.Tensor]  # L of [B, K, S, D], zero where not written
    values: list[torch.Tensor]
    bias: torch.Tensor  # [B, K, S]
    positions: torch.Tensor  # int64 [B]: the position of the row's next token; [1] where all rows' are equal
    filled: int  # slots written

    @property
    def full(self) -> bool:
        return self.filled == self.bias.shape[-1]

    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, int64 [B], which may repeat."""
        self.keys = [old[rows] for old in self.keys]
        self.values = [old[rows] for old in self.values]
        self.bias = self.bias[rows]
        if len(self.positions) > 1:
            self.positions = self.positions[rows]

    def grow(self) -> None:
        """Make room for at least one more token."""
        slots = (max(self.filled + 1, self.filled * 5 // 4) + SLOT_BLOCK - 1) // SLOT_BLOCK * SLOT_BLOCK
        more = slots - self.filled
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = F.pad(old, (0, 0, 0, more))
        self.bias = F.pad(self.bias, (0, more), value=-torch.inf)


def _rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension; on CPU in half the passes of torch's own."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * (norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_())).to(x.dtype)


class TorchModel:
    """A decoder's two forward passes: whole prompts, and one token per row.

    Source: the definitions of Qwen3 and Llama in transformers 5 (RMSNorm, rotary positions, SwiGLU, grouped queries).
    """

    def __init__(self, model_dir: Path, *, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.weights = Weights(model_dir, device=self.device, dtype=dtype)
        self.shape = self.weights.shape
        self._cos, self._sin = self._rotations(1)

    def _rotations(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cosines and signed sines [positions, 1, 1, D]: a rotated x is x·cos + roll(x, D/2)·sin."""
        size = self.shape.head_dim
        frequency = 1.0 / self.shape.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
        cos, sin = angle.cos(), angle.sin()
        tables = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        cosines, sines = tables.view(2, positions, 1, 1, size).to(self.device, self.dtype)
        return cosines, sines

    def reserve_positions(self, positions: int) -> None:
        """Make the rotary tables long enough."""
        if len(self._cos) < positions:
            self._cos, self._sin = self._rotations(positions)

    def _hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [N, E] of token_ids int64 [N] at positions int64 [N] or [1]; `attend` mixes the tokens.

        attend(layer, query [N, K, H/K, D], key [N, K, D], value [N, K, D]) -> [N, H·D]
        """
        s = self.shape
        cos, sin = self._cos[positions], self._sin[positions]
        half = s.head_dim // 2
        x = self.weights.embedding[token_ids]
        for index, layer in enumerate(self.weights.layers):
            inner = _rms_norm(x, s.eps).mul_(layer.attention_norm)
            qkv = F.linear(inner, layer.qkv).view(len(x), s.kv_heads, -1, s.head_dim)
            qk, value = qkv[:, :, :-1], qkv[:, :, -1]
            if layer.qk_norm is None:
                qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            else:
                # The norm's weights ride on the rotation: two small products where all rows stand at one position.
                qk = _rms_norm(qk, s.eps)
                norm = layer.qk_norm
                qk = torch.addcmul(qk * (norm * cos), qk.roll(half, -1), norm.roll(half, -1) * sin)
            mixed = attend(index, qk[:, :, :-1], qk[:, :, -1], value)
            x = torch.addmm(x, mixed, layer.out.t())
            inner = _rms_norm(x, s.eps).mul_(layer.mlp_norm)
            gate, up = F.linear(inner, layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down.t())
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(_rms_norm(hidden, self.shape.eps).mul_(self.weights.norm), self.weights.head)

    @torch.inference_mode()
    def prefill(self, token_ids: torch.Tensor, lengths: torch.Tensor, *, equal: bool) -> tuple[torch.Tensor, Cache]:
        """Logits [R, V] after each prompt, and the prompts' cache of P slots.

        token_ids int64 [R, P], padded on the left with any id of the vocabulary; lengths int64 [R], each at least 1;
        `equal` says that all lengths are P.
        """
        s = self.shape
        rows, slots = token_ids.shape
        slot = torch.arange(slots, device=self.device)
        first = (slots - lengths).unsqueeze(1)
        real = slot >= first
        # Padding looks at itself: a softmax over nothing is NaN, and would spread.
        visible = (real.unsqueeze(1) & (slot <= slot.unsqueeze(1))) | torch.eye(slots, device=self.device).bool()
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (t.reshape(rows, slots, -1, s.head_dim).transpose(1, 2) for t in (query, key, value))
            keys.append(key)
            values.append(value)
            gqa = s.heads != s.kv_heads
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1), enable_gqa=gqa)
            return mixed.transpose(1, 2).reshape(rows * slots, s.heads * s.head_dim)

        positions = (slot - first).clamp_(min=0)
        hidden = self._hidden(token_ids.flatten(), positions.flatten(), attend).view(rows, slots, s.hidden)
        bias = torch.zeros(real.shape, device=self.device, dtype=self.dtype).masked_fill_(~real, -torch.inf)
        bias = bias.unsqueeze(1).repeat(1, s.kv_heads, 1)
        return self._logits(hidden[:, -1]), Cache(keys, values, bias, lengths[:1] if equal else lengths, slots)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, V] after one more token per row, int64 [B], which joins the cache."""
        if cache.full:
            cache.grow()
        s = self.shape
        slot = cache.filled
        cache.bias[:, :, slot] = 0
        bias = cache.bias.flatten(0, 1).unsqueeze(1)

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = cache.keys[index], cache.values[index]
            keys[:, :, slot], values[:, :, slot] = key, value
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            scores = torch.baddbmm(bias, query.flatten(0, 1), keys.transpose(1, 2), alpha=s.head_dim**-0.5)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.dtype)
            return torch.bmm(weights, values).view(len(token_ids), s.heads * s.head_dim)

        hidden = self._hidden(token_ids, cache.positions, attend)
        cache.positions = cache.positions + 1
        cache.filled += 1
        return self._logits(hidden)
