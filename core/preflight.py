"""Will it fit: what each GPU of a node will hold, in words, and a refusal that says what to change."""

from collections.abc import Sequence

from core.config import Config
from core.configkeys import ConfigError
from core.lease_size import lease_rows
from core.memory import (
    CONTEXT_BYTES,
    ENGINE_OVERHEAD_BYTES,
    GIB,
    EngineNeed,
    ModelShape,
    engine_need,
    host_bytes,
    published_bytes,
    trainer_parts,
)
from core.placement import Placement

TORCH_CACHE_SLACK = 1.25  # the cache's last block of slots, a step's logits, and on a CPU growth by a quarter


def preflight(
    config: Config,
    placement: Placement,
    gpu_bytes: Sequence[int],
    *,
    learner: ModelShape,
    explorer: ModelShape | None,
    ranks: int,
    vllm: bool,
) -> list[str]:
    """One line per process and per GPU. ConfigError where a GPU would hold more than it has.

    gpu_bytes: total memory of each visible GPU; none on CPU, where nothing is refused. explorer: None where no step
    asks for one. ranks: trainer ranks on all nodes. vllm: which engine runs (rollout.engine, where it is "auto").
    """
    scored = explorer if config.correction.learner.weight == "mixture" else None
    trainer = trainer_parts(config, learner, scored, ranks)
    needs = _needs(config, learner, explorer)
    lines = [f"memory of a trainer rank: {_sum(trainer)}"]
    if host := host_bytes(config, learner, ranks):
        lines.append(f"host memory of a trainer rank: {_gib(host)} of offloaded states")
    shared = placement.trainer[0] if config.rollout.weights == "device" and placement.learner else None
    if published := published_bytes(config, learner):
        where = "host memory of rank 0" if shared is None else f"memory of GPU {shared} beside rank 0"
        lines.append(f"{where}: {_gib(published)} of published weights, two versions (rollout.weights)")
    share = placement.memory_share if vllm else 0.0
    problems = []
    for role, need in needs.items():
        lines.append(f"memory of {_ENGINES[role]}: {_engine_line(need, vllm)}")
    for gpu, total in enumerate(gpu_bytes):
        buffers = published if gpu == shared else 0
        held, parts = _held(gpu, placement, trainer, needs, share * total if vllm else None, buffers)
        if not parts:
            continue
        lines.append(f"GPU {gpu} ({_gib(total)}): {_gib(held)} = {' + '.join(parts)}")
        if held > total:
            problems.append(f"GPU {gpu} has {_gib(total)} and would hold {_gib(held)} = {' + '.join(parts)}. ")
            problems[-1] += _remedies(config, trainer, gpu in placement.trainer, gpu in placement.engines, buffers)
        problems += _tight(gpu, placement, needs, share * total) if vllm else []
    if problems:
        raise ConfigError("\n".join(problems))
    return lines


def _needs(config: Config, learner: ModelShape, explorer: ModelShape | None) -> dict[str, EngineNeed]:
    """What an engine of each role must hold."""
    rows = lease_rows(config)
    needs = {"learner": engine_need(config, learner, rows=max(rows.learner, rows.evaluation))}
    if explorer is not None:
        needs["explorer"] = engine_need(config, explorer, rows=rows.explorer)
    if config.rollout.roles == "handover" and "explorer" in needs:  # its processes become the learner's later on
        needs["explorer"] = EngineNeed(*map(max, needs["explorer"], needs["learner"]))
    return needs


_ENGINES = {"learner": "a learner rollout engine", "explorer": "an explorer engine"}


def _held(
    gpu: int,
    placement: Placement,
    trainer: dict[str, int],
    needs: dict[str, EngineNeed],
    share: float | None,
    buffers: int,
) -> tuple[int, list[str]]:
    """Bytes of a GPU, and what for. `share`: what a vLLM engine fills; None for torch engines. `buffers`: of published
    weights."""
    sizes = {}
    if gpu in placement.trainer:
        sizes["trainer rank"] = sum(trainer.values())
    if buffers:
        sizes["published weights"] = buffers
    for role, blocks in (("learner", placement.learner), ("explorer", placement.explorer)):
        count = sum(gpu in block for block in blocks)
        if count and role in needs:
            each = int(share) if share is not None else _torch_bytes(needs[role])
            sizes[f"{count} x {_ENGINES[role].partition(' ')[2]}"] = count * each
    return sum(sizes.values()), [f"{name} {_gib(size)}" for name, size in sizes.items()]


def _tight(gpu: int, placement: Placement, needs: dict[str, EngineNeed], share: float) -> list[str]:
    """Engines whose share cannot hold the model and one completion."""
    problems = []
    for role, blocks in (("learner", placement.learner), ("explorer", placement.explorer)):
        need = needs.get(role)
        if need is None or not any(gpu == block[0] for block in blocks):
            continue
        least = need.weights + ENGINE_OVERHEAD_BYTES + need.sequence
        if least > share:
            problems.append(
                f"GPU {gpu}: {_ENGINES[role]} may fill {_gib(share)} and needs {_gib(least)} (weights "
                f"{_gib(need.weights)}, {_gib(ENGINE_OVERHEAD_BYTES)} for vLLM itself, one longest completion "
                f"{_gib(need.sequence)}): raise rollout.memory_share or rollout.tensor_parallel, give it a GPU of its "
                "own (placement), or lower rollout.max_response_tokens"
            )
    return problems


def _torch_bytes(need: EngineNeed) -> int:
    return int(need.weights + need.rows * need.sequence * TORCH_CACHE_SLACK) + CONTEXT_BYTES


def _engine_line(need: EngineNeed, vllm: bool) -> str:
    if not vllm:
        cache = need.rows * need.sequence
        return f"{_gib(_torch_bytes(need))} = weights {_gib(need.weights)}, cache of {need.rows} rows {_gib(cache)}, …"
    return (
        f"its share (rollout.memory_share), of which weights {_gib(need.weights)}, vLLM itself about "
        f"{_gib(ENGINE_OVERHEAD_BYTES)}, and the rest keys and values, {_gib(need.sequence)} for a longest completion"
    )


def _remedies(config: Config, trainer: dict[str, int], trains: bool, generates: bool, buffers: int) -> str:
    """What would make it smaller, the largest gain first; what is in use already is left out."""
    learner, options = config.learner, ["rollout.weights=memory"] if buffers else []
    if trains and not learner.gradient_checkpointing and trainer.get("activations", 0) > sum(trainer.values()) // 10:
        options.append("learner.gradient_checkpointing=true")
    if trains and learner.gradient_checkpointing and learner.recompute == "selective":
        options.append("learner.recompute=full")
    if trains and learner.backend == "torch":
        options.append("learner.backend=deepspeed learner.zero_stage=3 on more ranks")
    elif trains and learner.zero_stage < 3:
        options.append("learner.zero_stage=3")
    if trains and not learner.lora_rank:
        options.append("learner.lora_rank=32, which trains adapters only")
    if trains and learner.offload == "none":
        options.append("learner.offload=optimizer (with learner.backend=deepspeed)")
    if trains and learner.dtype == "float32":
        options.append("learner.dtype=bfloat16")
    if trains and learner.micro_batch_tokens:
        options.append("a smaller learner.micro_batch_tokens (for long rows with learner.sequence_parallel)")
    elif trains and learner.micro_batch_rows > 1:
        options.append("a smaller learner.micro_batch_rows")
    if trains and generates:
        smaller = "lease_prompts" if config.engine == "torch" else "memory_share"
        options.append(f"GPUs of their own for the engines (placement), or a smaller rollout.{smaller}")
    elif generates:
        options.append("fewer processes, a smaller rollout.lease_prompts, or rollout.engine=vllm")
    return f"Use {'; '.join(options)}"


def _sum(parts: dict[str, int]) -> str:
    return f"{_gib(sum(parts.values()))} = " + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
