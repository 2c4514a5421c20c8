"""A worker's completions from birth to acknowledgement. Pure; its owner locks."""

from collections import Counter, deque
from dataclasses import dataclass

from core.schema import Completion
from rollout.messages import Deliver

_UNSENT = -1


@dataclass
class _Entry:
    deliver: Deliver
    beat: int = _UNSENT  # the worker's beat when it was last sent


class Outbox:
    """Deliveries not yet acknowledged. A new one fits while its seq is less than the oldest one's + `window`."""

    def __init__(self, window: int) -> None:
        self.window, self.produced = window, 0
        self._heard = 0
        self._entries: dict[int, _Entry] = {}  # by seq, ascending
        self._unsent: deque[int] = deque()
        self._by_lease: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether the next delivery must wait."""
        oldest = next(iter(self._entries), None)
        return oldest is not None and self.produced + 1 >= oldest + self.window

    @property
    def has_unsent(self) -> bool:
        """Whether `unsent` has something to give."""
        return bool(self._unsent)

    @property
    def leases(self) -> list[str]:
        """Leases with unacknowledged deliveries."""
        return list(self._by_lease)

    def put(self, lease_id: str, purpose: str, completion: Completion) -> None:
        """Keep a new completion."""
        self.produced += 1
        deliver = Deliver(seq=self.produced, lease_id=lease_id, purpose=purpose, completion=completion)  # type: ignore[arg-type]
        self._entries[self.produced] = _Entry(deliver)
        self._unsent.append(self.produced)
        self._by_lease[lease_id] += 1

    def unsent(self, max_bytes: int, max_count: int) -> list[Deliver]:
        """The next deliveries for one frame, oldest first; at least one where any is unsent."""
        batch: list[Deliver] = []
        size = 0
        for seq in self._unsent:
            deliver = self._entries[seq].deliver
            size += deliver.completion.num_bytes
            if batch and (size > max_bytes or len(batch) == max_count):
                break
            batch.append(deliver)
        return batch

    def sent(self, batch: list[Deliver], beat: int) -> None:
        """`batch`, as `unsent` gave it, was handed to the socket after the worker's beat number `beat`."""
        for deliver in batch:
            seq = self._unsent.popleft()
            assert seq == deliver.seq, (seq, deliver.seq)
            self._entries[deliver.seq].beat = beat

    def acknowledge(self, seqs: tuple[int, ...], beat: int) -> None:
        """The trainer has `seqs` and heard `beat`: what was sent before that beat and is still here got lost."""
        for seq in seqs:
            entry = self._entries.get(seq)
            if entry is not None and entry.beat != _UNSENT:
                del self._entries[seq]
                self._release(entry.deliver.lease_id)
        if beat <= self._heard:
            return
        self._heard = beat
        for seq, entry in self._entries.items():
            if entry.beat != _UNSENT and entry.beat < beat:
                entry.beat = _UNSENT
                self._unsent.append(seq)

    def _release(self, lease_id: str) -> None:
        self._by_lease[lease_id] -= 1
        if not self._by_lease[lease_id]:
            del self._by_lease[lease_id]
