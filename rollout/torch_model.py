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

    `bias` is 0 where a row may look and -inf at its padding and at slots not yet written.
    """

    keys: torch.Tensor  # [L, B, K, S, D]
    values: torch.Tensor  # [L, B, K, S, D]
    bias: torch.Tensor  # [B, K, S]
    positions: torch.Tensor  # int64 [B]: the position of the row's next token
    filled: int  # slots written

    def repeat(self, rows: torch.Tensor, extra_slots: int) -> "Cache":
        """A cache of the rows `rows` (int64 [B], with repetition), with room for `extra_slots` more tokens."""
        slots = -(-(self.filled + extra_slots) // SLOT_BLOCK) * SLOT_BLOCK
        layers, _, kv_heads, _, head_dim = self.keys.shape
        size = (layers, len(rows), kv_heads, slots, head_dim)
        # Zeroed, because a weight of zero on a slot that was never written must give zero and not NaN.
        keys, values = self.keys.new_zeros(size), self.values.new_zeros(size)
        bias = self.bias.new_full((len(rows), kv_heads, slots), -torch.inf)
        for new, old in ((keys, self.keys), (values, self.values)):
            new[:, :, :, : self.filled] = old[:, rows]
        bias[:, :, : self.filled] = self.bias[rows]
        return Cache(keys, values, bias, self.positions[rows], self.filled)

    def move_rows(self, source: torch.Tensor, target: torch.Tensor, rows: int) -> None:
        """Overwrite the rows `target` by the rows `source` (int64, equally many), then keep the first `rows`."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, : self.filled] = tensor[:, source, :, : self.filled]
        self.bias[target] = self.bias[source]
        self.positions[target] = self.positions[source]
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]
        self.bias, self.positions = self.bias[:rows], self.positions[:rows]


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
        """Rotary cosines and signed sines [positions, 1, D]: a rotated x is x·cos + roll(x, D/2)·sin."""
        size = self.shape.head_dim
        frequency = 1.0 / self.shape.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
        cos, sin = angle.cos(), angle.sin()
        tables = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        cosines, sines = tables.unsqueeze(2).to(self.device, self.dtype)
        return cosines, sines

    def reserve_positions(self, positions: int) -> None:
        """Make the rotary tables long enough."""
        if len(self._cos) < positions:
            self._cos, self._sin = self._rotations(positions)

    def _hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [N, E] of token_ids int64 [N] at positions int64 [N]; `attend` does what is not per token."""
        s, weights = self.shape, self.weights
        cos, sin = self._cos[positions], self._sin[positions]
        x = weights.embedding[token_ids]
        for index, layer in enumerate(weights.layers):
            inner = F.rms_norm(x, (s.hidden,), layer.attention_norm, s.eps)
            qkv = F.linear(inner, layer.qkv).view(len(x), s.heads + 2 * s.kv_heads, s.head_dim)
            qk, value = qkv.split([s.heads + s.kv_heads, s.kv_heads], dim=1)
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (s.head_dim,), None, s.eps) * layer.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(s.head_dim // 2, -1), sin)
            query, key = qk.split([s.heads, s.kv_heads], dim=1)
            x = torch.addmm(x, attend(index, query, key, value), layer.out.t())
            inner = F.rms_norm(x, (s.hidden,), layer.mlp_norm, s.eps)
            gate, up = F.linear(inner, layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down.t())
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(F.rms_norm(hidden, (self.shape.hidden,), self.weights.norm, self.shape.eps), self.weights.head)

    @torch.inference_mode()
    def prefill(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Logits [R, V] after each prompt, and the prompts' cache of P slots.

        token_ids int64 [R, P], padded on the left with any id of the vocabulary; lengths int64 [R], each at least 1.
        """
        s = self.shape
        rows, slots = token_ids.shape
        slot = torch.arange(slots, device=self.device)
        first = (slots - lengths).unsqueeze(1)
        size = (s.layers, rows, s.kv_heads, slots, s.head_dim)
        keys, values = (torch.empty(size, device=self.device, dtype=self.dtype) for _ in range(2))
        real = slot >= first
        # Padding looks at itself: a softmax over nothing is NaN, and would spread.
        visible = (real.unsqueeze(1) & (slot <= slot.unsqueeze(1))) | torch.eye(slots, device=self.device).bool()

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (t.view(rows, slots, -1, s.head_dim).transpose(1, 2) for t in (query, key, value))
            keys[index], values[index] = key, value
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible.unsqueeze(1), enable_gqa=s.heads != s.kv_heads
            )
            return mixed.transpose(1, 2).reshape(rows * slots, s.heads * s.head_dim)

        positions = (slot - first).clamp_(min=0)
        hidden = self._hidden(token_ids.flatten(), positions.flatten(), attend).view(rows, slots, s.hidden)
        bias = torch.zeros(real.shape, device=self.device, dtype=self.dtype).masked_fill_(~real, -torch.inf)
        bias = bias.unsqueeze(1).repeat(1, s.kv_heads, 1)
        return self._logits(hidden[:, -1]), Cache(keys, values, bias, lengths.clone(), slots)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, V] after one more token per row, int64 [B], which joins the cache."""
        s = self.shape
        rows, slot = len(token_ids), cache.filled
        width = (slot // SLOT_BLOCK + 1) * SLOT_BLOCK
        cache.bias[:, :, slot] = 0
        bias = cache.bias.view(rows * s.kv_heads, 1, -1)[:, :, :width]

        def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            cache.keys[index, :, :, slot], cache.values[index, :, :, slot] = key, value
            keys, values = (t[index].flatten(0, 1)[:, :width] for t in (cache.keys, cache.values))
            query = query.reshape(rows * s.kv_heads, s.heads // s.kv_heads, s.head_dim)
            scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=s.head_dim**-0.5)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.dtype)
            return torch.bmm(weights, values).view(rows, s.heads * s.head_dim)

        hidden = self._hidden(token_ids, cache.positions, attend)
        cache.positions += 1
        cache.filled += 1
        return self._logits(hidden)
