"""π_old after the first update of a step: the weights as they were at its start, beside those that train."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class StartWeights:
    """A copy of what a rank holds of the weights, which takes their place in a scoring pass.

    Costs the bytes of the weights that train on this rank (its shard under ZeRO-3), from the first `keep` on.

    Example: start.keep(); ...updates...; with start(): log_old = score(...)
    """

    def __init__(self, trained: Iterable[nn.Parameter], release: Callable[[], None] = lambda: None) -> None:
        # Under ZeRO-3 a parameter is its shard; `release` forgets what a pass gathered from the shards.
        self._holders: list[Tensor] = [getattr(parameter, "ds_tensor", parameter) for parameter in trained]
        self._release = release
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember the weights as they are now."""
        if not self._kept:
            self._kept = [holder.data.clone() for holder in self._holders]
        else:
            for kept, holder in zip(self._kept, self._holders, strict=True):
                kept.copy_(holder.data)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compute with the remembered weights; nothing may train meanwhile."""
        assert self._kept, "no weights were kept"
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self._release()
        for position, holder in enumerate(self._holders):
            holder.data, self._kept[position] = self._kept[position], holder.data
