"""From questions to prompts: render, tokenise, and keep those that fit."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import GenerationConfig, PreTrainedTokenizerBase

from core.config import Config
from core.configfile import ConfigError
from core.datasets import Question, load_questions
from core.gold import look_at_golds
from core.schema import Prompt

SHOWN_CHARACTERS = 240


def load_prompts(
    config: Config, which: Literal["train", "eval"], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[str]]:
    """The prompts of `data.train` or `data.eval`, and lines that say what was read, mapped, removed and filtered.

    They end with what the first prompt looks like and, for reward.function = "math", whether gold answers can be read
    (on rank 0, which alone shows the lines). Raises ConfigError where prompts or gold answers do not fit.
    """
    loaded = load_questions(config.data, which, config.run.seed)
    prompts = [to_prompt(question, config, tokenizer) for question in loaded.questions]
    limit = config.rollout.max_prompt_tokens
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    lines = list(loaded.report)
    if len(kept) < len(prompts):
        longest = max(len(prompt.token_ids) for prompt in prompts)
        said = (
            f"{len(prompts) - len(kept)} of {len(prompts)} prompts exceed "
            f"rollout.max_prompt_tokens = {limit} (longest: {longest})"
        )
        if config.data.overlong == "error":
            raise ConfigError(f'data.{which}: {said}; raise the limit, or filter them with data.overlong = "filter"')
        lines.append(f"{said}: filtered")
    if not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise ConfigError(
            f"data.{which}: all {len(prompts)} prompts exceed rollout.max_prompt_tokens = {limit} "
            f"(shortest: {shortest}); raise the limit to keep some"
        )
    lines.append(_look(f"data.{which}", kept))
    if config.reward.function == "math" and os.environ.get("RANK", "0") == "0":
        lines.append(look_at_golds(f"data.{which}", [prompt.answer for prompt in kept]))
    return kept, lines


def _look(key: str, prompts: Sequence[Prompt]) -> str:
    """The lengths of the prompts, and the first of them as the model reads it."""
    lengths, first = [len(prompt.token_ids) for prompt in prompts], prompts[0]
    return (
        f"{key}: prompts of {min(lengths):,} to {max(lengths):,} tokens; the first: {_shortened(first.text)!r}, "
        f"gold answer {_shortened(first.answer)!r}"
    )


def _shortened(text: str) -> str:
    """Beginning and end: a chat template and data.suffix show at both."""
    return (
        text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS // 2]} … {text[-SHOWN_CHARACTERS // 2 :]}"
    )


def to_prompt(question: Question, config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Render one question with the chat template or as it stands, and tokenise it."""
    if config.data.template == "chat":
        if tokenizer.chat_template is None:
            raise ConfigError('data.template: the tokenizer has no chat template; set data.template = "plain"')
        messages = [dict(message) for message in question.messages]
        messages[-1]["content"] += config.data.suffix
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = question.text + config.data.suffix
    token_ids = tokenizer(text, add_special_tokens=config.data.template == "plain")["input_ids"]
    return Prompt(
        uid=question.uid, token_ids=tuple(token_ids), text=text, answer=question.answer, columns=question.columns
    )


def stop_tokens(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's EOS and those of the model's generation_config."""
    stops: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        declared = GenerationConfig.from_pretrained(model_dir).eos_token_id
    except OSError:  # the file is optional
        declared = None
    if declared is not None:
        stops.update([declared] if isinstance(declared, int) else declared)
    if not stops:
        raise ConfigError(
            f"learner.model: {model_dir} names no end-of-sequence token in its tokenizer or generation_config"
        )
    return tuple(sorted(stops))


def held_out(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The first `limit` evaluation prompts; 0 is all."""
    return list(prompts[:limit] if limit else prompts)
