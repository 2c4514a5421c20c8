"""How far a learner is from the model that sampled, on the sampled tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.schema import Prompt
from kernels.ops import linear_logprob
from rollout.engine import Sampled
from trainer.models import DTYPES, head_weight, hidden_states, load_model

SCORED_ROWS = 64


@torch.inference_mode()
def off_policyness(
    learner_dir: Path, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Sampled]], *, device: str, dtype: str
) -> dict[str, float]:
    """`ess`, `kl_k1` and `kl_k3` of the learner π against the sampler μ, over the completions drawn for each prompt.

        w = π/μ per token: ESS = (Σw)² / (n Σw²), k1 = mean(−log w), k3 = mean(w − log w − 1)

    μ's log-probs are over the whole vocabulary at temperature 1.
    """
    model = load_model(learner_dir, dtype=DTYPES[dtype], device=torch.device(device), key="LEARNER")
    pairs = [(prompt, one) for prompt, row in zip(prompts, drawn) for one in row]
    parts = [_log_weights(model, pairs[first : first + SCORED_ROWS]) for first in range(0, len(pairs), SCORED_ROWS)]
    log_weight = torch.cat(parts).double()
    weight = log_weight.exp()
    return {
        "ess": float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())),
        "kl_k1": float(-log_weight.mean()),
        "kl_k3": float((weight - log_weight - 1).mean()),
    }


def _log_weights(model: Any, pairs: Sequence[tuple[Prompt, Sampled]]) -> torch.Tensor:
    """log π − log μ of every completion token, rows one after the other."""
    ids = [torch.tensor([*prompt.token_ids, *one.token_ids.tolist()]) for prompt, one in pairs]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
    length = padded.shape[1]
    # The hidden state before a token predicts it.
    places = torch.cat(
        [
            torch.arange(len(prompt.token_ids) - 1, len(prompt.token_ids) + len(one.token_ids) - 1) + row * length
            for row, (prompt, one) in enumerate(pairs)
        ]
    ).to(model.device)
    hidden = hidden_states(model, padded)[places]
    targets = padded.flatten()[places + 1]
    logprob, _ = linear_logprob(hidden, head_weight(model), targets)
    sampled = torch.from_numpy(np.concatenate([one.logprobs for _, one in pairs]))
    return logprob.cpu().float() - sampled
