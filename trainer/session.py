"""One run, set up and torn down: directory, models, data, learner, workers; and what is written after each step."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from core.config import Config
from core.configcheck import EMBEDDED, check_config, check_paths
from core.configfile import Command
from core.configkeys import ConfigError
from core.datasets import load_questions
from core.metrics import RunLog, read_metrics
from core.schema import Group
from rollout.store import write_rollouts
from trainer.batch import StepBatch, pack_step
from trainer.checkpoint import newest_checkpoint, write_checkpoint
from trainer.console import Console
from trainer.evaluate import summarise
from trainer.learner import Learner
from trainer.materials import load_materials, role_terms
from trainer.report import write_report
from trainer.run_directory import RunDirectory, write_atomic
from trainer.step_metrics import group_metrics
from trainer.stream import GroupStream, Rollouts
from trainer.trace import Tracer
from trainer.world import World


class Session:
    """What the loop trains with. A context: whatever ends the run, workers stop and files are closed.

    Attributes: config; world; learner, at the step it continues from; stream, which hands out groups.
    """

    learner: Learner
    stream: GroupStream

    def __init__(self, command: Command) -> None:
        self.command, self.config = command, command.config
        self._closing = ExitStack()
        self._step_started_s = time.monotonic()
        self._total_tokens = 0

    def __enter__(self) -> Self:
        try:
            self._open()
        except ValueError as error:  # bad input: settings, files, models or data that do not fit
            self._closing.close()
            raise ConfigError(str(error)) from error
        except BaseException:
            self._closing.close()
            raise
        return self

    def _open(self) -> None:
        config = self.config
        self.world = World.join(config.run.device, timeout_s=config.stream.starvation_s + 300)
        self._closing.callback(self.world.leave)
        check_config(config, self.world.size)
        check_paths(config)
        self.console = Console(config)
        self._closing.enter_context(self.console)
        if self.world.is_main:
            self.directory = RunDirectory(config, resume=self.command.resume, clean=self.command.clean)
            self._closing.callback(self.directory.close)
        self.path = Path(
            self.world.broadcast_bytes(str(self.directory.path).encode() if self.world.is_main else None).decode()
        )
        checkpoint = newest_checkpoint(self.path / "checkpoints") if self.command.resume else None
        self.materials = load_materials(config, self.world, self.console)
        self.learner = Learner.load(
            config,
            model_dir=self.materials.learner_dir,
            explorer_dir=self.materials.explorer_dir,
            world=self.world,
            checkpoint=checkpoint.path if checkpoint else None,
        )
        self.stream = GroupStream(self.world, self._start_rollouts(checkpoint.path if checkpoint else None))

    def _start_rollouts(self, checkpoint: Path | None) -> Rollouts | None:
        """Rank 0: open the files it writes, start the workers, and give them the learner's weights."""
        if not self.world.is_main:
            return None
        step, resumes = self.learner.step, self.command.resume
        self.log = self._closing.enter_context(RunLog(self.path, resume_step=step if resumes else None))
        self.tracer = Tracer(self.path, resume=resumes)
        self._closing.callback(self.tracer.close)
        materials = self.materials
        rollouts = Rollouts(
            self.config,
            materials.demand,
            self.directory,
            materials.terms,
            decode=materials.decode,
            on_wait=self.console.waiting,
        )
        self._closing.callback(rollouts.close)
        if checkpoint is not None:
            rollouts.restore(checkpoint / "trainer", step)
        rollouts.publish(self.learner)
        return rollouts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.world.is_main:
                self._conclude()
        finally:
            self._closing.close()

    def pack(self, groups: Sequence[Group]) -> StepBatch:
        """This rank's part of the step's optimizer updates."""
        return pack_step(groups, self.config, rank=self.world.rank, world_size=self.world.size)

    def evaluate_first(self) -> None:
        """Evaluate π_θ before its first step; a resumed run has done so."""
        if self.learner.step == 0:
            self._evaluate(0)

    def finish(self, step: int, groups: Sequence[Group], metrics: dict[str, float]) -> None:
        """Write down a step that trained, then evaluate and save where that is due."""
        if self.world.is_main:
            self._record(step, groups, metrics)
        every, last = self.config.evaluation.every, self.config.algorithm.steps
        if step == last or (every and step % every == 0):
            self._evaluate(step)
        if step == last or step % self.config.checkpoint.every == 0:
            self._save(step)
        self._step_started_s = time.monotonic()

    def _record(self, step: int, groups: Sequence[Group], metrics: dict[str, float]) -> None:
        rollouts = self.stream.rollouts
        assert rollouts is not None
        seconds = time.monotonic() - self._step_started_s
        tokens = sum(len(row.completion.tokens) for group in groups for row in group.rows)
        self._total_tokens += tokens
        line = {"step": step} | group_metrics(groups, self.materials.demand.quota(step), step) | metrics
        line |= rollouts.metrics() | self.stream.seconds
        line |= {"step_time": seconds, "num_tokens": self._total_tokens, "tokens_per_second": tokens / seconds}
        self.console.step(self.log.write(line))
        write_rollouts(self.path, step, groups)
        self._trace(step, groups)

    def _trace(self, step: int, groups: Sequence[Group]) -> None:
        """Spans of the leases that the step's completions came from, on the tracks of their workers."""
        spans = {
            (row.completion.worker, row.completion.started_s): row.completion for group in groups for row in group.rows
        }
        for (worker, started_s), completion in spans.items():
            source = completion.key.source
            self.tracer.add(
                worker,
                "generate",
                f"generate for step {step}",
                started_s,
                completion.finished_s,
                {"source": source.value},
            )
        self.tracer.flush()

    def _evaluate(self, step: int) -> None:
        if not self.materials.eval_prompts:
            return
        rows = self.stream.evaluate(step, self.materials.eval_prompts)
        if self.world.is_main:
            line = self.log.write({"step": step} | summarise(rows, self.config.evaluation))
            self.console.evaluation(line)

    def _save(self, step: int) -> None:
        """A checkpoint of everything a resumed run needs, with a Hugging Face directory inside."""
        if not self.world.is_main:
            return
        rollouts = self.stream.rollouts
        assert rollouts is not None

        parts = {
            "model": self.learner.save_model,
            "optimizer": lambda directory: self.learner.save_state(directory / "trainer"),
            "rollouts": lambda directory: rollouts.save(directory / "trainer"),
        }
        write_checkpoint(self.path / "checkpoints", step, parts, keep=self.config.checkpoint.keep)
        write_atomic(self.path / "ledger.json", json.dumps(rollouts.report(), indent=1))

    def _conclude(self) -> None:
        """The last words: the final model, the ledger and the report."""
        rollouts = self.stream.rollouts
        assert rollouts is not None
        self.learner.save_model(self.path / "model")
        write_atomic(self.path / "ledger.json", json.dumps(rollouts.report(), indent=1))
        self.tracer.flush()
        self.console.finish(read_metrics(self.path), report=write_report(self.path), model=self.path / "model")


def dry_run(config: Config) -> list[str]:
    """Read models and data of a configuration and say what was found; nothing is made, started or written."""
    check_paths(config)
    if config.learner.model.startswith(EMBEDDED):
        return list(load_questions(config.data, "train", config.run.seed).report)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return load_materials(config, world, Console(config)).report
