"""The embedded engine: batched decoding in PyTorch, on CPU or one GPU, for models that fit it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.schema import Sampling
from rollout.engine import Request, Sampled
from rollout.shared_weights import SharedWeights, require_whole
from rollout.torch_batch import Batch, GrowingBatch, Prompts, StaticBatch
from rollout.torch_model import TorchModel
from rollout.torch_sampling import draw, row_keys, uniforms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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

    def __init__(
        self, model_dir: Path, *, device: str = "cpu", dtype: str = "float32", _static: bool | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {sorted(DTYPES)}")
        # Tests have the GPU's way on CPU, where only the capture is missing.
        static = torch.device(device).type == "cuda" if _static is None else _static
        self._model = TorchModel(Path(model_dir), device=device, dtype=DTYPES[dtype], static=static)
        self._batch: type[Batch] = StaticBatch if static else GrowingBatch
        self.vocab_size = self._model.shape.vocab
        self.version = 0

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        """Replace all weights by those of a safetensors file of the same names and sizes, or refuse and change none.

        `version` labels the tokens drawn from now on (default: one more than the last).
        """
        self._model.weights.load([Path(file)])
        self.version = self.version + 1 if version is None else version

    def load_shared(self, file: Path, *, version: int, digest: str) -> None:
        """Replace all weights by those in a buffer of the trainer's device. Errors: as `Engine.load_shared` says."""
        with SharedWeights(file, version=version, digest=digest, device=self._model.device) as shared:
            self._model.weights.take(shared.shapes, shared.read, where=file)
            require_whole([shared.outcome()], version=version)
        self.version = version

    def close(self) -> None:
        """Free the weights; the engine cannot be used afterwards."""
        del self._model
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

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
        versions = [(0, self.version)]
        stops = np.zeros(self.vocab_size, dtype=bool)
        stops[list(sampling.stop_token_ids)] = True
        with ExitStack() as held:
            batch = self._begin(held, requests, sampling.max_tokens)
            for step in range(sampling.max_tokens):
                if step % _NOISE_BLOCK == 0:
                    rows.noise = self._model.tensor(uniforms(rows.keys, range(step, step + _NOISE_BLOCK)))
                tokens, logprobs = self._draw(batch.logits(), rows, step, sampling)
                arriving = _Arriving(tokens, logprobs)
                last = step + 1 == sampling.max_tokens
                if not last:
                    batch.feed(tokens)
                rows.note(step, *arriving.read())
                on_progress(int(rows.open.sum()))
                stopped = rows.open & stops[rows.tokens[:, step]]
                for row in np.flatnonzero(rows.open if last else stopped):
                    yield rows.finished(row, step + 1, "stop" if stopped[row] else "length", tuple(versions))
                rows.open &= ~stopped
                if last or not rows.open.any():
                    return
                if rows.open.sum() <= batch.compact_at * len(rows.open):
                    kept = np.flatnonzero(rows.open)
                    rows = rows.take(kept)
                    batch.take(self._model.tensor(kept))
                if versions[-1][1] != self.version:
                    versions.append((step + 1, self.version))
                    held.close()
                    batch = self._begin(held, rows.continued(requests, step + 1), sampling.max_tokens - step - 1)

    def _begin(self, held: ExitStack, requests: Sequence[Request], max_tokens: int) -> Batch:
        """The batch of all rows, which `held` releases; equal prompts go through the model once."""
        prompts: dict[tuple[int, ...], int] = {}
        of_row: list[int] = []
        for request in requests:
            index = prompts.setdefault(tuple(request.prompt_ids), len(prompts))
            of_row += [index] * len(request.seeds)
        lengths = np.array([len(prompt) for prompt in prompts])
        token_ids = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for index, prompt in enumerate(prompts):
            token_ids[index, -len(prompt) :] = prompt
        self._model.reserve_positions(int(lengths.max()) + max_tokens)
        batch = self._batch(self._model, Prompts(token_ids, lengths, np.array(of_row)), max_tokens)
        held.callback(batch.release)
        return batch

    @torch.inference_mode()
    def _draw(
        self, logits: torch.Tensor, rows: "_Rows", step: int, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token number `step` of every row, int64 [B], and its log-prob, float32 [B], both on the device."""
        return draw(logits, rows.noise[step % _NOISE_BLOCK], sampling)


class _Arriving:
    """A step's tokens and log-probs on their way to the host, in one copy that does not wait for what is fed later."""

    def __init__(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        # Exact: a token id is far below 2^53. On CUDA, non_blocking makes the copy's memory pinned.
        self._host = torch.stack((tokens.double(), logprobs.double())).to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs, float64 [B] each."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens, logprobs = self._host.numpy()
        return tokens, logprobs


@dataclass
class _Rows:
    """What the host knows of the batch's rows: B rows, M tokens at most each."""

    names: np.ndarray  # int64 [B, 2]: request and sample
    keys: np.ndarray  # uint64 [B]
    tokens: np.ndarray  # int32 [B, M]
    logprobs: np.ndarray  # float32 [B, M]
    open: np.ndarray  # bool [B]: not finished
    noise: torch.Tensor  # float64 [_NOISE_BLOCK, B], on the device: of the current block of positions

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
            noise=torch.empty(0, len(seeds)),
        )

    def note(self, step: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Keep every row's token number `step`, or refuse it (ValueError)."""
        self.tokens[:, step], self.logprobs[:, step] = tokens, logprobs
        if not np.isfinite(logprobs).all():
            raise ValueError(f"the model gives logits that are not finite at new token {step}: its weights are broken")

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
        noise = self.noise[:, torch.from_numpy(kept)]
        return _Rows(self.names[kept], self.keys[kept], self.tokens[kept], self.logprobs[kept], self.open[kept], noise)
