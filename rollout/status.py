"""What the trainer can say about its workers: whom it waits for, whether waiting is in vain, and all counts."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.schema import Source
from rollout.children import Children, Exit
from rollout.leases import Work
from rollout.messages import Load
from rollout.peers import ABLE_TO_WORK, Peer, State
from rollout.roster import Roster

_NAMED = 4  # workers named in one line


class Waiting(NamedTuple):
    """One line, and when what is waited for last moved: time.monotonic() seconds, −inf where it never did."""

    line: str
    moved_s: float = -math.inf


def waiting(roster: Roster, children: Children) -> Waiting:
    """For each role with unfinished work: its most urgent step, who has it, and since when."""
    now = time.monotonic()
    parts = [part for role in roster.terms if (part := _role_line(roster, children, role, now))]
    owing = (peer for peer in roster.peers.values() if peer.state in ABLE_TO_WORK and roster.book.owed(peer.name))
    line = "; ".join(parts) if parts else "nothing: every lease is answered"
    return Waiting(line, max((peer.progress_s for peer in owing), default=-math.inf))


def hopeless(roster: Roster, children: Children, exits: Mapping[str, Exit]) -> str:
    """Why work that is left cannot be done, or ""."""
    for lease in roster.book.exhausted.values():
        return (
            f"lease {lease.lease_id} (step {lease.step}) was lost {roster.book.max_losses + 1} times, "
            f"so it is not granted again. Last problems: {_problems(roster)}"
        )
    for end in exits.values():
        if end.fatal and not end.was_ready and end.code > 0:
            return f"{end.line()} before it could work. {_log(children, end)}"
    for role in roster.terms:
        dead = [end for end in exits.values() if end.role == role]
        alive = any(peer.role == role and peer.state in (*ABLE_TO_WORK, State.HUNG) for peer in roster.peers.values())
        if dead and not alive and not children.may_return(role) and roster.book.work(role):
            how = "; ".join(end.line() for end in dead)
            return f"no {role} worker is left or may be started again: {how}. {_log(children, dead[-1])}"
    return ""


def counters(roster: Roster, children: Children, sockets: Mapping[str, int]) -> dict[str, Any]:
    """Counts of completions by source and worker, of workers' fates, and of frames. `balanced` is promise 1."""
    accounts = roster.peers.accounts()
    return {
        "sources": {
            source.value: {
                "produced": account["produced"],
                "received": account["received"],
                "accepted": account.group("accepted"),
                "rejected": account.group("rejected"),
                "in_flight": account["in_flight"],
                "lost": account["lost"],
                "resent": account["resent"],
            }
            for source, account in accounts.items()
        },
        "balanced": all(account.balanced for account in accounts.values()),
        "duplicates": sum(account["rejected/duplicate"] for account in accounts.values()),
        "workers": {
            peer.name: {
                "role": peer.role.value,
                "pid": peer.join.pid,
                "state": peer.state.value,
                "why": peer.why,
                "doing": peer.doing,
                "weights": peer.loaded,
                "produced": peer.produced,
                "received": peer.window.total,
                "accepted": dict(peer.accepted),
                "rejected": dict(peer.rejected),
                "owed": roster.book.owed(peer.name),
            }
            for peer in roster.peers.values()
        },
        "events": {**roster.events, "restarted": children.restarted, "requeued": roster.book.requeued},
        "bad_frames": dict(roster.bad_frames),
        "sockets": dict(sockets),
        "problems": dict(roster.problems),
    }


class Held(NamedTuple):
    """Weights in the workers' engines, by their last heartbeats. `versions`: of each ready learner worker, by its name
    without the session. `loads`: workers and what they loaded since this was asked last."""

    versions: dict[str, int]
    loads: list[tuple[str, Load]]


def held_weights(roster: Roster) -> Held:
    """What the engines have; loads are told once."""
    held = Held({}, [])
    for peer in roster.peers.values():
        if peer.role == Source.LEARNER and peer.state == State.READY:
            held.versions[peer.name.rpartition(".")[0]] = peer.loaded
        held.loads.extend((peer.name, load) for load in peer.loads)
        peer.loads.clear()
    return held


def _role_line(roster: Roster, children: Children, role: Source, now: float) -> str:
    work = roster.book.work(role)
    if not work:
        return ""
    first = work[0].lease
    same = [item for item in work if (item.lease.purpose, item.lease.step) == (first.purpose, first.step)]
    missing = sum(item.lease.num_completions - item.received for item in same)
    what = f"{missing} {role} completions of {'evaluation' if first.purpose == 'eval' else 'step'} {first.step}"
    return f"{what} from {_holders(roster, children, role, same, now)}"


def _holders(roster: Roster, children: Children, role: Source, work: list[Work], now: float) -> str:
    names = {item.holder for item in work if item.holder}
    lines = [peer.line(now) for peer in roster.peers.values() if peer.name in names]
    queued = sum(not item.holder for item in work)
    if queued:
        lines.append(f"{queued} leases queued ({_why_queued(roster, children, role, work, now)})")
    more = len(lines) - _NAMED
    return ", ".join(lines[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _why_queued(roster: Roster, children: Children, role: Source, work: list[Work], now: float) -> str:
    peers = [peer for peer in roster.peers.values() if peer.role == role]
    if not any(peer.state == State.READY for peer in peers):
        latest = {peer.name.rpartition(".")[0]: peer for peer in peers}  # not the sessions it replaced
        known = ", ".join(peer.line(now) for peer in list(latest.values())[-_NAMED:]) or "none has joined yet"
        return f"no {role} worker is ready; known: {known}{_how_to_start(peers, children, role)}"
    published = roster.weights.version if roster.weights is not None else 0
    wanted = min(item.lease.version for item in work if not item.holder)
    return (
        f"weights {wanted} are not published yet" if wanted > published else "every worker is busy, or the buffer full"
    )


def _how_to_start(peers: list[Peer], children: Children, role: Source) -> str:
    """Explorers that nobody starts by hand never come where the trainer has none of its own."""
    if role != Source.EXPLORER or children.may_return(role) or any(peer.state in ABLE_TO_WORK for peer in peers):
        return ""
    return "; start one: " + " ".join(
        ("python -m rollout.explorer --connect", str(children.logs.parent), *children.arguments)
    )


def _problems(roster: Roster) -> str:
    return "; ".join(f"{kind}: {text}" for kind, text in roster.problems.items()) or "none was reported"


def _log(children: Children, end: Exit) -> str:
    return f"{children.logs / (end.name + '.log')} ends with:\n{children.tail(end.name)}"
