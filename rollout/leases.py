"""Who works on what: pending leases, grants, and which completions of each are still missing. Pure: no clock, no IO.

The same calls in the same order give the same grants.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from core.schema import Completion, CompletionKey, Source
from rollout.messages import Lease, LeaseItem

# A worker generates one lease while the next one waits, so that it never idles for a round trip.
LEASES_AHEAD = 2
# Heartbeats that fail to name a granted lease before it counts as lost (the first may have crossed the grant).
MISSED_BEATS = 3
_Rank = tuple[bool, int, int, int, str]


class Verdict(StrEnum):
    """What a delivery is. Every value but WANTED is a reason to reject it."""

    WANTED = "wanted"
    DUPLICATE = "duplicate"
    UNKNOWN_LEASE = "unknown_lease"
    FOREIGN_KEY = "foreign_key"


class Work(NamedTuple):
    """One unfinished lease, for "what it waits for" lines."""

    lease: Lease
    received: int
    holder: str  # worker, or "" while it is queued


@dataclass
class _Entry:
    lease: Lease
    number: int
    items: dict[int, LeaseItem]
    outstanding: set[tuple[int, int]]  # (slot, sample)
    holder: str = ""
    losses: int = 0
    misses: int = 0

    @property
    def rank(self) -> "_Rank":
        """Evaluations first: they are short and want the newest weights. Then by step and prompt, because a step trains
        in the order of its prompts and a replacement must not wait for all the rest; then as submitted."""
        lease = self.lease
        return (lease.purpose != "eval", lease.step, min(self.items), self.number, lease.lease_id)


@dataclass
class _Holder:
    role: Source
    version: int = 0
    leases: dict[str, None] = field(default_factory=dict)  # in order of granting


class LeaseBook:
    """Grants leases to workers by role, credit and weights version; the first answer to a completion key wins.

    `credit`: completions a worker may have outstanding; a larger lease is granted to a worker that holds nothing.
    `max_losses`: a lease lost more often is not granted again but stands in `exhausted`.
    `remembered`: finished leases whose late deliveries are told apart from unknown ones.
    """

    def __init__(self, *, credit: int, max_losses: int = 8, remembered: int = 65536) -> None:
        self.credit, self.max_losses, self.remembered = credit, max_losses, remembered
        self.requeued = 0
        self.exhausted: dict[str, Lease] = {}
        self._submitted = 0
        self._entries: dict[str, _Entry] = {}
        self._queues: dict[Source, list[_Rank]] = {source: [] for source in Source}
        self._holders: dict[str, _Holder] = {}
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._live: set[tuple[str, CompletionKey]] = set()

    def submit(self, lease: Lease) -> None:
        """Queue a lease. ValueError where its id was used before or one of its keys is already being generated."""
        if lease.lease_id in self._entries or lease.lease_id in self._finished:
            raise ValueError(f"lease {lease.lease_id} was submitted before: lease ids are unique within an incarnation")
        keys, items = list(_keys(lease)), {item.slot: item for item in lease.items}
        if not keys or len(items) != len(lease.items) or not self._live.isdisjoint(keys):
            raise ValueError(
                f"lease {lease.lease_id} is empty, names a slot twice, or asks for a completion that another lease has"
            )
        self._live.update(keys)
        outstanding = {(item.slot, sample) for item in lease.items for sample in item.samples}
        entry = _Entry(lease, self._submitted, items, outstanding)
        self._submitted += 1
        self._entries[lease.lease_id] = entry
        insort(self._queues[lease.source], entry.rank)

    def admit(self, worker: str, role: Source) -> None:
        """A worker may be granted leases of its role."""
        self._holders.setdefault(worker, _Holder(role))

    def learn(self, worker: str, version: int) -> None:
        """The worker was sent weights of this version."""
        self._holders[worker].version = version

    def grant(self, worker: str, *, limit: int = 1, may_grant: Callable[[Lease], bool] | None = None) -> list[Lease]:
        """At most `limit` leases for the worker, most urgent first, which it now holds."""
        holder = self._holders.get(worker)
        granted: list[Lease] = []
        if holder is None:
            return granted
        queue = self._queues[holder.role]
        for rank in list(queue):
            if len(granted) == limit or len(holder.leases) == LEASES_AHEAD:
                break
            entry = self._entries[rank[-1]]
            if entry.lease.version > holder.version:
                continue
            if holder.leases and self.owed(worker) + len(entry.outstanding) > self.credit:
                break
            if may_grant is not None and not may_grant(entry.lease):
                continue
            queue.remove(rank)
            entry.holder, entry.misses = worker, 0
            holder.leases[entry.lease.lease_id] = None
            granted.append(entry.lease)
        return granted

    def __contains__(self, lease_id: str) -> bool:
        """Whether completions of the lease are outstanding."""
        return lease_id in self._entries

    def may_second(self, worker: str, lease_id: str) -> bool:
        """Whether an idle worker could do what another one holds."""
        holder, entry = self._holders.get(worker), self._entries[lease_id]
        if holder is None or holder.leases or entry.holder in ("", worker):
            return False
        return holder.role == entry.lease.source and holder.version >= entry.lease.version

    def verdict(self, lease_id: str, purpose: str, key: CompletionKey) -> Verdict:
        """Whether a completion is wanted, without taking it."""
        entry = self._entries.get(lease_id)
        if entry is None:
            return Verdict.DUPLICATE if lease_id in self._finished else Verdict.UNKNOWN_LEASE
        lease, item = entry.lease, entry.items.get(key.slot)
        if (purpose, key.source, key.step) != (lease.purpose, lease.source, lease.step):
            return Verdict.FOREIGN_KEY
        if item is None or key.sample not in item.samples:
            return Verdict.FOREIGN_KEY
        return Verdict.WANTED if (key.slot, key.sample) in entry.outstanding else Verdict.DUPLICATE

    def receive(self, lease_id: str, completion: Completion) -> None:
        """Take a wanted completion; the lease ends with its last one."""
        entry = self._entries[lease_id]
        key = completion.key
        entry.outstanding.remove((key.slot, key.sample))
        if not entry.outstanding:
            self._forget(entry)
            self._finished[lease_id] = None
            while len(self._finished) > self.remembered:
                self._finished.popitem(last=False)

    def lookup(self, lease_id: str) -> Lease:
        """An unfinished lease."""
        return self._entries[lease_id].lease

    def prompt_uid(self, lease_id: str, slot: int) -> str:
        """Of a slot of an unfinished lease."""
        return self._entries[lease_id].items[slot].prompt_uid

    def reconcile(self, worker: str, held: Iterable[str]) -> int:
        """A heartbeat named the leases the worker has; what it keeps omitting is queued again. Returns how many."""
        holder, have = self._holders.get(worker), set(held)
        lost = []
        for lease_id in holder.leases if holder is not None else ():
            entry = self._entries[lease_id]
            entry.misses = 0 if lease_id in have else entry.misses + 1
            if entry.misses >= MISSED_BEATS:
                lost.append(entry)
        for entry in lost:
            self._requeue(entry, blame=True)
        return len(lost)

    def retract(self, worker: str, lease_id: str) -> None:
        """A grant could not be sent: the lease is queued again and nobody is blamed."""
        self._requeue(self._entries[lease_id], blame=False)

    def lose(self, worker: str) -> int:
        """The worker died, hangs or left: its leases are queued again. Returns how many."""
        holder = self._holders.pop(worker, None)
        entries = [self._entries[lease_id] for lease_id in holder.leases] if holder is not None else []
        for entry in entries:
            self._requeue(entry, blame=True)
        return len(entries)

    def owed(self, worker: str) -> int:
        """Completions outstanding of the worker's leases."""
        holder = self._holders.get(worker)
        return sum(len(self._entries[lease_id].outstanding) for lease_id in holder.leases) if holder is not None else 0

    def work(self, role: Source) -> list[Work]:
        """Unfinished leases of a role, most urgent first."""
        entries = [entry for entry in self._entries.values() if entry.lease.source == role]
        return [
            Work(entry.lease, entry.lease.num_completions - len(entry.outstanding), entry.holder)
            for entry in sorted(entries, key=lambda entry: entry.rank)
        ]

    def _requeue(self, entry: _Entry, *, blame: bool) -> None:
        holder = self._holders.get(entry.holder)
        if holder is not None:
            holder.leases.pop(entry.lease.lease_id, None)
        entry.holder = ""
        entry.losses += blame
        self.requeued += blame
        if entry.losses > self.max_losses:
            self.exhausted[entry.lease.lease_id] = entry.lease
        else:
            insort(self._queues[entry.lease.source], entry.rank)

    def _forget(self, entry: _Entry) -> None:
        lease = entry.lease
        del self._entries[lease.lease_id]
        self.exhausted.pop(lease.lease_id, None)
        self._live.difference_update(_keys(lease))
        holder = self._holders.get(entry.holder)
        if holder is not None:
            holder.leases.pop(lease.lease_id, None)
        elif entry.rank in self._queues[lease.source]:  # answered late by a worker that had lost it
            self._queues[lease.source].remove(entry.rank)


def _keys(lease: Lease) -> Iterable[tuple[str, CompletionKey]]:
    for item in lease.items:
        for sample in item.samples:
            yield (
                lease.purpose,
                CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample),
            )
