"""What a configuration means, in words: `--help` for every key, and the arithmetic of one run."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import msgspec

from core.anneal import all_quotas, explorer_needed
from core.config import Config
from core.configfile import FLAGS, USAGE
from core.confighints import ALIASES, meant
from core.configkeys import ConfigError, Key, all_keys, section_of
from core.pace import SIGNALS

TABLES = {  # table → what it is about
    "run": "the run's directory, seed and device",
    "algorithm": "steps, groups and batches, and the explorer's part in them",
    "loss": "the policy loss, its clips, KL penalty and entropy bonus",
    "correction.explorer": "ratio and weight of explorer rows (docs/ratios.md)",
    "correction.learner": "ratio and weight of learner rows",
    "correction": "explorer rows with A < 0",
    "learner": "the model that trains: optimizer, memory, sharding, LoRA",
    "explorer": "the frozen small model and how it samples",
    "rollout": "generation: engine, the learner's sampling, limits of length",
    "placement": "which process runs on which GPU (docs/cluster.md)",
    "stream": "between trainer and workers: address, keys, limits, timeouts",
    "data": "training and held-out prompts, their columns and template",
    "reward": "the reward function and the processes that run it",
    "evaluation": "held-out pass@k and diversity",
    "checkpoint": "how often, and how many are kept",
}


def help_text(width: int | None = None, words: Sequence[str] = ()) -> str:
    """Usage, flags and every key with its default, its type and its sentence, wrapped at `width` columns.

    With `words`, only the keys that have one of them in their name, or may be meant by it; else those with one in
    their sentence. Raises ConfigError where there is none either.
    """
    width = width or min(shutil.get_terminal_size().columns, 110)
    if words:
        return "\n".join(_entries(_keys_about(words), width)).strip()
    lines = textwrap.wrap(f"usage: {USAGE}", width, subsequent_indent="       ", break_on_hyphens=False)
    lines += [
        "",
        *_wrapped("With no argument: the embedded default, which needs no model, no data and no GPU.", width, ""),
        "",
    ]
    for flag, sentence in FLAGS.items():
        lines += textwrap.wrap(f"  {flag:<12}{sentence}", width, subsequent_indent=" " * 14)
    return "\n".join([*lines, *_entries(all_keys().values(), width)])


def _keys_about(words: Sequence[str]) -> list[Key]:
    keys = all_keys()
    called = {name for word in words for name in ALIASES.get(word, ())}
    found = [name for name in keys if name in called or any(word in name for word in words)]
    found = found or [name for name in keys if any(name in meant(word, keys) for word in words)]
    found = found or [name for name in keys if any(word.lower() in keys[name].sentence.lower() for word in words)]
    if not found:
        raise ConfigError(f"--help {' '.join(words)}: no key has that in its name or its description")
    return [keys[name] for name in found]


def _entries(keys: Iterable[Key], width: int) -> Iterator[str]:
    for table, members in groupby(keys, key=lambda key: section_of(key.name)):
        yield ""
        yield f"[{table}]  {TABLES[table]}"
        for key in members:
            yield f"  {key.name} = {msgspec.json.encode(key.default).decode()}"
            yield from _wrapped(f"{key.sentence} ({key.expected})", width, "      ")


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def explain(config: Config) -> list[str]:
    """The run in a few lines: which batch is which, the quota of every step, and what the explorer will owe by when."""
    lines = [_models(config), _batch(config), _quotas(config), _demand(config)]
    if config.algorithm.driver != "clock":
        lines.append(_driver(config))
    if config.data.eval:
        lines.append(_evaluation(config))
    return lines


def _models(config: Config) -> str:
    explorer = f"explorer {config.explorer.model}, " if explorer_needed(config) else ""
    return f"learner {config.learner.model}, {explorer}data {config.data.train}, reward {config.reward.function}"


def _batch(config: Config) -> str:
    algorithm, learner = config.algorithm, config.learner
    tokens = learner.micro_batch_tokens
    micro = f"{tokens} tokens" if tokens else f"{learner.micro_batch_rows} rows"
    if learner.sequence_parallel > 1:
        micro += f" on each of the {learner.sequence_parallel} ranks of a line"
    prompts, size, mini = algorithm.prompts_per_step, algorithm.group_size, algorithm.mini_batch_prompts
    updates = prompts // mini * algorithm.epochs
    if algorithm.mixing == "authors_code":
        return (
            f"{prompts} prompts x {size} completions per step, {size + 1} where α is fractional; an explorer phase, "
            f"then a learner phase, each of {updates} optimizer updates of {mini} prompts in micro-batches of {micro}"
        )
    return (
        f"{prompts} prompts x {size} completions = {prompts * size} completions per step; {updates} optimizer "
        f"update{'s' if updates > 1 else ''} of {mini * size}, micro-batches of {micro}"
    )


def _quotas(config: Config) -> str:
    """Run lengths of G_w+G_s, such as `8+0 in 1, 7+1 in 2-6`."""
    numbered = enumerate(all_quotas(config), start=1)
    parts = []
    for quota, members in groupby(numbered, key=lambda pair: pair[1]):
        steps = [step for step, _ in members]
        parts.append(f"{quota.explorer}+{quota.learner} in {_range(steps[0], steps[-1])}")
    what = "explorer+learner completions per prompt, by step: "
    if config.algorithm.mixing == "rescue":
        what = "explorer spares+learner completions per prompt, by step: "
    return what + ", ".join(parts)


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _demand(config: Config) -> str:
    quotas, prompts = all_quotas(config), config.algorithm.prompts_per_step
    owed = [prompts * quota.explorer for quota in quotas]
    total, everything = sum(owed), prompts * sum(sum(quota) for quota in quotas)
    if not total:
        return f"no explorer: plain GRPO, {everything:,} learner completions in {len(quotas)} steps"
    last = max(step for step, count in enumerate(owed, start=1) if count)
    half = _half_due(owed, total)
    return (
        f"the explorer owes {total:,} of {everything:,} completions ({total / everything:.0%}), the last at step "
        f"{last}, half of them by step {half}; it may run {config.explorer.ahead_steps} steps ahead"
    )


def _half_due(owed: list[int], total: int) -> int:
    so_far = 0
    for step, count in enumerate(owed, start=1):
        so_far += count
        if 2 * so_far >= total:
            return step
    raise AssertionError("half of a sum is reached within it")


def _driver(config: Config) -> str:
    algorithm, ahead = config.algorithm, config.algorithm.lookahead + config.explorer.ahead_steps
    return (
        f"all that by the clock, which α follows up to step {ahead}; then {SIGNALS[algorithm.driver]} of {ahead} steps "
        f"before decides: below {algorithm.driver_low:g} two steps along the schedule, above {algorithm.driver_high:g} "
        f"none; the explorer's last step is {algorithm.steps - 1} at the latest"
    )


def _evaluation(config: Config) -> str:
    evaluation = config.evaluation
    problems = f"{evaluation.problems} problems" if evaluation.problems else "all problems"
    often = f", every {evaluation.every} steps" if 0 < evaluation.every < config.algorithm.steps else ""
    return (
        f"evaluation of {problems} x {evaluation.samples} completions from {config.data.eval}: before{often} and after"
    )
