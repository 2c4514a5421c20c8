"""Countdown's exact check for problems of a parquet file, in TRL's signature: `bench.paper_reward:countdown`."""

from typing import Any

from core.countdown import verify


def countdown(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a right response, 0 for any other."""
    return [float(verify(prompt, completion)[0]) for prompt, completion in zip(prompts, completions)]
