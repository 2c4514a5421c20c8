"""How a worker's session with the trainer ends."""

from typing import Literal

from core.schema import Source


class Ended(Exception):
    """The session is over: the main thread leaves whatever it does."""

    def __init__(
        self, kind: Literal["stop", "refused", "rejoin", "silent", "failed"], reason: str, role: Source | None = None
    ) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason, self.role = kind, reason, role  # role: the one to join with next
