"""What workers and the trainer say to each other. Strict msgspec; one tagged union for each direction.

    worker                                   trainer (rollout.pool)
      Join(role)                    →       repeated until answered
                                    ←   Welcome(run, model, limits)  or  Refused(reason)
      Hello(fingerprints)           →       repeated until answered
                                    ←   Weights(version, file)  learner rollouts only, before any lease that needs it
                                    ←   Grant(lease)            while the worker's credit lasts
      Deliver(seq, completion)      →       kept in the worker's outbox until acknowledged
      Heartbeat(beat, …)            →
                                    ←   Acknowledge(seqs, beat) answers every delivery and every heartbeat
                                    ←   Stop(reason)            or Rejoin(reason), where the worker is not known
      Leave(reason)                 →

Messages of one link keep their order but may get lost, so every fact is repeated until it holds. A worker that sees
beat b acknowledged sends again what it delivered before b and has no acknowledgement for. A heartbeat names the leases
and the weights version the worker has: the trainer grants a missing lease again and repeats missing weights.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from core.schema import Completion, Sampling, Source

SCHEMA_VERSION = 4  # in the header of every frame (rollout.frame)
LOADS_TOLD = 8

Name = Annotated[str, Meta(min_length=1, max_length=120)]
Text = Annotated[str, Meta(max_length=4000)]
Count = Annotated[int, Meta(ge=0, le=2**62)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True, gc=False):
    """A part of a frame."""


class Join(Message, frozen=True, kw_only=True):
    """A worker asks what to do. `worker` is its name, fresh for each session (name plus random epoch)."""

    worker: Name
    role: Source
    pid: Count
    host: Name


class Welcome(Message, frozen=True, kw_only=True):
    """The run's terms: what to load and how to behave."""

    run_id: str
    incarnation: int  # counts the trainer's starts of this run; leases of an earlier one are void
    model: str  # Hugging Face directory; a worker on another host may override the path, not the content
    engine: str
    device: str
    dtype: str
    tensor_parallel: int
    memory_share: float
    max_model_tokens: int  # longest prompt and completion together
    heartbeat_s: float
    liveness_s: float
    silence_s: float  # without an answer for so long, a worker that the trainer started exits
    window: int  # largest distance of a new delivery's seq from the oldest unacknowledged one
    max_frame_bytes: int
    update_in_flight: bool = False  # learner rollouts go on with new weights in the middle of a training lease
    shared_weights: bool = False  # new weights lie in memory of the trainer's device (rollout.weights = "device")


class Fingerprints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 (hex) of what decides a completion besides its lease. `weights` is empty for learner rollouts."""

    tokenizer: str
    weights: str


class Hello(Message, frozen=True, kw_only=True):
    """The worker is loaded. The trainer grants leases only if the fingerprints are its own."""

    fingerprints: Fingerprints
    vocab_size: int


class LeaseItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One prompt of a lease: `samples[i]` is drawn with `seeds[i]`.

    Example: LeaseItem(slot=17, prompt_uid="7f3a", prompt_bytes=pack_tokens((8, 5)), samples=(0, 1), seeds=(11, 12))
    """

    slot: int
    prompt_uid: str
    prompt_bytes: bytes  # int32 little-endian
    samples: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.seeds) or len(set(self.samples)) != len(self.samples):
            raise ValueError(f"slot {self.slot}: samples {self.samples} need to be distinct, with one seed each")


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A unit of work, generated as one batch, so that its completions do not depend on which worker takes it or when.

    `purpose`: `train` completions go to the replay buffer, `eval` ones to whoever asked.

    Example: Lease(lease_id="train/explorer/3/0", purpose="train", source=Source.EXPLORER, step=3, version=0,
                   sampling=Sampling(...), items=(LeaseItem(...),))
    """

    lease_id: Name  # unique within an incarnation
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

    @property
    def max_bytes(self) -> int:
        """Most bytes its completions can take in the buffer: an id and a log-prob of 4 bytes for each token."""
        return 8 * self.sampling.max_tokens * self.num_completions


class Grant(Message, frozen=True, kw_only=True):
    """Work. A worker that already has the lease ignores it."""

    lease: Lease


class Weights(Message, frozen=True, kw_only=True):
    """New learner weights: load them before any lease that asks for `version`."""

    version: int
    file: str  # safetensors, readable by the worker; with `shared`, what says where the trainer's buffer is
    digest: str  # rollout.fingerprint.file_digest of it, or rollout.shared_weights.digest_of what is in the buffer
    shared: bool = False  # they lie in memory of the trainer's device (rollout.shared_weights)


class Deliver(Message, frozen=True, kw_only=True):
    """One completion. `seq` counts the worker's deliveries from 1; sent again until acknowledged."""

    seq: Annotated[int, Meta(ge=1, le=2**62)]
    lease_id: Name
    purpose: Literal["train", "eval"]
    completion: Completion


class Acknowledge(Message, frozen=True, kw_only=True):
    """The trainer has these deliveries (inserted, or rejected for good) and has seen heartbeat number `beat`."""

    seqs: tuple[int, ...]
    beat: int


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A worker's engine took new weights. CLOCK_MONOTONIC of the worker's host, for the trace only."""

    version: Count
    started_s: float
    finished_s: float


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent every heartbeat_s by the worker's network thread; the one that generates moves `progress`."""

    beat: Annotated[int, Meta(ge=1, le=2**62)]  # counts from 1
    progress: Count  # decode steps, deliveries and loads so far: stands still when the worker hangs
    doing: Text  # one phrase for "what it waits for" lines, such as "generating train/explorer/3/0" or "idle"
    produced: Count  # completions so far: the seq of the last one
    unacknowledged: Count
    leases: Annotated[tuple[Name, ...], Meta(max_length=4096)]  # queued, in work, or unacknowledged in part
    version: Count  # newest weights it was told of
    loaded: Count = 0  # weights that its engine has
    loads: Annotated[tuple[Load, ...], Meta(max_length=LOADS_TOLD)] = ()  # its last ones, oldest first, in every beat


class Leave(Message, frozen=True, kw_only=True):
    """The worker goes; its leases may go to another at once."""

    reason: Text


class Refused(Message, frozen=True, kw_only=True):
    """The worker may not take part; it prints the reason and exits with 2."""

    reason: str


class Rejoin(Message, frozen=True, kw_only=True):
    """Begin again with Join: the trainer does not know the worker (it restarted, or gave the worker up), or hands it
    over to another role."""

    reason: str
    role: Source | None = None  # the one to join with; None: as before


class Stop(Message, frozen=True, kw_only=True):
    """The run is over; the worker exits with 0."""

    reason: str


FromWorker = Join | Hello | Deliver | Heartbeat | Leave
FromTrainer = Welcome | Grant | Weights | Acknowledge | Refused | Rejoin | Stop
