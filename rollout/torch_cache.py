"""The key-value cache of a batch, and the memory it lives in.

Shapes: R prompts, B rows, L layers, K key-value heads, D head size, S slots.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

# On CPU, softmax and batched products over whole vectors are several times faster than over a ragged end.
SLOT_BLOCK = 16
# On a GPU each width of attention is a captured graph of its own.
STATIC_BLOCK = 128


def padding_bias(lengths: torch.Tensor, slots: int, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """0 at the last `length` of the slots, where a prompt is, and -inf at its padding: [R·K, 1, S]."""
    padding = torch.arange(slots, device=lengths.device) < (slots - lengths).unsqueeze(1)
    bias = torch.zeros(padding.shape, device=lengths.device, dtype=dtype).masked_fill_(padding, -torch.inf)
    return bias.repeat_interleave(kv_heads, 0).unsqueeze(1)


def static_slots(needed: int) -> int:
    """Rounded up to whole blocks."""
    return -(-needed // STATIC_BLOCK) * STATIC_BLOCK


class Arena:
    """Lends memory and keeps what comes back, at most three pieces: fresh memory costs a page fault per 4 kB."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._free: list[torch.Tensor] = []  # flat, by size

    def lend(self, *size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The flat memory, to be given back, and a contiguous tensor of that size in it, of undefined content."""
        wanted = prod(size)
        fitting = [index for index, flat in enumerate(self._free) if len(flat) >= wanted]
        flat = self._free.pop(fitting[0]) if fitting else torch.empty(wanted, device=self._device, dtype=self._dtype)
        return flat, flat[:wanted].view(size)

    def give_back(self, flat: torch.Tensor) -> None:
        """Take memory back that nobody reads any more."""
        self._free = sorted([*self._free, flat], key=len)[-3:]


@dataclass
class Cache:
    """Keys and values of B rows, all filled up to the same slot.

    All S slots take part in every step, masked by `bias` (0 where a row may look, -inf at its padding and at slots not
    yet written): a contiguous read of some empty slots is faster than a strided read of the full ones. So S is kept
    near what is filled, and grows by a quarter.
    """

    memory: torch.Tensor  # flat, lent by the arena
    keys_values: torch.Tensor  # [L, 2, B·K, S, D] in it, zero where not written
    bias: torch.Tensor  # [B·K, 1, S]
    positions: torch.Tensor  # int64 [B]: the position of the row's next token; [1] where all rows' are equal
    filled: int  # slots written
    kv_heads: int
    arena: Arena

    def begin_step(self) -> torch.Tensor:
        """Make the next slot visible; the bias [B·K, 1, S] of the step."""
        if self.filled == self.bias.shape[-1]:
            self.grow()
        self.bias[:, :, self.filled] = 0
        return self.bias

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [B·K, D] into the next slot; all keys and values of the layer, [B·K, S, D] each."""
        keys, values = self.keys_values[layer]
        keys.select(1, self.filled).copy_(key)
        values.select(1, self.filled).copy_(value)
        return keys, values

    def end_step(self) -> None:
        """Count what was written."""
        self.positions = self.positions + 1
        self.filled += 1

    @torch.inference_mode()
    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, int64 [B], which may repeat."""
        layers, _, _, slots, size = self.keys_values.shape
        memory, new = self.arena.lend(layers, 2, len(rows) * self.kv_heads, slots, size)
        old = self.keys_values.view(2 * layers, -1, self.kv_heads * slots * size)
        torch.index_select(old, 1, rows, out=new.view(2 * layers, len(rows), -1))
        self._replace(memory, new)
        self.bias = self.bias.unflatten(0, (-1, self.kv_heads))[rows].flatten(0, 1)
        if len(self.positions) > 1:
            self.positions = self.positions[rows]

    @torch.inference_mode()
    def grow(self) -> None:
        """Make room for at least one more token."""
        layers, _, rows, _, size = self.keys_values.shape
        slots = -(-max(self.filled + 1, self.filled * 5 // 4) // SLOT_BLOCK) * SLOT_BLOCK
        memory, new = self.arena.lend(layers, 2, rows, slots, size)
        new[:, :, :, : self.filled] = self.keys_values
        # A weight of zero on a slot that was never written must give zero, not NaN.
        new[:, :, :, self.filled :] = 0
        self._replace(memory, new)
        self.bias = F.pad(self.bias, (0, slots - self.filled), value=-torch.inf)

    def _replace(self, memory: torch.Tensor, keys_values: torch.Tensor) -> None:
        self.release()
        self.memory, self.keys_values = memory, keys_values

    def release(self) -> None:
        """Give the memory back; the cache cannot be used afterwards."""
        self.arena.give_back(self.memory)


@dataclass
class StaticCache:
    """Keys and values of B rows in one piece of memory that is allocated once, with all that a step reads or counts.

    A step changes tensors and no number of Python, so that a CUDA graph of one step is a graph of the next. The first
    `width` slots take part.
    """

    keys_values: torch.Tensor  # [L, 2, B·K, S, D], zero where not written
    bias: torch.Tensor  # [B·K, 1, S]
    positions: torch.Tensor  # int64 [B]: the position of the row's next token
    slot: torch.Tensor  # int64 [1]: slots written
    width: int
    kv_heads: int

    def begin_step(self) -> torch.Tensor:
        """Make the next slot visible; the bias [B·K, 1, width] of the step."""
        return self.bias.index_fill_(2, self.slot, 0)[:, :, : self.width]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [B·K, D] into the next slot; the keys and values that take part, [B·K, width, D] each."""
        keys, values = self.keys_values[layer]
        keys.index_copy_(1, self.slot, key.unsqueeze(1))
        values.index_copy_(1, self.slot, value.unsqueeze(1))
        return keys[:, : self.width], values[:, : self.width]

    def end_step(self) -> None:
        """Count what was written."""
        self.positions.add_(1)
        self.slot.add_(1)

    def widen(self, filled: int) -> None:
        """Let more slots take part than the `filled` written: by an eighth, because every width is captured anew."""
        self.width = min(static_slots(filled + 1 + filled // 8), self.bias.shape[-1])

    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, int64 [B], ascending: they move down in place, one layer's keys or values at a time."""
        for part in self.keys_values.flatten(0, 1):
            by_row = part.unflatten(0, (-1, self.kv_heads))[:, :, : self.width]
            by_row[: len(rows)] = by_row[rows]
        self.keys_values = self.keys_values[:, :, : len(rows) * self.kv_heads]
        self.bias = self.bias.unflatten(0, (-1, self.kv_heads))[rows].flatten(0, 1)
        self.positions = self.positions[rows]
