"""Leases that take much longer than others are given to a second worker: the first answer wins, the other is counted.

A lease's completions do not depend on who generates it, so a second worker changes who answers and not what. A worker
that makes no progress at all is a case for rollout.roster (`lease_timeout_s`); here it only is slow, or far behind.
"""

import statistics
from collections import deque
from collections.abc import Iterator

from rollout.leases import LeaseBook
from rollout.messages import Lease
from rollout.peers import Peer, Peers, State

# A lease is late after this many times the median of the last ones, from grant to last completion.
_PATIENCE = 3.0
_LEAST_S = 1.0
_KNOWN = 3  # leases that must have finished before any can be late
_REMEMBERED = 64


class Stragglers:
    """Which leases are late, and who has time for them. Pure: times come in. `seconded` counts leases given twice."""

    def __init__(self, book: LeaseBook) -> None:
        self.book = book
        self.seconded = 0
        self._granted_s: dict[str, tuple[Lease, float]] = {}
        self._helpers: dict[str, str] = {}  # worker → the lease it got as the second one
        self._took_s: deque[float] = deque(maxlen=_REMEMBERED)

    def granted(self, lease: Lease, now: float) -> None:
        """A lease was granted, or granted again after a loss."""
        self._granted_s[lease.lease_id] = (lease, now)

    def second(self, peers: Peers, now: float) -> Iterator[tuple[Peer, Lease]]:
        """Late leases, most urgent first, with workers that have nothing else to do; each lease once."""
        for lease_id, (_, since_s) in list(self._granted_s.items()):
            if lease_id not in self.book:
                self._took_s.append(now - since_s)
                del self._granted_s[lease_id]
        self._helpers = {worker: lease_id for worker, lease_id in self._helpers.items() if lease_id in self.book}
        if len(self._took_s) < _KNOWN:
            return
        limit_s = max(_LEAST_S, _PATIENCE * statistics.median(self._took_s))
        late = [lease for lease, since_s in self._granted_s.values() if now - since_s > limit_s]
        for lease in sorted(late, key=lambda lease: (lease.purpose != "eval", lease.step)):
            if lease.lease_id in self._helpers.values():
                continue
            for peer in peers.values():
                free = peer.state == State.READY and peer.name not in self._helpers
                if free and self.book.may_second(peer.name, lease.lease_id):
                    self._helpers[peer.name] = lease.lease_id
                    self.seconded += 1
                    yield peer, lease
                    break
