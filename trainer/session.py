"""One run, set up and torn down: directory, models, data, learner, workers; and what is due after each step."""

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from core.configfile import Command
from core.confighelp import explain
from core.configkeys import ConfigError
from core.metrics import read_metrics
from rollout.patience import Starved
from rollout.pool import WorkersLost
from rollout.status import Held
from rollout.store import write_rollouts
from trainer.alarm import GapAlarm, weight_metrics
from trainer.checkpoint import Found, newest_checkpoint
from trainer.checks import Place, check_start
from trainer.console import Console
from trainer.devices import memory_report, take_gpus
from trainer.evaluate import summarise
from trainer.learner import Learner, NonFiniteUpdatesError
from trainer.materials import load_materials, role_terms
from trainer.published import open_weights
from trainer.record import Recorder
from trainer.replay import compare, open_stream, recorded_part
from trainer.run_directory import RunDirectory
from trainer.saving import Saver
from trainer.signals import SIGNALS, Stopped, alive, show_stacks
from trainer.stream import GroupStream, Rollouts
from trainer.timeline import of_all_ranks, trace_loads
from trainer.updates import Updates
from trainer.world import World


class Session:
    """What the loop trains with. A context: whatever ends the run, workers stop and files are closed.

    Attributes: config; world; learner, at the step it continues from; stream, which hands out groups; updates, made of
    them; recorder, None on all ranks but 0.
    """

    world: World
    learner: Learner
    stream: GroupStream
    updates: Updates

    def __init__(self, command: Command) -> None:
        self.command, self.config = command, command.config
        self.path = Path(self.config.run.dir).resolve()
        self.recorder: Recorder | None = None
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._open()
        except ValueError as error:  # settings, files, models or data that do not fit: the user's to mend
            self._closing.close()
            raise ConfigError(str(error)) from error
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Stopped) and error.between_steps:
                self.saver.save(self.learner.step)
            elif isinstance(error, NonFiniteUpdatesError):
                self._keep_evidence()
            elif isinstance(error, Starved | WorkersLost):
                show_stacks()
            if kind is None:
                self.learner.save_model(self.path / "model" if self.world.is_main else None)
                if self.recorder is not None and self.command.replay is not None:
                    self.recorder.console.say(compare(self.command.replay, self.path / "model"))
                if self.recorder is not None:
                    self.recorder.conclude()
        finally:
            self._closing.close()

    def evaluate_first(self) -> None:
        """Evaluate π_θ before its first step, or where a signal cut its last evaluation short."""
        if self._evaluation_due(self.learner.step):
            self._evaluate(self.learner.step)
        if self.recorder is not None:
            self.recorder.begin()

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Write down a step that trained, then evaluate and save where that is due."""
        if self.recorder is not None:
            metrics = metrics | self.stream.metrics() | self._watch(metrics)
        ranks = of_all_ranks(self.stream.stages.take(), self.world)
        if self.recorder is not None:
            demand = self.materials.demand
            metrics |= demand.pace.metrics(step)
            line = self.recorder.step(step, self.updates.parts, demand.quota(step), metrics, ranks)
            demand.pace.observe(step, line)
        if self._evaluation_due(step):
            self._evaluate(step)
        if step == self.config.algorithm.steps or step % self.config.checkpoint.every == 0:
            self.saver.save(step)
        if self.recorder is not None:
            self.recorder.begin()
        alive(self.config.stream.starvation_s)

    def heed_signals(self) -> None:
        """Raise Stopped, on every rank, where a signal came: it may have cut the last evaluation short."""
        SIGNALS.check(self.world.highest)

    def _open(self) -> None:
        config = self.config
        torch.set_num_threads(config.run.threads)
        self.devices = take_gpus(config)
        timeout_s, line_size = config.stream.starvation_s + 300, config.learner.sequence_parallel
        self.world = World.join(config.run.device, timeout_s=timeout_s, line_size=line_size)
        self._closing.callback(self.world.leave)
        place = Place(self.world.rank, self.world.size, self.world.device)
        check_start(config, place._replace(generates=self.command.replay is None, resumes=self.command.resume))
        config = self.config = recorded_part(config, self.command.replay)
        if self.world.is_main:
            directory = RunDirectory(config, resume=self.command.resume, clean=self.command.clean)
            self._closing.callback(directory.close)
        self.world.barrier("the run directory", timeout_s=timeout_s)  # rank 0 may import a slow reward function
        found = self._checkpoint() if self.command.resume else None
        # Later steps happen again: what a killed run wrote of them does not count.
        history = read_metrics(self.path, until=found.step if found else 0) if self.command.resume else ()
        console = self._closing.enter_context(Console(config, history=history))
        self.alarm = GapAlarm(config, history)
        for line in explain(config):
            console.say(line)
        checkpoint = found.path if found else None
        self.materials = load_materials(config, self.world, console)
        if self.devices.placement.gpus:
            for line in self._memory():
                console.say(line)
        self.learner = Learner.load(
            config,
            model_dir=self.materials.learner_dir,
            explorer_dir=self.materials.explorer_dir,
            world=self.world,
            checkpoint=checkpoint,
        )
        rollouts = self._start_rollouts(directory, console, checkpoint) if self.world.is_main else None
        self.stream = open_stream(self.command.replay, self.world, rollouts, self.materials.demand)
        self.updates = Updates(config, self.stream, self.learner, self.world)
        self.saver = Saver(
            self.path / "checkpoints", self.learner, rollouts, self.recorder, keep=config.checkpoint.keep
        )
        self._closing.enter_context(SIGNALS.between_steps_only())
        self.stream.publish(self.learner)

    def _checkpoint(self) -> Found | None:
        """The newest one that verifies: rank 0 looks, however long it takes, so that its files are read once."""
        root = self.path / "checkpoints"
        found = newest_checkpoint(root) if self.world.is_main else None
        step = int(self.world.broadcast_bytes(b"%d" % (found.step if found else 0) if self.world.is_main else None))
        return Found(step, root / f"step_{step}") if step else None

    def _watch(self, metrics: dict[str, float]) -> dict[str, float]:
        """Rank 0: which weights the workers have, and whether their log-probs are the learner's."""
        assert self.recorder is not None
        tracer, rollouts, held = self.recorder.tracer, self.stream.rollouts, Held({}, [])
        if rollouts is not None:
            with suppress(TimeoutError):  # the pool is too busy to say
                held = rollouts.pool.held_weights()
            planned = rollouts.timetable.learners(self.learner.step)
            tracer.counter("learner workers", time.monotonic(), planned=planned, ready=len(held.versions))
        if held.versions:
            versions = {f"of {worker}": version for worker, version in held.versions.items()}
            tracer.counter("weights", time.monotonic(), **versions)
        trace_loads(tracer, held.loads)
        found = self.alarm.check(self.learner.step, metrics)
        if self.alarm.text:
            self.recorder.console.warn(self.alarm.text)
        return found | weight_metrics(held.versions)

    def _memory(self) -> list[str]:
        devices, materials = self.devices, self.materials
        report = memory_report(
            self.config, devices, materials.learner_dir, materials.explorer_dir, ranks=self.world.size
        )
        return [devices.placement.line(), *report]

    def _start_rollouts(self, directory: RunDirectory, console: Console, checkpoint: Path | None) -> Rollouts | None:
        """Rank 0: open the files it writes and start the workers; a replay has none."""
        step, materials = self.learner.step, self.materials
        for line in (*materials.report, *directory.notes):
            console.say(line)
        if self.command.resume:
            console.say(f"continuing after step {step}" if checkpoint else "no checkpoint yet: starting at step 1")
        self.recorder = Recorder(self.path, console, step if self.command.resume else None, self.config)
        self._closing.callback(self.recorder.close)
        if self.command.replay is not None:
            return None
        console.phase("starting the rollout workers")
        rollouts = Rollouts(
            self.config,
            materials.demand,
            directory,
            role_terms(materials),
            decode=materials.decode,
            on_wait=self._waiting,
            on_event=console.say,
            devices=self.devices,
            weights=open_weights(self.config, self.path, self.learner.weights_bytes, self.world.device, console.say),
        )
        self._closing.callback(rollouts.close)
        if rollouts.reuse is not None:
            console.say(f"explorer.store: {len(rollouts.reuse.store):,} completions on record")
        if checkpoint is not None:
            rollouts.restore(checkpoint / "trainer", step)
        rollouts.start(step)
        return rollouts

    def _waiting(self, what: str, seconds: float) -> None:
        assert self.recorder is not None
        alive(self.config.stream.starvation_s)
        self.recorder.console.waiting(what, seconds)
        if self.stream.within_step:  # half a step cannot be checkpointed
            SIGNALS.give_up(self.config.checkpoint.grace_s)
        else:
            SIGNALS.check()

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return step in (0, self.config.algorithm.steps) or (every > 0 and step % every == 0)

    def _evaluate(self, step: int) -> None:
        prompts, recorder = self.materials.eval_prompts, self.recorder
        if not prompts:
            return
        if recorder is not None and step not in recorder.log.evaluated_steps:
            # A signal cuts it short: collecting the next step ends the run, and a resumed one makes up for it.
            with recorder.stage("evaluate", step), suppress(Stopped):
                rows = self.stream.evaluate(step, prompts)
                recorder.evaluation(step, rows, summarise(rows, self.config.evaluation))
        self.world.await_main()

    def _keep_evidence(self) -> None:
        """The completions of the step that the run ends in; those of a step that trained are written as it ends."""
        if self.recorder is not None:
            write_rollouts(self.path, self.learner.step + 1, self.updates.groups)
