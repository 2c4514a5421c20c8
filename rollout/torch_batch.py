"""A batch in work: its cache, and the logits of every row's next token.

GrowingBatch is for CPU, where a step costs arithmetic and fresh memory costs page faults. StaticBatch is for a GPU,
where a step costs launches and memory is scarce: nothing moves, so that steps are replayed as CUDA graphs.

Shapes: R prompts, P slots of the longest prompt, B rows, V vocabulary, K key-value heads, D head size, S cache slots.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from rollout.torch_cache import Cache, StaticCache, padding_bias, static_slots
from rollout.torch_model import TorchModel

# Prompt tokens that go through the model at once: enough to fill a GPU, few enough to be small beside a cache.
_PREFILL_TOKENS = 8192
# A capture takes the host about as long as this many steps without a graph.
_CAPTURE_STEPS = 4


class Prompts(NamedTuple):
    """Different prompts, padded on the left, and which of them each row continues."""

    token_ids: np.ndarray  # int64 [R, P]
    lengths: np.ndarray  # int64 [R]
    of_row: np.ndarray  # int64 [B]


class Batch(Protocol):
    """What the engine's loop needs of a batch. Begins with the prompts' logits."""

    compact_at: float  # finished rows leave when this part of the batch is still open

    def __init__(self, model: TorchModel, prompts: Prompts, max_tokens: int) -> None: ...

    def logits(self) -> torch.Tensor:
        """[B, V], of the token after all that were fed; valid until the next call of `feed`."""
        ...

    def feed(self, tokens: torch.Tensor) -> None:
        """Append a token to each row, int64 [B] on the device."""
        ...

    def take(self, rows: torch.Tensor) -> None:
        """Keep the rows `rows`, int64 [B], ascending."""
        ...

    def release(self) -> None:
        """Give the memory back; called once."""
        ...


class GrowingBatch:
    """Computes when it is asked for logits: by then the rows that finished have left."""

    compact_at = 3 / 4  # leaving costs about half a step of the rest

    def __init__(self, model: TorchModel, prompts: Prompts, max_tokens: int) -> None:
        s = model.shape
        token_ids, lengths, of_row = (model.tensor(array) for array in prompts)
        rows, slots = token_ids.shape
        memory, cached = model.arena.lend(s.layers, 2, rows * s.kv_heads, slots, s.head_dim)

        def store(layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
            cached[layer, 0], cached[layer, 1] = key.flatten(0, 1), value.flatten(0, 1)

        logits = model.prefill(token_ids, lengths, store)
        bias = padding_bias(lengths, slots, s.kv_heads, model.dtype)
        positions = lengths[:1] if (prompts.lengths == slots).all() else lengths
        self._model = model
        self._cache = Cache(memory, cached, bias, positions, slots, s.kv_heads, model.arena)
        self._cache.grow()  # first, while it is small
        self._cache.take(of_row)
        self._logits = logits[of_row]
        self._tokens: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        if self._tokens is not None:
            self._logits = self._model.decode(self._tokens, self._cache)
            self._tokens = None
        return self._logits

    def feed(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def take(self, rows: torch.Tensor) -> None:
        assert self._tokens is not None, "rows leave after their token was fed"
        self._cache.take(rows)
        self._tokens = self._tokens[rows]

    def release(self) -> None:
        self._cache.release()


class StaticBatch:
    """Computes when it is fed: the device goes on while the host looks at the tokens.

    A step's first run of a shape is not captured: it loads kernels and workspaces, which a capture must not. The graph
    holds addresses of the cache, the weights (which are replaced in place) and the rotary table.
    """

    compact_at = 1 / 2  # leaving costs a capture

    @torch.inference_mode()
    def __init__(self, model: TorchModel, prompts: Prompts, max_tokens: int) -> None:
        s = model.shape
        self._model = model
        self._filled = prompts.token_ids.shape[1]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        slots = static_slots(self._filled + max_tokens)
        lengths = model.tensor(prompts.lengths)[model.tensor(prompts.of_row)]
        rows = len(lengths)
        bias = padding_bias(lengths, self._filled, s.kv_heads, model.dtype)
        self._cache = StaticCache(
            keys_values=lengths.new_zeros(s.layers, 2, rows * s.kv_heads, slots, s.head_dim, dtype=model.dtype),
            bias=F.pad(bias, (0, slots - self._filled), value=-torch.inf),
            positions=lengths,
            slot=lengths.new_tensor([self._filled]),
            width=self._filled,
            kv_heads=s.kv_heads,
        )
        self._tokens = torch.empty_like(lengths)
        self._logits = lengths.new_empty(rows, s.vocab, dtype=model.dtype)
        at_once = max(1, _PREFILL_TOKENS // self._filled)
        for first in range(0, len(prompts.lengths), at_once):
            self._prefill(prompts, range(first, first + at_once))

    def _prefill(self, prompts: Prompts, part: range) -> None:
        """Some of the prompts, straight into the cache of all rows that continue them."""
        model = self._model
        by_row = self._cache.keys_values.unflatten(2, (-1, model.shape.kv_heads))[:, :, :, :, : self._filled]
        here = np.flatnonzero((prompts.of_row >= part.start) & (prompts.of_row < part.stop))
        rows, prompt_of_row = model.tensor(here), model.tensor(prompts.of_row[here] - part.start)

        def store(layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
            by_row[layer, 0][rows], by_row[layer, 1][rows] = key[prompt_of_row], value[prompt_of_row]

        chosen = slice(part.start, part.stop)
        token_ids, lengths = model.tensor(prompts.token_ids[chosen]), model.tensor(prompts.lengths[chosen])
        self._logits[rows] = model.prefill(token_ids, lengths, store)[prompt_of_row]

    def logits(self) -> torch.Tensor:
        return self._logits

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor) -> None:
        if self._filled == self._cache.width:
            self._forget()
            self._cache.widen(self._filled)
        self._tokens.copy_(tokens)
        if self._graph is None and self._warm and self._cache.width - self._filled > _CAPTURE_STEPS:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._model.decode(self._tokens, self._cache)
            self._warm = True
        self._filled += 1

    def _capture(self) -> None:
        if self._model.device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._model.decode(self._tokens, self._cache)
        self._graph, self._rotations = graph, self._model.rotations

    def _forget(self) -> None:
        """Drop the graph of a shape that is no more, and with it the memory of its step."""
        self._graph = None
        self._warm = False

    @torch.inference_mode()
    def take(self, rows: torch.Tensor) -> None:
        self._cache.take(rows)
        self._logits, self._tokens = self._logits[rows], self._tokens[rows]
        self._forget()

    def release(self) -> None:
        """To the driver, not to torch's allocator: other processes may share the GPU."""
        self._forget()
        del self._cache, self._logits, self._tokens
        torch.cuda.empty_cache()  # nothing where CUDA is not in use
