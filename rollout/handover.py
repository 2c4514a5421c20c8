"""Processes whose role has nothing (left) to do work in the other one (rollout.roles = "handover").

    worker (explorer)                        trainer
                                    ←   Rejoin(role=learner)   repeated until the worker has left
      Leave, Join(role=learner)     →       under a fresh name; then as any learner worker

Only processes that the trainer started: those started by hand may run where the learner's weights cannot be read. When
is decided by demand (rollout/timetable.py, and the mixer's explorer_is_done).
"""

from collections.abc import Collection

from core.schema import Source
from rollout.children import Children
from rollout.messages import Rejoin
from rollout.peers import Peer, Peers, State


class HandOver:
    """Which child processes go from the explorer's role to the learner's: named ones, or in the end everybody."""

    def __init__(self, children: Children) -> None:
        self._children, self._named, self._everybody = children, set[str](), False

    def begin(self, names: Collection[str]) -> None:
        """From now on these, or all where none is named."""
        self._named.update(names)
        self._everybody = self._everybody or not names
        for name in names:
            self._children.settle(name)

    def pids(self) -> list[int]:
        """Processes that change their role when they owe nothing."""
        return [pid for name, pid in self._children.pids().items() if self._everybody or name in self._named]

    def mark(self, peers: Peers) -> None:
        """Named ones get no further lease, or they would never owe nothing while explorers have work."""
        if self._named:
            named = [pid for name, pid in self._children.pids().items() if name in self._named]
            for peer in idle_explorers(peers, named):
                peer.leaving = True


def idle_explorers(peers: Peers, pids: Collection[int]) -> list[Peer]:
    """Explorers of these processes that could be handed over, unless they owe something."""
    return [
        peer
        for peer in peers.values()
        if (peer.role, peer.state) == (Source.EXPLORER, State.READY) and peer.join.pid in pids
    ]


def rejoin(role: Source) -> Rejoin:
    """What a handed-over worker is told."""
    return Rejoin(reason=f"this process goes on as a {role} worker", role=role)
