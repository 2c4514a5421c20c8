"""Processes whose role has nothing left to do go on in the other one (rollout.roles = "handover").

    worker (explorer)                        trainer
                                    ←   Rejoin(role=learner)   repeated until the worker has left
      Leave, Join(role=learner)     →       under a fresh name; then as any learner worker

Only processes that the trainer started: those started by hand may run where the learner's weights cannot be read.
"""

from collections.abc import Collection

from core.schema import Source
from rollout.messages import Rejoin
from rollout.peers import Peer, Peers, State


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
