"""Who may connect, by CURVE key; and what either end says where a handshake fails."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class Keys(NamedTuple):
    """CURVE keys in Z85. A trainer has its own pair and the allowed public keys; a worker its own and the trainer's."""

    public: bytes
    secret: bytes
    trainer: bytes  # the trainer's public key
    allowed: frozenset[bytes] = frozenset()


class AllowList:
    """ZAP's question about a CURVE key, asked on the authenticator's thread."""

    def __init__(self, allowed: frozenset[bytes], counts: Counter[str]) -> None:
        self._allowed, self._counts = allowed, counts

    def callback(self, domain: str, key: bytes) -> bool:
        known = key in self._allowed
        self._counts["key_refused"] += not known
        return known


def refused_line(count: int, *, has_keys: bool) -> str:
    """For the trainer's console: so many connections were ended in their handshake.

    Example: refused_line(1, has_keys=True) == "1 connection was refused in its handshake: a worker without keys, …"
    """
    what = "1 connection was refused in its handshake" if count == 1 else f"{count:,} connections were refused so far"
    if has_keys:
        return f"{what}: a worker without keys, or with a key that was not in stream.keys when this start began"
    return f"{what}: a worker with keys (this run has none, stream.keys), or something that is no worker"


def why_refused(endpoint: str, *, unlisted: bool, has_keys: bool) -> str:
    """For a worker whose handshake the trainer refused for good: its key is `unlisted`, or only one end has keys.

    Example: why_refused("tcp://10.0.0.5:5555", unlisted=False, has_keys=False)
    """
    if unlisted:
        return (
            f"the trainer at {endpoint} does not list this worker's key: put its .pub file into the trainer's "
            "stream.keys directory, which is read when the trainer starts"
        )
    if has_keys:
        return f"the trainer at {endpoint} has no keys: leave out --keys, or start the run with stream.keys"
    return f"the trainer at {endpoint} lets nobody in without keys, and this worker gave none: --keys DIR"


def why_silent(endpoint: str, counts: Mapping[str, int], *, has_keys: bool) -> str:
    """For a worker that was never answered, by its socket's counts: what else than an absent trainer it may be.

    Example: "no answer for 20 s" + why_silent("tcp://10.0.0.5:5555", {"handshake_failed": 3}, has_keys=True)
    """
    failures = counts.get("handshake_failed", 0)
    if not failures:
        return f" at {endpoint}: no trainer listens there, or it cannot be reached"
    gave = "this worker's trainer.pub is of another trainer" if has_keys else "the trainer has, this worker gave none"
    return f" at {endpoint}: {failures:,} handshakes failed there, likely over keys: {gave} (--keys DIR)"
