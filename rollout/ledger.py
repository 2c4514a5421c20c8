"""Where every completion went. Promise 1 of the README: nothing is lost or trained twice without a count.

produced = inserted + rejected (by reason) + in flight
inserted = trained  + dropped  (by reason) + resident
"""

import threading
from collections import Counter
from typing import Any

from core.schema import Source


class Account:
    """Counts of one source's training completions."""

    def __init__(self) -> None:
        self.produced = 0  # by workers, as their heartbeats and deliveries report
        self.inserted = 0
        self.trained = 0
        self.replaced = 0  # further samples asked for in place of dropped ones; not part of either equation
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def report(self) -> dict[str, Any]:
        """The account with what follows from its two equations."""
        return {
            "produced": self.produced,
            "inserted": self.inserted,
            "rejected": dict(sorted(self.rejected.items())),
            "in_flight": self.produced - self.inserted - self.rejected.total(),
            "trained": self.trained,
            "dropped": dict(sorted(self.dropped.items())),
            "resident": self.inserted - self.trained - self.dropped.total(),
            "replaced": self.replaced,
        }


class Ledger:
    """Accounts of both sources; safe from any thread.

    Example: ledger.inserted(Source.EXPLORER); ledger.report(resident={...}, in_flight={...})["conserved"]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts = {source: Account() for source in Source}

    def produce(self, source: Source, count: int = 1) -> None:
        """Workers finished `count` more completions."""
        with self._lock:
            self._accounts[source].produced += count

    def insert(self, source: Source) -> None:
        """One entered the replay buffer."""
        with self._lock:
            self._accounts[source].inserted += 1

    def reject(self, source: Source, reason: str) -> None:
        """One never entered the buffer."""
        with self._lock:
            self._accounts[source].rejected[reason] += 1

    def drop(self, source: Source, reason: str, count: int = 1) -> None:
        """`count` left the buffer untrained."""
        with self._lock:
            self._accounts[source].dropped[reason] += count

    def train(self, source: Source, count: int) -> None:
        """`count` were part of an optimizer step."""
        with self._lock:
            self._accounts[source].trained += count

    def replace(self, source: Source) -> None:
        """A further sample was asked for in place of a dropped one."""
        with self._lock:
            self._accounts[source].replaced += 1

    def totals(self) -> dict[str, int]:
        """The run's fault counters, both sources together."""
        with self._lock:
            accounts = self._accounts.values()
            return {
                "fault/dropped": sum(account.dropped.total() for account in accounts),
                "fault/rejected": sum(account.rejected.total() for account in accounts),
                "fault/replaced": sum(account.replaced for account in accounts),
            }

    def report(self, *, resident: dict[Source, int], in_flight: dict[Source, int]) -> dict[str, Any]:
        """Both accounts, and whether what the equations imply is what buffer and workers really hold."""
        with self._lock:
            report: dict[str, Any] = {source.value: account.report() for source, account in self._accounts.items()}
        report["conserved"] = all(
            report[source.value]["resident"] == resident[source]
            and report[source.value]["in_flight"] == in_flight[source]
            for source in Source
        )
        return report

    def restore(self, report: dict[str, Any]) -> None:
        """Continue the accounts of a checkpoint. What was in flight then is gone: it is counted and made again."""
        with self._lock:
            for source, account in self._accounts.items():
                saved = report[source.value]
                account.produced, account.inserted = saved["produced"], saved["inserted"]
                account.trained, account.replaced = saved["trained"], saved["replaced"]
                account.rejected, account.dropped = Counter(saved["rejected"]), Counter(saved["dropped"])
                if saved["in_flight"]:
                    account.rejected["in_flight_at_restart"] += saved["in_flight"]
