"""Who may connect, by CURVE key."""

from collections import Counter
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
