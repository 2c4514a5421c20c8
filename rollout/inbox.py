"""What a worker was told to do: leases in the order granted, and weights. Pure; its owner locks."""

from collections import deque
from typing import NamedTuple

from rollout.messages import LOADS_TOLD, Lease, Load, Weights

_WEIGHTS_KEPT = 2  # the trainer keeps no more files


class Task(NamedTuple):
    """A lease, and the weights to load before it (None: those that are loaded)."""

    lease: Lease
    weights: Weights | None


class Inbox:
    """Leases that wait, the one in work, and the newest weights. `loaded`: the version that the engine has; `loads`:
    how it came to it, lately."""

    def __init__(self) -> None:
        self.loaded = 0
        self.loads: deque[Load] = deque(maxlen=LOADS_TOLD)
        self.current: Lease | None = None
        self._waiting: deque[Lease] = deque()
        self._weights: dict[int, Weights] = {}

    @property
    def version(self) -> int:
        """Newest version it was told of."""
        return max([self.loaded, *self._weights])

    @property
    def leases(self) -> list[str]:
        """Those that wait and the one in work."""
        return [lease.lease_id for lease in (*self._waiting, self.current) if lease is not None]

    @property
    def lacks(self) -> int | None:
        """The version that the next lease waits for; None where there is no lease or nothing is lacking."""
        return self._waiting[0].version if self._waiting and self._waiting[0].version > self.version else None

    @property
    def ready(self) -> bool:
        """Whether `take` has something to give."""
        return bool(self._waiting) and self.lacks is None

    def grant(self, lease: Lease) -> None:
        """Queue a lease, unless it is here already."""
        if lease.lease_id not in self.leases:
            self._waiting.append(lease)

    def learn(self, weights: Weights) -> None:
        """Weights were published."""
        self._weights[weights.version] = weights
        for version in sorted(self._weights)[:-_WEIGHTS_KEPT]:
            del self._weights[version]

    def took(self, load: Load) -> None:
        """Weights are in the engine."""
        self.loaded = load.version
        self.loads.append(load)

    def take(self) -> Task:
        """The next lease is now in work. Evaluations want exactly their version, if known; training the newest."""
        lease = self._waiting.popleft()
        self.current = lease
        version = self.version
        if lease.purpose == "eval" and (lease.version == self.loaded or lease.version in self._weights):
            version = lease.version
        return Task(lease, None if version == self.loaded else self._weights[version])
