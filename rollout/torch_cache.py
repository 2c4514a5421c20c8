"""The key-value cache of a batch, and the memory it lives in.

Shapes: B rows, L layers, K key-value heads, D head size, S slots.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

# On CPU, softmax and batched products over whole vectors are several times faster than over a ragged end.
SLOT_BLOCK = 16


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

    @property
    def full(self) -> bool:
        return self.filled == self.bias.shape[-1]

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
