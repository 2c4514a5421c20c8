"""Fill a store of explorer completions with no learner running.

`python -m rollout.explorer --record STORE [configs/NAME.toml] [section.key=value …] [--part I/N] [--engine NAME]`
generates what the explorer of that configuration owes and the store lacks, lease by lease as a run would, so that a run
of the same configuration reads the very bits it would have generated. Explorers of several parts may fill one store.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from core.config import Config
from core.configcheck import EMBEDDED, check_config, check_paths, explorer_tokens
from core.configfile import parse_command
from core.prompts import PromptSchedule
from core.schema import CompletionKey, Source
from rollout.completion_store import CompletionStore, Recorded
from rollout.demand import Demand
from rollout.engine import Engine, Request
from rollout.fingerprint import fingerprints
from rollout.messages import Lease
from rollout.reuse import Reuse, store_identity


def record(
    config: Config, engine: Callable[[Path], Engine], part: tuple[int, int], say: Callable[[str], None]
) -> tuple[int, int]:
    """Generate what the store `explorer.store` lacks of this part's leases. Returns how many there were, how many came.

    Part (i, n) is every n-th lease from the i-th on, i from 0.
    """
    learner_dir, explorer_dir = _directories(config)
    demand = _demand(config, learner_dir)
    marks = fingerprints(explorer_dir, weights=True)
    store = CompletionStore(Path(config.explorer.store), store_identity(config, demand, marks))
    reuse = Reuse(store, demand, on_missing=lambda: None)
    steps = range(1, config.algorithm.steps + 1)
    leases = [lease for step in steps for lease in demand.leases(Source.EXPLORER, step)][part[0] :: part[1]]
    owed = sum(lease.num_completions for lease in leases)
    missing = reuse.missing(leases)
    made, wanted = 0, sum(lease.num_completions for lease in missing)
    say(f"{config.explorer.store}: {owed - wanted:,} of {owed:,} completions are on record")
    model = engine(explorer_dir) if missing else None
    for lease in missing:
        assert model is not None
        store.add(sorted(_generate(model, lease, demand), key=lambda row: (row.number, row.prompt_uid)))
        made += lease.num_completions
        say(f"step {lease.step}: {made:,} of {wanted:,} recorded")
    return owed - wanted, made


def _generate(engine: Engine, lease: Lease, demand: Demand) -> Iterator[Recorded]:
    requests = [Request(np.frombuffer(item.prompt_bytes, "<i4").tolist(), item.seeds) for item in lease.items]
    for sampled in engine.generate(requests, lease.sampling):
        item = lease.items[sampled.request]
        sample = item.samples[sampled.sample]
        key = CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample)
        yield Recorded(item.prompt_uid, demand.number(key), sampled.token_ids, sampled.logprobs, sampled.finish)


def _demand(config: Config, learner_dir: Path) -> Demand:
    from transformers import AutoTokenizer

    from rollout.prompting import load_prompts, stop_tokens

    tokenizer = AutoTokenizer.from_pretrained(learner_dir, local_files_only=True)
    prompts, _ = load_prompts(config, "train", tokenizer)
    schedule = PromptSchedule(prompts, seed=config.run.seed, per_step=config.algorithm.prompts_per_step)
    return Demand(config, schedule, stop_tokens(learner_dir, tokenizer))


def _directories(config: Config) -> tuple[Path, Path]:
    """Of the learner (only its tokenizer is read) and the explorer; the embedded family is made where it is not yet."""
    names = {"learner": config.learner.model, "explorer": config.explorer.model}
    if any(name.startswith(EMBEDDED) for name in names.values()):
        command = [sys.executable, "-m", "trainer.family", str(config.run.seed)]
        family = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        names = {role: family[role] if name.startswith(EMBEDDED) else name for role, name in names.items()}
    return Path(names["learner"]), Path(names["explorer"])


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/2")
    return int(first) - 1, int(count)


def main(arguments: Sequence[str]) -> int:
    """Entry of `python -m rollout.explorer --record`; exit code 2: called wrongly, or the store is another's."""
    parser = argparse.ArgumentParser(
        prog="python -m rollout.explorer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", required=True, metavar="STORE", help="directory of recorded completions")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="every N-th lease, from the I-th on")
    parser.add_argument("--engine", help="torch or module:function (default: rollout.engine)")
    parser.add_argument("settings", nargs="*", help="configuration file and section.key=value, as of trainer/main.py")
    options = parser.parse_args(arguments)
    try:
        config = parse_command(options.settings).config
        config = msgspec.structs.replace(
            config, explorer=msgspec.structs.replace(config.explorer, store=options.record)
        )
        check_config(config)
        check_paths(config)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OMP_NUM_THREADS", str(config.run.threads))  # torch, which reads it, is imported later
        from rollout.worker import load_engine

        def engine(model_dir: Path) -> Engine:
            rollout = config.rollout
            return load_engine(
                options.engine or config.engine,
                model_dir,
                device=config.run.device,
                dtype=config.learner.dtype,
                tensor_parallel_size=rollout.tensor_parallel,
                memory_share=rollout.memory_share,
                max_model_len=rollout.max_prompt_tokens + explorer_tokens(config),
            )

        record(config, engine, options.part, lambda line: print(line, flush=True))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"s2l-po: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
