"""What workers and the trainer say to each other. Strict msgspec; one tagged union for each direction.

    worker                                   trainer (rollout.pool)
      Join(schema, role)            →
                                    ←   Welcome(run, model, sampling, limits)  or  Refused(reason)
      Hello(run, fingerprints)      →
                                    ←   Weights(version, file)  learner rollouts only, before any lease that needs it
                                    ←   Grant(lease)            while the worker's credit lasts
      Deliver(seq, completion)      →   (kept in the worker's outbox until acknowledged)
                                    ←   Acknowledge(seqs)
      LeaseDone(lease)              →
      Heartbeat(progress)           →   (tokens drawn so far: a worker that hangs stops counting)
                                    ←   Stop(reason)
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from core.schema import Completion, Sampling, Source

SCHEMA_VERSION = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True, gc=False):
    """A frame's payload."""


class Join(Message, kw_only=True):
    """A worker asks what to do. `worker` is its name, fresh for each incarnation (name plus random epoch)."""

    schema_version: int
    worker: Annotated[str, Meta(min_length=1, max_length=120)]
    role: Source
    pid: int


class Welcome(Message, kw_only=True):
    """The run's terms: what to load and how to behave."""

    run_id: str
    incarnation: int  # counts the trainer's starts of this run; leases of an earlier one are void
    model: str  # Hugging Face directory; a worker on another host may override the path, not the content
    engine: str
    threads: int
    heartbeat_s: float
    liveness_s: float
    max_frame_bytes: int


class Fingerprints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 (hex) of what decides a completion besides its lease. `weights` is empty for learner rollouts."""

    tokenizer: str
    weights: str


class Hello(Message, kw_only=True):
    """The worker is loaded. The trainer grants leases only if the fingerprints are its own."""

    run_id: str
    incarnation: int
    fingerprints: Fingerprints
    vocab_size: int


class LeaseItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One prompt of a lease: `samples[i]` is drawn with `seeds[i]`."""

    slot: int
    prompt_uid: str
    prompt_bytes: bytes  # int32 little-endian
    samples: tuple[int, ...]
    seeds: tuple[int, ...]


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A unit of work, generated as one batch, so that its completions do not depend on which worker takes it or when.

    `purpose`: `train` completions go to the replay buffer, `eval` ones to whoever asked.
    """

    lease_id: str  # unique within an incarnation
    purpose: Literal["train", "eval"]
    source: Source
    step: int
    version: int  # smallest weights version that may serve it; 0 for explorers
    sampling: Sampling
    items: tuple[LeaseItem, ...]

    @property
    def num_completions(self) -> int:
        """Credit it costs."""
        return sum(len(item.samples) for item in self.items)


class Grant(Message, kw_only=True):
    """Work."""

    lease: Lease


class Weights(Message, kw_only=True):
    """New learner weights: load them before any lease that asks for `version`."""

    version: int
    file: str  # safetensors, readable by the worker
    sha256: str


class Deliver(Message, kw_only=True):
    """One completion. `seq` counts the worker's deliveries from 1; resent until acknowledged."""

    seq: Annotated[int, Meta(ge=1)]
    incarnation: int
    lease_id: str
    purpose: Literal["train", "eval"]
    completion: Completion


class LeaseDone(Message, kw_only=True):
    """All completions of a lease were delivered (not necessarily acknowledged)."""

    lease_id: str


class Acknowledge(Message, kw_only=True):
    """The trainer has these deliveries (inserted, or rejected for good); the outbox may forget them."""

    seqs: tuple[int, ...]


class Heartbeat(Message, kw_only=True):
    """Sent by the worker's own thread every heartbeat_s. `progress` counts tokens drawn and messages handled."""

    progress: int
    doing: str  # one phrase for "what it waits for" lines, such as "generating lease 12" or "idle"


class Refused(Message, kw_only=True):
    """The worker may not take part; it prints the reason and exits with 2."""

    reason: str


class Stop(Message, kw_only=True):
    """The run is over; the worker exits with 0."""

    reason: str


FromWorker = Join | Hello | Deliver | LeaseDone | Heartbeat
FromTrainer = Welcome | Grant | Weights | Acknowledge | Refused | Stop
