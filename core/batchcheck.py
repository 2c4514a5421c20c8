"""How an update's completions are shared out: mini-batches, forward passes, trainer ranks."""

from collections.abc import Iterator, Mapping

from core.config import Config

ROW_WEIGHTS = ("sequence_tis", "geometric_mask", "topr")  # one number for all tokens of a row


def batch_problems(config: Config) -> Iterator[str]:
    """What cannot be trained on any number of ranks, a sentence each."""
    yield from _batches(config)
    yield from _tokens(config)
    if config.learner.sequence_parallel > 1:
        yield from _sequence_parallel(config)
    learner = config.learner
    stage = {"none": 0, "optimizer": 1, "parameters": 3}[learner.offload]
    if learner.offload != "none" and (learner.backend != "deepspeed" or learner.zero_stage < stage):
        yield f'learner.offload = "{learner.offload}": use learner.backend=deepspeed learner.zero_stage={stage} or more'


def rank_problems(config: Config, world_size: int) -> Iterator[str]:
    """What cannot be shared out over `world_size` ranks."""
    micro, mini = config.learner.micro_batch_rows, config.algorithm.mini_batch_prompts
    rows = mini if config.algorithm.mixing == "authors_code" else mini * config.algorithm.group_size
    if world_size > 1 and not config.learner.micro_batch_tokens and rows % (micro * world_size):
        yield (
            f"{world_size} trainer ranks x learner.micro_batch_rows = {micro} do not divide the {rows} completions "
            f"that an update shares out: change one of them"
        )


def position_problems(config: Config, positions: Mapping[str, int], *, vllm: bool) -> Iterator[str]:
    """Rows and completions that are longer than a model has positions (max_position_embeddings, by the model's key).

    vLLM engines of both roles are made for the longest completion of either.
    """
    prompt, explorer = config.rollout.max_prompt_tokens, config.explorer.max_response_tokens
    row = (config.rollout.max_response_tokens, "rollout.max_response_tokens")
    generated = (explorer, "explorer.max_response_tokens") if explorer else row
    scored = row if config.correction.learner.weight == "mixture" else generated  # by the explorer, in training
    longest = max(row, generated)
    needs = {"learner.model": row, "explorer.model": max(scored, generated)}
    for key, limit in positions.items():
        tokens, name = longest if vllm else needs[key]
        if prompt + tokens > limit:
            lower = f"{name} to {limit - prompt} or less" if prompt < limit else "both"
            yield (
                f"rollout.max_prompt_tokens {prompt} + {name} {tokens} = {prompt + tokens} exceeds the {limit} "
                f"positions of {key}: lower {lower}, or use a model with more positions"
            )


def _batches(config: Config) -> Iterator[str]:
    algorithm, micro = config.algorithm, config.learner.micro_batch_rows
    prompts, mini, size = algorithm.prompts_per_step, algorithm.mini_batch_prompts, algorithm.group_size
    if prompts % mini:
        yield (
            f"algorithm.mini_batch_prompts = {mini} does not divide algorithm.prompts_per_step = {prompts}: "
            f"use one of {_divisors(prompts)}"
        )
    if config.learner.micro_batch_tokens:
        return
    if algorithm.mixing == "authors_code":
        # Its two phases hold G_w or G_s completions per prompt; what divides the prompts divides every phase.
        if mini % micro:
            yield (
                f"learner.micro_batch_rows = {micro} does not divide algorithm.mini_batch_prompts = {mini}, as every "
                f'phase of mixing = "authors_code" needs: use one of {_divisors(mini)}'
            )
    elif mini * size % micro:
        yield (
            f"learner.micro_batch_rows = {micro} does not divide the {mini} x {size} = {mini * size} completions of "
            f"one update (algorithm.mini_batch_prompts x algorithm.group_size): use one of {_divisors(mini * size)}"
        )


def _tokens(config: Config) -> Iterator[str]:
    tokens, parts = config.learner.micro_batch_tokens, config.learner.sequence_parallel
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if 0 < tokens * parts < longest:
        needed = -(-longest // parts)
        shared = f" on each of {parts} ranks that share a line" if parts > 1 else ""
        yield f"learner.micro_batch_tokens = {tokens} cannot hold a row: use {needed} or more{shared}"


def _sequence_parallel(config: Config) -> Iterator[str]:
    parts = config.learner.sequence_parallel
    if not config.learner.micro_batch_tokens:
        yield (
            f"learner.sequence_parallel = {parts} shares packed lines, and learner.micro_batch_tokens = 0 packs none: "
            "set learner.micro_batch_tokens to the tokens of one rank's part"
        )
    by_row = [f'loss.ratio = "{config.loss.ratio}"'] if config.loss.ratio == "sequence" else []
    for source, settings in (("explorer", config.correction.explorer), ("learner", config.correction.learner)):
        if settings.weight in ROW_WEIGHTS:
            by_row.append(f'correction.{source}.weight = "{settings.weight}"')
    for setting in by_row:
        yield (
            f"{setting} needs all tokens of a row on one rank, which learner.sequence_parallel = {parts} gives to "
            f"{parts}: use a ratio or weight by token, or learner.sequence_parallel=1"
        )


def _divisors(number: int) -> str:
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:6], "...", *found[-4:]])
