"""TRL's side of `bench.trl`, run by the Python of TRL's own environment: python -m bench.trl_rival JOB.json.

A job holds `arguments` of trl.GRPOConfig, the `model` directory, `prompts` in the order they train (text, ids) and
`threads`. Prints one JSON line per optimizer update and one of TRL's own log. Alone or under torchrun.
"""

import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.countdown import verify

MARK = "bench.trl "


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(job["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    texts = [prompt["text"] for prompt in job["prompts"]]
    ids = tokenizer(text=texts)["input_ids"]
    assert ids == [prompt["ids"] for prompt in job["prompts"]], "TRL's tokens of the prompts are others than ours"
    train(job, tokenizer, texts, transformers.TrainerCallback)


def train(job: dict[str, Any], tokenizer: Any, texts: list[str], callback: Any) -> None:
    """GRPOTrainer as it comes; only the clock is ours."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    seconds: Counter[str] = Counter()

    class Clocked(trl.GRPOTrainer):  # type: ignore[name-defined]
        """Adds up what its stages take; scoring is what making a batch takes beyond generation and rewards."""

        _generate = _clock(trl.GRPOTrainer._generate, seconds, "generate_s")
        _calculate_rewards = _clock(trl.GRPOTrainer._calculate_rewards, seconds, "reward_s")
        _generate_and_score_completions = _clock(
            trl.GRPOTrainer._generate_and_score_completions, seconds, "make_batch_s"
        )

    class Report(callback):
        """A line per update: when, the stages so far, and the mean length and reward that TRL logs."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "completions/mean_length" in logs and state.is_world_process_zero:
                line = {"update": state.global_step, "clock_s": time.monotonic(), **seconds}
                line |= {name: logs[name] for name in ("completions/mean_length", "reward", "step_time", "num_tokens")}
                print(MARK + json.dumps(line), flush=True)

    trainer = Clocked(
        model=job["model"], processing_class=tokenizer, reward_funcs=countdown,
        args=trl.GRPOConfig(**job["arguments"]),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]), callbacks=[Report()],
    )  # fmt: skip
    trainer.train()


def countdown(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The embedded task's reward, in TRL's signature."""
    return [float(verify(prompt, completion)[0]) for prompt, completion in zip(prompts, completions)]


def _clock(method: Callable[..., Any], seconds: Counter[str], name: str) -> Callable[..., Any]:
    def clocked(self: Any, *arguments: Any, **named: Any) -> Any:
        start_s = time.perf_counter()
        result = method(self, *arguments, **named)
        seconds[name] += time.perf_counter() - start_s  # type: ignore[assignment]
        return result

    return clocked


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
