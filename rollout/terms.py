"""The terms of a run: what every worker that joins is told, and what it must have loaded."""

from core.config import Config
from core.configcheck import explorer_tokens
from rollout.messages import Fingerprints, Hello, Welcome


def welcome(config: Config, run_id: str, incarnation: int) -> Welcome:
    """The run's terms but for the model."""
    stream, rollout = config.stream, config.rollout
    return Welcome(
        run_id=run_id,
        incarnation=incarnation,
        model="",
        engine=config.engine,
        tensor_parallel=rollout.tensor_parallel,
        memory_share=rollout.memory_share,
        max_model_tokens=rollout.max_prompt_tokens + max(rollout.max_response_tokens, explorer_tokens(config)),
        device=config.run.device,
        dtype=config.learner.dtype,
        heartbeat_s=stream.heartbeat_s,
        liveness_s=stream.liveness_s,
        silence_s=stream.starvation_s,
        window=stream.credit,
        max_frame_bytes=stream.max_frame_mb << 20,
        update_in_flight=config.rollout.update_in_flight,
        shared_weights=config.rollout.weights == "device",
    )


def mismatch(hello: Hello, fingerprints: Fingerprints, vocab_size: int) -> str:
    """What a worker loaded that is not the run's, or ""."""
    for what, theirs, ours in (
        ("tokenizer", hello.fingerprints.tokenizer, fingerprints.tokenizer),
        ("model", hello.fingerprints.weights, fingerprints.weights),
        ("vocabulary size", hello.vocab_size, vocab_size),
    ):
        if theirs != ours:
            return f"its {what} is {theirs}, the run's is {ours}"
    return ""
