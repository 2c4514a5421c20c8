"""The vLLM engine: generation for models of the size users train. The only module that imports vLLM."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.schema import Sampling
from rollout.engine import Request, Sampled
from rollout.shared_weights import require_whole, shared_shapes
from rollout.vllm_weights import ModelFiles

DTYPES = ("float32", "bfloat16")
_RELEASE = "0.32."
_COLDEST = 0.01  # vLLM samples at 0.01 where it is asked for less, and says so only in its log


class VllmEngine:
    """Engine (rollout.engine) over a Hugging Face directory of any decoder that vLLM knows.

    vLLM runs in this process (under tensor parallelism with children) and is stepped here, so weights can change
    between two tokens: `load_weights` may be called while an iterator of `generate` is unfinished, between its items or
    from `on_progress`, on the thread that iterates. Running completions keep their tokens; their keys and values are
    computed again with the new weights.

    The noise of a token is a function of its completion's seed and its position; vLLM takes the low 32 bits of a seed
    on CPU, 63 bits on CUDA. Log-probs are the sampler's own, after temperature, top-p and top-k (`processed`) or before
    them (`raw`): one engine serves one kind. One engine per process: closing it ends all that vLLM has there.

    Arguments:
        device: cpu or cuda; which GPUs, CUDA_VISIBLE_DEVICES says.
        memory_share: part of each GPU's memory that vLLM may fill.
        max_model_len: prompt and completion together; None: what the model allows.
        max_rows: completions decoded at once; more wait their turn. None: 256 on CPU, vLLM's own choice on a GPU.
        cpu_cache_bytes: keys and values on CPU, where memory_share does not apply.

    Errors: ValueError for a missing or other vLLM, a model that it refuses, foreign weights and requests that the model
    cannot serve.

    Example: VllmEngine(Path("models/learner"), device="cpu", dtype="float32")
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        device: str,
        dtype: str,
        tensor_parallel_size: int = 1,
        memory_share: float = 0.9,
        max_model_len: int | None = None,
        max_rows: int | None = None,
        kind: Literal["processed", "raw"] = "processed",
        enforce_eager: bool = False,
        cpu_cache_bytes: int = 256 << 20,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {DTYPES}")
        self._files = ModelFiles(Path(model_dir))
        self._limit = self._files.length_limit(max_model_len)
        self._kind = kind
        settings: dict[str, Any] = {
            "model": str(model_dir),
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": self._limit,
            "max_num_seqs": max_rows or (256 if device == "cpu" else None),
            "logprobs_mode": f"{kind}_logprobs",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model's own would add stop tokens
            "disable_log_stats": True,
            "worker_extension_cls": "rollout.vllm_weights.WeightLoading",
        }
        if device == "cpu":
            # A seeded request whose prefill is split kills vLLM on CPU: a step has room for a whole prompt instead.
            settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, self._limit)}
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": cpu_cache_bytes}
        else:
            settings |= {"enforce_eager": enforce_eager, "gpu_memory_utilization": memory_share}
        _prepare_vllm(device)
        from vllm import EngineArgs, LLMEngine

        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**settings))
        self._generating = False
        self.vocab_size = int(self._engine.model_config.get_vocab_size())
        self.version = 0
        self._engine.set_weight_version("0")

    def load_weights(self, file: Path, *, version: int | None = None) -> None:
        """Replace all weights by those of a safetensors file of the same names and shapes; a refused file changes none.

        `version` labels the tokens drawn from now on (default: one more than the last).
        """
        self._files.check(Path(file))
        self._engine.collective_rpc("load_safetensors", args=(str(file),))
        self._forget(running=True)
        self.version = self.version + 1 if version is None else version
        self._engine.set_weight_version(str(self.version))

    def load_shared(self, file: Path, *, version: int, digest: str) -> None:
        """Replace all weights by those in a buffer of the trainer's device, from which each of vLLM's processes reads;
        `Engine.load_shared` says what it raises."""
        self._files.require(shared_shapes(file, version=version), file)
        require_whole(self._engine.collective_rpc("load_shared", args=(str(file), version, digest)), version=version)
        self._forget(running=True)
        self.version = version
        self._engine.set_weight_version(str(version))

    def close(self) -> None:
        """Free the engine's memory and end its processes; the engine cannot be used afterwards."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None
            gc.collect()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_progress: Callable[[int], None] | None = None
    ) -> Iterator[Sampled]:
        """Check the requests, then yield every completion of every request, each as soon as it is finished.

        `on_progress(tokens)` is called after every step of vLLM with the number of tokens it drew. One iterator at a
        time: exhaust or close it before the next one. Each begins with an empty prefix cache, so that its completions
        do not depend on earlier ones.
        """
        self._check(requests, sampling)
        return self._stream(requests, sampling, on_progress or (lambda tokens: None))

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if sampling.kind != self._kind:
            raise ValueError(
                f"this engine gives {self._kind} log-probs, not {sampling.kind} ones: start it with that kind"
            )
        if sampling.temperature < _COLDEST:
            raise ValueError(f"temperature {sampling.temperature} is below {_COLDEST}, where vLLM's sampling begins")
        for index, request in enumerate(requests):
            ids = request.prompt_ids
            if not len(ids):
                raise ValueError(f"request {index} has an empty prompt: a prompt needs at least one token")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                top = self.vocab_size - 1
                raise ValueError(f"request {index}: prompt ids {min(ids)} … {max(ids)} are not all in 0 … {top}")
            if len(ids) + sampling.max_tokens > self._limit:
                total = f"{len(ids)} prompt + {sampling.max_tokens} new tokens"
                raise ValueError(f"request {index}: {total} exceed the engine's {self._limit} positions")
            if not all(0 <= seed < 2**64 for seed in request.seeds):
                raise ValueError(f"request {index}: a seed is outside 0 … 2^64 - 1")

    def _stream(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: Callable[[int], None]
    ) -> Iterator[Sampled]:
        if self._generating:
            raise ValueError("another iterator of generate is unfinished: exhaust or close it first")
        self._generating = True
        names: dict[str, tuple[int, int]] = {}  # of the completions that vLLM still works on
        try:
            self._forget(running=False)
            self._submit(requests, sampling, names)
            while names:
                outputs = self._engine.step()
                on_progress(len(outputs))  # each output is of one completion, longer by one token
                for output in outputs:
                    if output.finished:
                        yield _sampled(*names.pop(output.request_id), output.outputs[0])
        finally:
            self._generating = False
            if names and self._engine is not None:
                self._engine.abort_request(list(names))

    def _submit(self, requests: Sequence[Request], sampling: Sampling, names: dict[str, tuple[int, int]]) -> None:
        """Queue one vLLM request per completion."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        for index, request in enumerate(requests):
            prompt = [int(token) for token in request.prompt_ids]
            for sample, seed in enumerate(request.seeds):
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_tokens,
                    stop_token_ids=list(sampling.stop_token_ids),
                    ignore_eos=True,  # only stop_token_ids stop
                    seed=int(seed) & (2**63 - 1),  # CUDA holds it in a signed integer
                    logprobs=0,  # of the drawn token only
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.CUMULATIVE,
                )
                name = f"{index}.{sample}"
                self._engine.add_request(name, tokens_input(prompt), params)
                names[name] = (index, sample)

    def _forget(self, *, running: bool) -> None:
        """Drop cached keys and values; with `running`, those of unfinished completions too."""
        if not self._engine.reset_prefix_cache(reset_running_requests=running):
            raise RuntimeError("vLLM did not clear its prefix cache: later completions would use keys of other weights")


def _sampled(request: int, sample: int, output: Any) -> Sampled:
    tokens = np.array(output.token_ids, dtype=np.int32)
    logprobs = np.array(output.logprobs.logprobs, dtype=np.float32)
    assert len(tokens) == len(logprobs)
    if not np.isfinite(logprobs).all():
        raise ValueError(f"request {request}: log-probs are not finite: the model's weights are broken")
    versions = tuple((span.start, int(span.version)) for span in output.weight_versions)
    return Sampled(request, sample, tokens, logprobs, output.finish_reason, versions)


def _prepare_vllm(device: str) -> None:
    """Set this process's environment for vLLM and import it; ValueError unless it runs on `device`."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not cpu or cuda: choose GPUs by CUDA_VISIBLE_DEVICES")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":  # where compiling the log-prob operation alone takes up to a minute
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # processes share the cores
        import torch._dynamo.config

        torch._dynamo.config.disable = True  # it read the variable if something imported it before
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ValueError(f"vLLM cannot be imported ({error}): install it as docs/install.md says") from error
    if not vllm.__version__.startswith(_RELEASE):
        raise ValueError(
            f"vLLM {vllm.__version__} is installed; this engine is written for {_RELEASE}: see docs/install.md"
        )
    if current_platform.device_type != device:
        installed = current_platform.device_type or "no device"
        raise ValueError(
            f"device {device!r} was asked for, the installed vLLM is for {installed!r}: see docs/install.md"
        )
    if device == "cpu":
        import vllm._custom_ops  # loads the library below

        if not hasattr(torch.ops._C, "init_cpu_memory_env"):
            raise ValueError("vLLM's CPU library did not load: it needs libnuma (Debian package libnuma1)")
