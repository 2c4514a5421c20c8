"""The embedded engine: batched decoding in PyTorch, on CPU or one GPU, for models that fit it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.schema import Sampling
from rollout.engine import Request, Sampled
from rollout.torch_cache import Cache
from rollout.torch_model import TorchModel
from rollout.torch_sampling import draw, row_keys, uniforms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Finished rows leave when this part of the batch is still open: leaving costs about half a step of the rest.
_COMPACT_AT = 3 / 4
_NOISE_BLOCK = 32


class TorchEngine:
    """Engine (rollout.engine) over a Hugging Face directory of Qwen3 or Llama architecture.

    The noise of a token is a function of its completion's seed and its position alone. One call's requests are one
    batch: the same requests in the same order give bit-identical token ids and log-probs, always, on the same machine
    with the same number of threads. In another batch a completion has the same noise, but matrix products of other
    shapes round differently: log-probs then agree to about 1e-6 in float32, and a token changes only where its draw
    falls that close to a boundary.

    Weights may be loaded while an iterator of `generate` is unfinished, between its items or from `on_progress`, on the
    thread that iterates. Running completions keep their tokens; their keys and values are computed again with the new
    weights, in one pass over prompt and tokens, so that each log-prob is that of the weights it is labelled with.

    Errors: ValueError for an unsupported architecture, missing or foreign weights, and requests that the model cannot
    serve.

    Example: TorchEngine(Path("models/learner")).generate([Request((8, 5, 9), seeds=(11, 12))], sampling)
    """

    def __init__(self, model_dir: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
        self._model = TorchModel(Path(model_dir), device=device, dtype=DTYPES[dtype])
        self.vocab_size = self._model.shape.vocab
        self.version = 0

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        """Replace all weights by those of a safetensors file of the same names and sizes, or refuse and change none.

        `version` labels the tokens drawn from now on (default: one more than the last).
        """
        self._model.weights.load([Path(file)])
        self.version = self.version + 1 if version is None else version

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards."""
        del self._model

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        """Check the requests, then yield every completion of every request, each as soon as it is finished.

        `on_progress(tokens)` is called after every decode step with the number of tokens it drew. The host waits for
        the device once a step, for each row's token and log-prob.
        """
        self._check(requests, sampling)
        return self._stream(requests, sampling, on_progress or (lambda tokens: None))

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        limit = self._model.shape.max_positions
        if outside := [token for token in sampling.stop_token_ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"stop tokens {outside} are outside the vocabulary 0 … {self.vocab_size - 1}")
        for index, request in enumerate(requests):
            ids = request.prompt_ids
            if not len(ids):
                raise ValueError(f"request {index} has an empty prompt: a prompt needs at least one token")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                bounds = f"0 … {self.vocab_size - 1}"
                raise ValueError(f"request {index}: prompt ids {min(ids)} … {max(ids)} leave the vocabulary {bounds}")
            if len(ids) + sampling.max_tokens > limit:
                raise ValueError(
                    f"request {index}: {len(ids)} + {sampling.max_tokens} tokens exceed the model's {limit} positions"
                )
            if not all(0 <= seed < 2**64 for seed in request.seeds):
                raise ValueError(f"request {index}: a seed is outside 0 … 2^64 - 1")

    def _stream(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: Callable[[int], None]
    ) -> Iterator[Sampled]:
        rows = _Rows.of(requests, sampling.max_tokens)
        if not len(rows.open):
            return
        logits, cache = self._prefill(requests, sampling.max_tokens)
        versions = [(0, self.version)]
        stops = np.zeros(self.vocab_size, dtype=bool)
        stops[list(sampling.stop_token_ids)] = True
        for step in range(sampling.max_tokens):
            if step % _NOISE_BLOCK == 0:
                rows.noise = uniforms(rows.keys, range(step, step + _NOISE_BLOCK))
            drawn = self._draw(logits, rows, step, sampling)
            on_progress(int(rows.open.sum()))
            stopped = rows.open & stops[rows.tokens[:, step]]
            last = step + 1 == sampling.max_tokens
            for row in np.flatnonzero(rows.open if last else stopped):
                yield rows.finished(row, step + 1, "stop" if stopped[row] else "length", tuple(versions))
            rows.open &= ~stopped
            if last or not rows.open.any():
                cache.release()
                return
            if rows.open.sum() <= _COMPACT_AT * len(rows.open):
                kept = np.flatnonzero(rows.open)
                rows = rows.take(kept)
                cache.take(self._tensor(kept))
                drawn = drawn[self._tensor(kept)]
            if versions[-1][1] == self.version:
                logits = self._model.decode(drawn, cache)
            else:
                versions.append((step + 1, self.version))
                cache.release()
                logits, cache = self._prefill(rows.continued(requests, step + 1), sampling.max_tokens - step - 1)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.device)

    def _prefill(self, requests: Sequence[Request], max_tokens: int) -> tuple[torch.Tensor, Cache]:
        """First logits [B, V] and the cache of all rows; equal prompts go through the model once."""
        prompts: dict[tuple[int, ...], int] = {}
        prompt_of_row: list[int] = []
        for request in requests:
            index = prompts.setdefault(tuple(request.prompt_ids), len(prompts))
            prompt_of_row += [index] * len(request.seeds)
        lengths = np.array([len(prompt) for prompt in prompts])
        token_ids = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for index, prompt in enumerate(prompts):
            token_ids[index, -len(prompt) :] = prompt
        self._model.reserve_positions(int(lengths.max()) + max_tokens)
        equal = bool((lengths == lengths[0]).all())
        logits, cache = self._model.prefill(self._tensor(token_ids), self._tensor(lengths), equal=equal)
        repeated = self._tensor(np.array(prompt_of_row))
        cache.grow()  # first, while it is small
        cache.take(repeated)
        return logits[repeated], cache

    @torch.inference_mode()
    def _draw(self, logits: torch.Tensor, rows: "_Rows", step: int, sampling: Sampling) -> torch.Tensor:
        """Draw token number `step` of every row and note it on the host; int64 [B] on the device."""
        tokens, logprobs = draw(logits, self._tensor(rows.noise[step % _NOISE_BLOCK]), sampling)
        rows.tokens[:, step], rows.logprobs[:, step] = tokens.cpu().numpy(), logprobs.cpu().numpy()
        if not np.isfinite(rows.logprobs[:, step]).all():
            raise ValueError(f"the model gives logits that are not finite at new token {step}: its weights are broken")
        return tokens


@dataclass
class _Rows:
    """What the host knows of the batch's rows: B rows, M tokens at most each."""

    names: np.ndarray  # int64 [B, 2]: request and sample
    keys: np.ndarray  # uint64 [B]
    tokens: np.ndarray  # int32 [B, M]
    logprobs: np.ndarray  # float32 [B, M]
    open: np.ndarray  # bool [B]: not finished
    noise: np.ndarray  # float64 [_NOISE_BLOCK, B]: of the tokens of the current block of positions

    @staticmethod
    def of(requests: Sequence[Request], max_tokens: int) -> "_Rows":
        seeds = np.array([seed for request in requests for seed in request.seeds], dtype=np.uint64)
        size = (len(seeds), max_tokens)
        return _Rows(
            names=np.array([(r, s) for r, request in enumerate(requests) for s in range(len(request.seeds))]),
            keys=row_keys(seeds),
            tokens=np.zeros(size, np.int32),
            logprobs=np.zeros(size, np.float32),
            open=np.ones(len(seeds), bool),
            noise=np.zeros((0, len(seeds))),
        )

    def finished(self, row: np.intp, length: int, finish: str, versions: tuple[tuple[int, int], ...]) -> Sampled:
        request, sample = self.names[row].tolist()
        tokens, logprobs = self.tokens[row, :length].copy(), self.logprobs[row, :length].copy()
        return Sampled(request, sample, tokens, logprobs, finish, versions)

    def continued(self, requests: Sequence[Request], length: int) -> list[Request]:
        """Each row as a request of its own: its prompt, followed by its first `length` tokens."""
        return [
            Request((*requests[request].prompt_ids, *tokens[:length].tolist()), (0,))
            for (request, _), tokens in zip(self.names.tolist(), self.tokens)
        ]

    def take(self, kept: np.ndarray) -> "_Rows":
        noise = self.noise[:, kept]
        return _Rows(self.names[kept], self.keys[kept], self.tokens[kept], self.logprobs[kept], self.open[kept], noise)
