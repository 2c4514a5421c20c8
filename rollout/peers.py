"""What the trainer knows of one worker, and the count of its completions. Pure: time comes in as arguments."""

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum

from core.schema import Source
from rollout.messages import Heartbeat, Join, Load


class State(StrEnum):
    """Of a worker, as the trainer sees it."""

    LOADING = "loading"  # joined; no leases yet
    READY = "ready"
    HUNG = "hung"  # beats, but makes no progress on what it holds
    DEAD = "dead"  # silent
    GONE = "gone"  # left, or its process ended: it cannot come back
    REFUSED = "refused"


ABLE_TO_WORK = (State.LOADING, State.READY)
_LOADS_KEPT = 64
_ENDED = (State.DEAD, State.GONE, State.REFUSED)


class SeqWindow:
    """Which sequence numbers were seen, in bounded memory: all up to `low`, and some of the next `size`."""

    def __init__(self, size: int) -> None:
        self.size, self.low, self.total = size, 0, 0
        self._above: set[int] = set()

    def admits(self, seq: int) -> bool:
        """False for a number that a worker which keeps to its window cannot have reached."""
        return seq <= self.low + self.size

    def add(self, seq: int) -> bool:
        """Note a number; False where it was seen before."""
        if seq <= self.low or seq in self._above:
            return False
        self._above.add(seq)
        self.total += 1
        while self.low + 1 in self._above:
            self.low += 1
            self._above.remove(self.low)
        return True


@dataclass
class Peer:
    """One worker of one session. All times are seconds of the pool's monotonic clock."""

    join: Join
    identity: bytes
    window: SeqWindow
    joined_s: float
    seen_s: float
    progress_s: float
    state: State = State.LOADING
    why: str = ""  # of GONE and REFUSED
    progress: int = -1
    doing: str = "joining"
    beat: int = 0
    greeted: bool = False  # its Hello was accepted
    produced: int = 0  # the most it is known to have produced
    resent: int = 0
    accepted: Counter[str] = field(default_factory=Counter)  # by purpose
    rejected: Counter[str] = field(default_factory=Counter)
    leaving: bool = False  # it gets no more leases: its process is about to change its role
    next_role: Source | None = None  # handed over: the role in which its process joins again
    weights_beat: int = 0  # its beat when weights were last sent to it
    loaded: int = 0  # weights version of its engine, by its last heartbeat
    loads: deque[Load] = field(default_factory=lambda: deque(maxlen=_LOADS_KEPT))  # since they were asked for
    loads_until_s: float = -math.inf

    @property
    def name(self) -> str:
        return self.join.worker

    @property
    def role(self) -> Source:
        return self.join.role

    @property
    def missing(self) -> int:
        """Completions produced and not received: in flight while it lives, lost with it otherwise."""
        return self.produced - self.window.total

    def hear(self, beat: Heartbeat, now: float) -> str:
        """Take in a heartbeat; returns what is impossible about it, or "".

        Promise 1, per worker: what it produced and no longer keeps was acknowledged, so it must have been received.
        """
        if not self.window.admits(beat.produced):
            return f"says it produced {beat.produced} completions, {self.window.low} of which are known"
        if beat.produced - beat.unacknowledged > self.window.total:
            return (
                f"counts {beat.produced - beat.unacknowledged} acknowledged completions, "
                f"but only {self.window.total} were received"
            )
        if not all(0 <= load.started_s <= load.finished_s < math.inf for load in beat.loads):
            return f"says it loaded weights in impossible times: {beat.loads}"
        self.beat = max(self.beat, beat.beat)
        self.produced = max(self.produced, beat.produced)
        self.doing, self.loaded = beat.doing, beat.loaded
        for load in beat.loads:  # oldest first
            if load.finished_s > self.loads_until_s:
                self.loads.append(load)
                self.loads_until_s = load.finished_s
        if beat.progress != self.progress:
            self.progress, self.progress_s = beat.progress, now
        return ""

    def line(self, now: float) -> str:
        """One phrase: what it does, or since when it does nothing."""
        if self.state in (State.GONE, State.REFUSED):
            return f"{self.name} ({self.state}: {self.why})"
        if self.state == State.DEAD:
            return f"{self.name} (silent for {now - self.seen_s:.0f} s)"
        return f"{self.name} ({self.doing}, progress {now - self.progress_s:.0f} s ago)"


class Peers(dict[bytes, Peer]):
    """Workers by connection, at most `limit`: those that ended longest ago are forgotten, but for their counts."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._forgotten = {source: Account() for source in Source}

    def enter(self, peer: Peer) -> None:
        """Add a worker."""
        while len(self) >= self.limit and (oldest := self._ended_first()):
            self._forgotten[oldest.role].enter(oldest)
            del self[oldest.identity]
        self[peer.identity] = peer

    def _ended_first(self) -> Peer | None:
        ended = (known for known in self.values() if known.state in _ENDED)
        return min(ended, key=lambda known: known.seen_s, default=None)

    def accounts(self) -> dict[Source, "Account"]:
        """Promise 1, by source."""
        accounts = {source: Account(forgotten) for source, forgotten in self._forgotten.items()}
        for peer in self.values():
            accounts[peer.role].enter(peer)
        return accounts


class Account(Counter[str]):
    """Sums over workers: produced, received, accepted/PURPOSE, rejected/REASON, resent, in_flight, lost."""

    def enter(self, peer: Peer) -> None:
        """Add a worker. What it produced and nobody received is in flight while it may still arrive."""
        self["produced"] += peer.produced
        self["received"] += peer.window.total
        self["resent"] += peer.resent
        self["in_flight" if peer.state in (State.LOADING, State.READY, State.HUNG) else "lost"] += peer.missing
        for purpose, count in peer.accepted.items():
            self[f"accepted/{purpose}"] += count
        for reason, count in peer.rejected.items():
            self[f"rejected/{reason}"] += count

    def group(self, name: str) -> dict[str, int]:
        """The entries NAME/…, by what follows."""
        return {key.removeprefix(f"{name}/"): count for key, count in self.items() if key.startswith(f"{name}/")}

    @property
    def balanced(self) -> bool:
        """Promise 1: produced = accepted + rejected + in flight + lost; the four are counted apart from each other."""
        settled = sum(self.group("accepted").values()) + sum(self.group("rejected").values())
        return self["produced"] == settled + self["in_flight"] + self["lost"]
