"""The data every contender of `bench.kernels` is given, and the objective it is asked for."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels import ops

Mode = Literal["train", "frozen", "score"]
LONGEST = 8
"""The most that a packed sequence may have, in multiples of the mean."""
PROMPT_SHARE = 0.3


@dataclass(frozen=True)
class Objective:
    """What a contender computes: Σ share·(clipped policy loss + kl_coef·k3 − entropy_coef·entropy) at a temperature.

    mode "train": the loss and the gradients of hidden and weight; "frozen": the weight needs none; "score": log-probs
    without grad, of which only the temperature is a choice.
    """

    temperature: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    ratio: Literal["token", "sequence"] = "token"
    mode: Mode = "train"

    def __post_init__(self) -> None:
        if self.mode == "score" and (self.kl_coef or self.entropy_coef or self.ratio != "token"):
            raise ValueError("scoring forms no loss: no kl_coef, entropy_coef or ratio applies")

    @property
    def options(self) -> dict[str, str]:
        """What it asks beyond the base case: the option's name (`Rival.offers`) and its words with the value."""
        chosen = {
            "temperature": (self.temperature != 1, f"temperature {self.temperature:g}"),
            "KL": (self.kl_coef != 0, f"kl_coef {self.kl_coef:g}"),
            "entropy": (self.entropy_coef != 0, f"entropy_coef {self.entropy_coef:g}"),
            "sequence ratio": (self.ratio == "sequence", "sequence ratio"),
            "frozen head": (self.mode == "frozen", "frozen head"),
            "scoring": (self.mode == "score", "scoring only"),
        }
        return {name: words for name, (asked, words) in chosen.items() if asked}


class Rows(NamedTuple):
    """What a loss knows of the R rows it is given; all tensors [R] but `bounds`.

    share: the row's factor in the loss, 1/(rows with a label) or 0. mask: bool, has a label; None: all do. bounds [S+1]
    on the CPU: where each sequence's rows begin.
    """

    targets: Tensor
    anchor: Tensor
    reference: Tensor
    advantage: Tensor
    share: Tensor
    mask: Tensor | None
    bounds: Tensor


@dataclass(frozen=True)
class Problem:
    """T rows of S packed sequences: hidden [T, H], weight [V, H], targets [T]; advantage [S].

    anchor and reference [T] are log-probs near the head's own. Row i of a sequence predicts its token i + 1: its first
    `prompts` rows predict prompt tokens and carry no label, the others are the R rows of the loss.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    anchor: Tensor
    reference: Tensor
    advantage: Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    objective: Objective

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def labels(self) -> int:
        return sum(self.answers)

    @property
    def answers(self) -> tuple[int, ...]:
        """Rows with a label, of each sequence."""
        return tuple(length - prompt for length, prompt in zip(self.lengths, self.prompts))

    @property
    def uniform(self) -> bool:
        """All sequences are as long and every row has a label: nothing to pad or to leave out."""
        return len(set(self.lengths)) == 1 and not any(self.prompts)

    @staticmethod
    def make(
        sequences: int,
        length: int,
        hidden: int,
        vocabulary: int,
        *,
        dtype: torch.dtype,
        device: str,
        packed: bool = False,
        objective: Objective | None = None,
    ) -> "Problem":
        """Logits of deviation 3, and 7 in 10 targets 10 to 20 nats above them, since uniform rows flatter a filter.

        `length` is that of each sequence, or `packed` their mean (`log_normal_lengths`) with a prompt before each.
        """
        objective = objective or Objective()
        lengths = log_normal_lengths(sequences, length) if packed else (length,) * sequences
        prompts = tuple(round(PROMPT_SHARE * n) if packed else 0 for n in lengths)
        generator = torch.Generator(device).manual_seed(0)
        tokens = sequences * length
        at: dict[str, Any] = {"generator": generator, "device": device}
        weight = torch.randn(vocabulary, hidden, **at).mul_(3 / math.sqrt(hidden))
        states = torch.randn(tokens, hidden, **at)
        targets = torch.randint(0, vocabulary, (tokens,), **at)
        planted = (torch.rand(tokens, **at) < 0.7) * (10 + 10 * torch.rand(tokens, **at))
        direction = weight[targets]
        states += (planted / direction.square().sum(1))[:, None] * direction
        states, weight = states.to(dtype), weight.to(dtype)
        exact = ops.linear_logprob(states, weight, targets, temperature=objective.temperature).logprob
        far = 3 * torch.randn(tokens, **at) * (torch.rand(tokens, **at) < 0.02)
        anchor = exact + 0.1 * torch.randn(tokens, **at) + far
        advantage = torch.randn(sequences, **at)
        reference = exact + 0.3 * torch.randn(tokens, **at)
        return Problem(states, weight, targets, anchor, reference, advantage, lengths, prompts, objective)

    def rows(self) -> Rows:
        """All T rows, prompts' too: what a contender is given that does not leave them out."""
        return self._rows(torch.arange(self.tokens, device=self.hidden.device), self.lengths)

    def labelled_rows(self) -> Rows:
        """The R rows with a label."""
        return self._rows(self._labelled, self.answers)

    def select(self, hidden: Tensor) -> Tensor:
        """[R, H] of [T, H], as `kernels.head.LogprobModel` does it before the head."""
        return hidden if self.uniform else hidden.index_select(0, self._labelled)

    def padded(self, value: Tensor) -> Tensor:
        """The R rows with a label as [S, longest answer, ...]: each sequence's first, then zeros."""
        longest = max(self.answers)
        if self.uniform:
            return value.view(self.sequences, longest, *value.shape[1:])
        out = value.new_zeros(self.sequences * longest, *value.shape[1:])
        out[self._place] = value[self._labelled]
        return out.view(self.sequences, longest, *value.shape[1:])

    def unpadded(self, value: Tensor) -> Tensor:
        """[T, ...] of what `padded` made, zeros where no label is."""
        flat = value.flatten(0, 1)
        if self.uniform:
            return flat
        out = flat.new_zeros(self.tokens, *flat.shape[1:])
        out[self._labelled] = flat[self._place]
        return out

    @cached_property
    def _labelled(self) -> Tensor:
        """Which rows have a label, int64 [R]."""
        return torch.tensor(self._mask, device=self.hidden.device).nonzero()[:, 0]

    @property
    def _mask(self) -> list[bool]:
        return [i >= prompt for length, prompt in zip(self.lengths, self.prompts) for i in range(length)]

    @cached_property
    def _place(self) -> Tensor:
        """Where `padded` puts each, int64 [R]."""
        longest = max(self.answers)
        places = [s * longest + i for s, count in enumerate(self.answers) for i in range(count)]
        return torch.tensor(places, device=self.hidden.device)

    def _rows(self, chosen: Tensor, counts: tuple[int, ...]) -> Rows:
        device = chosen.device
        mask = torch.tensor(self._mask, device=device)[chosen]
        return Rows(
            self.targets[chosen],
            self.anchor[chosen],
            self.reference[chosen],
            self.advantage.repeat_interleave(torch.tensor(counts, device=device)),
            mask.to(self.anchor.dtype) / self.labels,
            None if sum(counts) == self.labels else mask,
            torch.tensor([0, *accumulate(counts)]),
        )


def log_normal_lengths(sequences: int, mean: int) -> tuple[int, ...]:
    """Quantiles of a log-normal distribution (σ = 1) up to `LONGEST` means, scaled to sum to sequences·mean, shuffled:
    as many tokens as that many sequences of equal length have, whatever the seed."""
    middles = [(i + 0.5) / sequences for i in range(sequences)]
    sizes = [min(math.exp(NormalDist().inv_cdf(q) - 0.5), LONGEST) for q in middles]
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0)).tolist()
    shares = [sizes[i] / sum(sizes) for i in order]
    ends = [round(share * sequences * mean) for share in accumulate(shares)]
    return tuple(end - start for start, end in zip([0, *ends], ends))
