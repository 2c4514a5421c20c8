"""Which prompts a step trains on: a pure function of seed and step, so that every resumed run agrees."""

from collections.abc import Sequence

import numpy as np

from core.schema import Prompt


class PromptSchedule:
    """Walks a fresh seeded permutation of the prompts in every epoch, `per_step` prompts a step.

    Within an epoch no prompt is skipped and none repeats; no step holds a prompt twice. A step that crosses into the
    next epoch takes the tail of one permutation and the head of the next; prompts of the next epoch that the tail
    already holds wait until just after that head. Keeps the permutations of at most two epochs.

    Example: PromptSchedule(prompts, seed=0, per_step=32).at(1) -> the 32 prompts of the first step
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, per_step: int) -> None:
        """Raises ValueError for more prompts per step than there are, and for two prompts of one uid."""
        if not 1 <= per_step <= len(prompts):
            raise ValueError(
                f"algorithm.prompts_per_step = {per_step} needs as many prompts, and there are {len(prompts)}; "
                f"lower it to at most {len(prompts)} or give more training prompts"
            )
        uids = {prompt.uid for prompt in prompts}
        if len(uids) < len(prompts):
            raise ValueError(
                f"{len(prompts) - len(uids)} of {len(prompts)} prompts repeat another one's uid; remove them"
            )
        self._prompts = prompts
        self._seed = seed
        self._per_step = per_step
        self._orders: dict[int, np.ndarray] = {}

    def at(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of `step` = 1, 2, …, slot by slot."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        epoch, start = divmod((step - 1) * self._per_step, len(self._prompts))
        chosen = self._order(epoch)[start : start + self._per_step]
        missing = self._per_step - len(chosen)
        if missing:
            chosen = np.concatenate([chosen, self._order(epoch + 1)[:missing]])
        return tuple(self._prompts[index] for index in chosen.tolist())

    def visit(self, step: int, slot: int) -> int:
        """How many times the prompt at `slot` of `step` was in an earlier step: its epoch, since none repeats in one.

        Example: schedule.visit(1, 0) -> 0
        """
        return ((step - 1) * self._per_step + slot) // len(self._prompts)

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of the prompts in the order `epoch` walks them."""
        if epoch not in self._orders:
            self._orders = {number: order for number, order in self._orders.items() if number == epoch - 1}
            self._orders[epoch] = self._arranged(epoch)
        return self._orders[epoch]

    def _arranged(self, epoch: int) -> np.ndarray:
        # An epoch's order depends on the epoch before through the step they share, back to an epoch that begins with a
        # step. With two steps of prompts per epoch it goes back one epoch only: reordering a head spares the tail.
        first = epoch
        while self._carry(first) and first not in self._orders:
            if first < epoch and len(self._prompts) >= 2 * self._per_step:
                break
            first -= 1
        order = self._orders[first] if first in self._orders else self._permutation(first)
        for number in range(first + 1, epoch + 1):
            order = self._after(order[-self._carry(number) :], self._permutation(number))
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        stream = np.random.SeedSequence([self._seed, epoch])
        return np.random.Generator(np.random.Philox(stream)).permutation(len(self._prompts))

    def _carry(self, epoch: int) -> int:
        """Prompts that the step in which `epoch` begins takes from the epoch before."""
        return epoch * len(self._prompts) % self._per_step

    def _after(self, tail: np.ndarray, order: np.ndarray) -> np.ndarray:
        """`order`, with what `tail` holds moved behind the first prompts that complete the tail's step."""
        head, rest = order[: self._per_step], order[self._per_step :]
        waits = np.isin(head, tail)
        fresh, missing = head[~waits], self._per_step - len(tail)
        return np.concatenate([fresh[:missing], head[waits], fresh[missing:], rest])
