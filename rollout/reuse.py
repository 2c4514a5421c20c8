"""Which explorer completions of a run are on record, which must be generated, and recording those as they arrive.

consumes     explorer leases (any thread), explorer completions (the pool's thread)
produces     completions from the store, in order of need; leases for the missing ones; files, on its own thread
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from core.config import Config
from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.completion_store import CompletionStore, Identity, Recorded
from rollout.demand import Demand
from rollout.messages import Fingerprints, Lease

WORKER = "store"  # name of the worker of completions that were read


def store_identity(config: Config, demand: Demand, marks: Fingerprints) -> Identity:
    """What a store must have been filled with for a run's explorer to be able to use it."""
    return Identity(
        model=marks.weights,
        tokenizer=marks.tokenizer,
        template=config.data.template,
        suffix=config.data.suffix,
        sampling=demand.sampling[Source.EXPLORER],
    )


class _Place(NamedTuple):
    """A completion on record that the run wants; sorts by step."""

    step: int
    key: CompletionKey
    prompt_uid: str
    number: int
    max_bytes: int


class Reuse:
    """A run's view of a store. `on_missing` is called before a lease that must be generated is handed back.

    Whole leases are recorded: an explorer's lease is one batch, so that a run which is killed and resumed gets the
    same bits from the store and from the engine.

    Example: leases = reuse.missing(leases); found = reuse.due(step, buffer.has_room, buffer.knows)
    """

    def __init__(self, store: CompletionStore, demand: Demand, *, on_missing: Callable[[], None]) -> None:
        self.store, self.demand = store, demand
        self.reused, self.generated = 0, 0
        self._on_missing = on_missing
        self._lock = threading.Lock()
        self._found: list[_Place] = []
        self._recording: dict[CompletionKey, Lease] = {}
        self._rows: dict[str, list[Recorded]] = {}  # of unfinished leases
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._written: deque[Future[Path]] = deque()

    def complete(self, steps: Sequence[int]) -> bool:
        """Whether the store has all that the explorer owes at `steps`."""
        leases = (lease for step in steps for lease in self.demand.leases(Source.EXPLORER, step))
        return not any(self._lacks(lease) for lease in leases)

    def missing(self, leases: Sequence[Lease]) -> list[Lease]:
        """The leases without what is on record, which `due` hands out. Leases of the learner stay as they are."""
        left = []
        for lease in leases:
            short = lease if lease.source is Source.LEARNER else self._split(lease)
            if short is not None:
                left.append(short)
        return left

    def due(
        self, step: int, has_room: Callable[[int], bool], known: Callable[[CompletionKey], bool]
    ) -> list[Completion]:
        """Completions on record for steps up to `step`, and for later ones while there is room for them; none that is
        `known`, as those are which a checkpoint brought back."""
        with self._lock:
            self._found.sort()
            count = size = 0
            for place in self._found:
                size += place.max_bytes
                if place.key.step > step and not has_room(size):
                    break
                count += 1
            places = [place for place in self._found[:count] if not known(place.key)]
            del self._found[:count]
            self.reused += len(places)
            return [_completion(place.key, self.store.read(place.prompt_uid, place.number)) for place in places]

    def record(self, completion: Completion) -> None:
        """Keep an explorer completion that was generated; its lease is written when it is whole."""
        with self._lock:
            lease = self._recording.pop(completion.key, None)
            if lease is None:
                return
            self.generated += 1
            number = self.demand.number(completion.key)
            rows = self._rows.setdefault(lease.lease_id, [])
            rows.append(
                Recorded(completion.prompt_uid, number, completion.tokens, completion.logprobs, completion.finish)
            )
            if len(rows) < lease.num_completions:
                return
            whole = sorted(self._rows.pop(lease.lease_id), key=lambda row: (row.number, row.prompt_uid))
        self.check()
        self._written.append(self._writer.submit(self.store.add, whole))

    def resume(self, reused: int, generated: int) -> None:
        """Count on from what earlier starts of the run read and generated."""
        self.reused, self.generated = reused, generated

    def metrics(self) -> dict[str, float]:
        """Completions read and completions generated since the run began."""
        return {"store/reused": float(self.reused), "store/generated": float(self.generated)}

    def check(self) -> None:
        """Raise what went wrong while a file was written."""
        while self._written and self._written[0].done():
            self._written.popleft().result()

    def close(self) -> None:
        """Write what is whole."""
        self._writer.shutdown()
        self.check()

    def _lacks(self, lease: Lease) -> bool:
        return any((uid, self.demand.number(key)) not in self.store for uid, key in _keys(lease))

    def _split(self, lease: Lease) -> Lease | None:
        """Note what is on record; the rest as a lease, or None."""
        items, found = [], []
        for item in lease.items:
            wanted = []
            for sample, seed in zip(item.samples, item.seeds):
                key = CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample)
                number = self.demand.number(key)
                if (item.prompt_uid, number) in self.store:
                    found.append(_Place(lease.step, key, item.prompt_uid, number, 8 * lease.sampling.max_tokens))
                else:
                    wanted.append((sample, seed))
            if wanted:
                samples, seeds = zip(*wanted)
                items.append(msgspec.structs.replace(item, samples=samples, seeds=seeds))
        short = msgspec.structs.replace(lease, items=tuple(items)) if items else None
        with self._lock:
            self._found.extend(found)
            if short is not None:
                self._recording |= {key: short for _, key in _keys(short)}
        if short is not None:
            self._on_missing()
        return short


def _completion(key: CompletionKey, row: Recorded) -> Completion:
    now = time.monotonic()
    return Completion(
        key=key,
        prompt_uid=row.prompt_uid,
        token_bytes=pack_tokens(row.tokens),
        logprob_bytes=pack_logprobs(row.logprobs),
        finish=row.finish,  # type: ignore[arg-type]
        version=0,
        worker=WORKER,
        started_s=now,
        finished_s=now,
    )


def _keys(lease: Lease) -> list[tuple[str, CompletionKey]]:
    return [
        (item.prompt_uid, CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample))
        for item in lease.items
        for sample in item.samples
    ]
