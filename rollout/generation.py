"""From leases to completions: an engine, the version of its weights, and new weights between two decode steps."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.courier import Courier
from rollout.engine import Engine, Request, Sampled
from rollout.fingerprint import file_digest
from rollout.messages import Lease, Weights
from rollout.shared_weights import Overwritten

_TRIES = 5  # versions in a row that a worker may come too late for
_ELSEWHERE = (
    "; it lies in the memory of the trainer's process: that has ended, or this worker is not of its user, on its "
    "machine and in its container. Start the worker there, or the run with rollout.weights=files"
)


class NotAsPublishedError(RuntimeError):
    """A published file is not there or has other bytes: it is damaged, or the trainer has deleted it since, as it does
    with the version before the last. The engine may hold parts of it."""


class Generator:
    """An engine and which weights it has. `in_flight`: a training lease in work goes on with weights that arrive.

    Example: generator.load(weights); generator.serve(lease, courier)
    """

    def __init__(self, engine: Engine, *, in_flight: bool) -> None:
        self.engine, self.in_flight = engine, in_flight
        self.version = 0

    def load(self, weights: Weights) -> None:
        """Replace the engine's weights. RuntimeError where what is read is not what was published: NotAsPublishedError,
        or Overwritten (rollout.shared_weights). A later version has to be loaded then before anything else."""
        if weights.shared:
            self.engine.load_shared(Path(weights.file), version=weights.version, digest=weights.digest)
        else:
            with _published(weights) as file:
                self.engine.load_weights(file, version=weights.version)
        self.version = weights.version

    def update(self, weights: Weights, courier: Courier) -> None:
        """Load these weights, or later ones where the trainer keeps these no longer, and say so.

        RuntimeError where no later ones come, or too many fail as well: this worker is not late then, but cannot read
        them, or they are damaged.
        """
        for tries_left in reversed(range(_TRIES)):
            started_s = time.monotonic()
            try:
                self.load(weights)
            except (Overwritten, NotAsPublishedError):
                newer = courier.newer_than(weights.version) if tries_left else None
                if newer is None:
                    raise
                weights = newer
            else:
                return courier.loaded(self.version, started_s)

    def serve(self, lease: Lease, courier: Courier) -> None:
        """Generate a lease as one batch and deliver its completions, each as soon as it is finished.

        An evaluation measures one set of weights, and explorers have but one: neither is ever given others half-way.
        """
        requests = [Request(np.frombuffer(item.prompt_bytes, "<i4").tolist(), item.seeds) for item in lease.items]
        takes_new = self.in_flight and lease.purpose == "train" and lease.source is Source.LEARNER

        def on_progress(tokens: int) -> None:
            courier.on_progress(tokens)
            weights = courier.newer_weights() if takes_new else None
            if weights is not None:
                self.update(weights, courier)

        started_s, first_version = time.monotonic(), self.version
        for sampled in self.engine.generate(requests, lease.sampling, on_progress=on_progress):
            courier.deliver(self._completion(lease, sampled, courier.name, started_s, first_version))

    def _completion(
        self, lease: Lease, sampled: Sampled, worker: str, started_s: float, first_version: int
    ) -> Completion:
        item = lease.items[sampled.request]
        key = CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=item.samples[sampled.sample])
        spans = sampled.versions if lease.source is Source.LEARNER and len(sampled.versions) > 1 else ()
        version = sampled.versions[0][1] if sampled.versions else first_version
        return Completion(
            key=key,
            prompt_uid=item.prompt_uid,
            token_bytes=pack_tokens(sampled.token_ids),
            logprob_bytes=pack_logprobs(sampled.logprobs),
            finish=sampled.finish,  # type: ignore[arg-type]
            version=version if lease.source is Source.LEARNER else 0,
            spans=spans,
            worker=worker,
            started_s=started_s,
            finished_s=time.monotonic(),
        )


@contextmanager
def _published(weights: Weights) -> Iterator[Path]:
    """A path of the published file, which holds what was published. NotAsPublishedError where there is none, or where
    it is deleted before the context ends.

    For weights in the trainer's memory that takes a descriptor of this process: the trainer gives the number of its
    own to a later version, and what is hashed must be what is loaded.
    """
    file = Path(weights.file)
    in_memory = file.is_relative_to("/proc")
    elsewhere = _ELSEWHERE if in_memory else ""
    with ExitStack() as held:
        try:
            if not file.is_file():  # on another machine the same name may be a pipe, which would be waited for
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if in_memory:
                stream = held.enter_context(file.open("rb"))
                file = Path(f"/proc/{os.getpid()}/fd/{stream.fileno()}")
            found = file_digest(file)
        except OSError as error:
            raise NotAsPublishedError(
                f"weights {weights.version}: {weights.file} cannot be read ({error.strerror}){elsewhere}"
            ) from error
        if found != weights.digest:
            raise NotAsPublishedError(
                f"weights {weights.version}: {weights.file} has digest {found}, not {weights.digest}{elsewhere}"
            )
        try:
            yield file
        except Exception as error:
            if file.exists():
                raise
            raise NotAsPublishedError(
                f"weights {weights.version}: {weights.file} was deleted while it was loaded ({error})"
            ) from error
