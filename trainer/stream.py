"""The stream of groups. Rank 0 owns workers, buffer and mixer (`Rollouts`); every rank gets the same groups."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from core.config import Config
from core.configcheck import require_explorers
from core.schema import Group, Prompt, ScoredCompletion, Source
from rollout.buffer import BufferState, ReplayBuffer
from rollout.completion_store import CompletionStore
from rollout.demand import Demand
from rollout.ledger import Ledger
from rollout.messages import Lease
from rollout.mixer import Mixer
from rollout.pool import WorkerPool
from rollout.reuse import Reuse, store_identity
from rollout.roster import RoleTerms
from rollout.shared_ids import unknown_tokens
from rollout.timetable import Timetable
from trainer.devices import Devices
from trainer.learner import Learner
from trainer.published import PublishedWeights
from trainer.run_directory import RunDirectory
from trainer.signals import SIGNALS, Stopped
from trainer.timeline import Stages
from trainer.weight_buffers import WeightBuffers
from trainer.world import World

NO_GPUS = Devices()
_Part = tuple[tuple[Group, ...], bool]  # groups, and whether they are the step's last


class Rollouts:
    """Rank 0's machinery: starts the workers, asks for completions, scores them, forms groups; stopped by `close`."""

    def __init__(
        self,
        config: Config,
        demand: Demand,
        directory: RunDirectory,
        terms: dict[Source, RoleTerms],
        *,
        decode: Callable[[Sequence[int]], str],
        on_wait: Callable[[str, float], None],
        on_event: Callable[[str], None] = lambda line: None,
        devices: Devices = NO_GPUS,
        weights: PublishedWeights | WeightBuffers,
    ) -> None:
        self.devices, self.weights, self.incarnation = devices, weights, directory.incarnation
        self.config, self.demand, self.path = config, demand, directory.path
        self.ledger = Ledger()
        self.buffer = ReplayBuffer(self.ledger, max_bytes=config.stream.buffer_mb << 20)
        self.pool = WorkerPool(
            devices.for_workers(config),
            run_id=directory.run_id,
            incarnation=directory.incarnation,
            terms=terms,
            on_completion=lambda purpose, completion: self.mixer.receive(purpose, completion),
            may_grant=self._may_grant,
            on_event=on_event,
        )
        self._explorers_started = self._handed_over = False
        self.reuse: Reuse | None = None
        if config.explorer.store and Source.EXPLORER in terms:
            identity = store_identity(config, demand, terms[Source.EXPLORER].fingerprints)
            store = CompletionStore(Path(config.explorer.store), identity)
            self.reuse = Reuse(store, demand, on_missing=self._start_explorers)
        try:
            self.mixer = Mixer(
                config, demand, self.pool, self.buffer, self.ledger, decode=decode, on_wait=on_wait, on_event=on_event,
                reward_log=directory.path / "logs" / "reward.log", reuse=self.reuse,
                why_unfit=unknown_tokens(config, {source: role.vocab_size for source, role in terms.items()}),
            )  # fmt: skip
        except BaseException:  # such as a reward function that cannot be used
            self.pool.close("the trainer did not start")
            raise

    def start(self, after: int) -> None:
        """Start the workers for the steps after `after`: 0, or the one that was restored. No explorer where none of
        these steps owes it anything; under handover such a process begins where it would end, among the learner's.
        ConfigError where explorers are needed and none can come."""
        left = [step for step in self.demand.explorer_steps if step > after]
        if left and (self.reuse is None or not self.reuse.complete(left)):
            require_explorers(self.config)
            self._start_explorers()
        elif 0 < self.demand.last_explorer_step <= after and self.config.rollout.roles == "handover":
            self._start_explorers(Source.LEARNER)
        self.timetable = Timetable(self.config, self.demand.quota, after)
        for index in range(self.config.rollout.processes):
            first = self.timetable.first_role(index) if self._explorers_started else None
            self.pool.spawn(Source.LEARNER, index, self.devices.of_worker(Source.LEARNER, index), first)

    def request(self, step: int) -> None:
        """Ask for the completions of `step`; processes that it needs as learner workers stop exploring."""
        if names := self.timetable.due(step):
            self.pool.hand_over(*names)
        self.mixer.request(step)

    def publish(self, learner: Learner) -> None:
        """Hand the learner's weights to the rollout workers; they load them before leases that need them."""
        file, digest = self.weights.write(learner.step, learner.write_weights)
        self._checksum = float(int(digest[:12], 16))  # 48 bits, which a float holds exactly
        self.pool.publish_weights(learner.step, file, digest, shared=isinstance(self.weights, WeightBuffers))

    def collect(self, step: int, first: int, prompts: int | None) -> _Part:
        """Groups of `step`, as `Mixer.collect` gives them, and whether they are its last. Once nothing is wanted of the
        explorers any more, they may be handed over. Raises Stopped where a signal came checkpoint.grace_s ago."""
        if first:
            SIGNALS.give_up(self.config.checkpoint.grace_s)
        groups = self.mixer.collect(step, first=first, prompts=prompts)
        hands_over = self.config.rollout.roles == "handover" and self._explorers_started
        if hands_over and not self._handed_over and self.mixer.explorer_is_done(step):
            self._handed_over = True
            self.pool.hand_over()
        return groups, self.buffer.trained_step >= step

    def save(self, directory: Path) -> None:
        """Write what arrived and did not train yet, and the accounts, for a checkpoint."""
        state, report = self.pool.quiet(self._snapshot)
        (directory / "buffer.msgpack").write_bytes(msgspec.msgpack.encode(state))
        (directory / "ledger.json").write_bytes(msgspec.json.encode(report))
        self.demand.pace.save(directory)

    def restore(self, directory: Path, step: int) -> None:
        """Continue after `step` with what a checkpoint holds."""
        self.demand.pace.load(directory, step)
        self.ledger.restore(msgspec.json.decode((directory / "ledger.json").read_bytes()))
        state = msgspec.msgpack.decode((directory / "buffer.msgpack").read_bytes(), type=BufferState)
        self.buffer.restore(state, step)
        self.mixer.resume(step)

    def report(self) -> dict[str, Any]:
        """The ledger, closed."""
        return self.pool.quiet(self._snapshot)[1]

    def metrics(self) -> dict[str, float]:
        """Gauges of the stream for a training line."""
        return {
            "run/start": float(self.incarnation),
            "weights/checksum": self._checksum,
            "buffer/resident": float(sum(self.buffer.resident().values())),
            "buffer/bytes": float(self.buffer.num_bytes),
            **{name: float(value) for name, value in self.ledger.totals().items()},
            **({} if self.reuse is None else self.reuse.metrics()),
        }

    def close(self) -> None:
        """Stop workers and scorers."""
        self.pool.close("the run is over")
        self.mixer.close()
        self.weights.close()
        if self.reuse is not None:
            self.reuse.close()

    def _snapshot(self, sources: Mapping[str, Any]) -> tuple[BufferState, dict[str, Any]]:
        """Buffer and accounts of one moment: the pool's thread is here, so nothing arrives, and no reward fails."""
        with self.buffer.still():
            return self.buffer.state(), self.ledger.report(sources, self.buffer.resident())

    def _start_explorers(self, first: Source | None = None) -> None:
        """The first time something must be generated: a run whose completions are all on record starts none."""
        if not self._explorers_started:
            self._explorers_started = True
            for index in range(self.config.explorer.processes):
                self.pool.spawn(Source.EXPLORER, index, self.devices.of_worker(Source.EXPLORER, index), first)

    def _may_grant(self, lease: Lease) -> bool:
        """Work ahead of the trainer waits while the buffer is full; what the trainer waits for never does."""
        return lease.purpose == "eval" or lease.step <= self.mixer.wanted_step or self.buffer.has_room(lease.max_bytes)


class GroupStream:
    """What the loop sees, the same on every rank: `rollouts` is None on all but rank 0.

    `within_step`: a part of a step was handed out, and not yet all of it.

    Example: stream.request(1); [groups] = stream.parts(1)
    """

    def __init__(self, world: World, rollouts: Rollouts | None) -> None:
        self.world, self.rollouts = world, rollouts
        self.stages, self.within_step = Stages(), False

    def request(self, step: int) -> None:
        """Ask for the completions of `step`; asking again does nothing."""
        if self.rollouts is not None:
            self.rollouts.request(step)

    def parts(self, step: int, prompts: int | None = None) -> Iterator[tuple[Group, ...]]:
        """The groups of `step`, each with exactly its quota, in prompt order: all at once, or by `prompts`, each part
        as soon as it is complete.

        Raises Stopped, on every rank, where a signal asked before the first part; later the step ends first, if it does
        so within checkpoint.grace_s.
        """
        first, last = 0, False
        while not last:
            with self.stages("wait"):
                if not first:
                    SIGNALS.check(self.world.highest)
                groups, last = self._collect(step, first, prompts)
            self.within_step = True
            if groups:
                yield groups
                first = groups[-1].slot + 1
        self.within_step = False

    def _collect(self, step: int, first: int, prompts: int | None) -> _Part:
        """Rank 0's groups, on every rank. No bytes: a signal ended its wait."""
        if self.world.size == 1:
            assert self.rollouts is not None
            return self.rollouts.collect(step, first, prompts)
        payload = None
        if self.rollouts is not None:
            try:
                payload = msgspec.msgpack.encode(self.rollouts.collect(step, first, prompts))
            except Stopped:
                payload = b""
        received = self.world.broadcast_bytes(payload)
        if not received:
            raise Stopped(SIGNALS.asked or signal.SIGTERM, between_steps=not first)
        return msgspec.msgpack.decode(received, type=_Part)

    def publish(self, learner: Learner) -> None:
        """Give the rollout workers the learner's weights."""
        with self.stages("publish"):
            if self.rollouts is not None:
                self.rollouts.publish(learner)
            else:
                learner.write_weights(None)

    def metrics(self) -> dict[str, float]:
        """Waiting times and gauges of the last step."""
        seconds = {"time/wait_for_batch": self.stages.seconds("wait"), "time/publish": self.stages.seconds("publish")}
        return seconds | ({} if self.rollouts is None else self.rollouts.metrics())

    def evaluate(self, step: int, prompts: Sequence[Prompt]) -> list[list[ScoredCompletion]]:
        """Scored completions of held-out prompts (rank 0; elsewhere nothing)."""
        return [] if self.rollouts is None else self.rollouts.mixer.evaluate(step, prompts)
