"""Where every completion went. Promise 1 of the README: nothing is lost or trained twice without a count.

    produced = inserted + rejected (by reason) + in flight
    inserted = trained  + dropped  (by reason) + resident

The pool counts what workers produced, what it refused and what is on its way; the buffer knows what is resident; the
rest is counted here. Three counters that are kept apart, so the equations can fail.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from core.schema import Source

# Reasons of drops that `rescue` plans: explorer rows that no group needed, learner rows that such a row replaced.
SPARE, RESCUED = "spare", "rescued"


class Account:
    """Counts of one source's training completions. `past` is what earlier starts of the run produced and rejected;
    `reused`, part of what is produced, was read from a store of recorded completions."""

    def __init__(self) -> None:
        self.inserted = 0
        self.trained = 0
        self.replaced = 0  # further samples asked for in place of dropped ones; in neither equation
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.past_produced = 0
        self.reused = 0

    def report(self, pool: Mapping[str, Any], resident: int) -> dict[str, Any]:
        """The account, closed with the pool's counts of this start and the buffer's residents."""
        rejected = self.rejected + Counter(pool["rejected"]) + Counter(lost_with_worker=pool["lost"])
        produced = self.past_produced + self.reused + pool["produced"] - pool["accepted"].get("eval", 0)
        return {
            "produced": produced,
            "reused": self.reused,
            "inserted": self.inserted,
            "rejected": dict(sorted((+rejected).items())),
            "in_flight": pool["in_flight"],
            "trained": self.trained,
            "dropped": dict(sorted(self.dropped.items())),
            "resident": resident,
            "replaced": self.replaced,
            "conserved": produced == self.inserted + rejected.total() + pool["in_flight"]
            and self.inserted == self.trained + self.dropped.total() + resident,
        }


class Ledger:
    """Accounts of both sources; safe from any thread.

    Example: ledger.insert(Source.EXPLORER); ledger.report(pool.counters()["sources"], buffer.resident())["conserved"]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts = {source: Account() for source in Source}

    def insert(self, source: Source) -> None:
        """One entered the replay buffer."""
        with self._lock:
            self._accounts[source].inserted += 1

    def reject(self, source: Source, reason: str) -> None:
        """One was let in by the pool and turned away by the buffer."""
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

    def reuse(self, source: Source) -> None:
        """One was read from a store of recorded completions."""
        with self._lock:
            self._accounts[source].reused += 1

    def past(self, source: Source) -> tuple[int, int]:
        """What earlier starts read from a store of recorded completions, and what they generated."""
        with self._lock:
            return self._accounts[source].reused, self._accounts[source].past_produced

    def totals(self) -> dict[str, int]:
        """The run's fault counters, both sources together; `fault/dropped/REASON` are parts of `fault/dropped`, and so
        for rejected. Planned drops are no faults."""
        with self._lock:
            accounts = self._accounts.values()
            dropped: Counter[str] = sum((account.dropped for account in accounts), Counter())
            rejected: Counter[str] = sum((account.rejected for account in accounts), Counter())
            replaced = sum(account.replaced for account in accounts)
        for planned in (SPARE, RESCUED):
            dropped.pop(planned, None)
        return {
            "fault/dropped": dropped.total(),
            "fault/rejected": rejected.total(),
            "fault/replaced": replaced,
            **{f"fault/dropped/{reason}": count for reason, count in sorted(dropped.items())},
            **{f"fault/rejected/{reason}": count for reason, count in sorted(rejected.items())},
        }

    def report(self, pool: Mapping[str, Mapping[str, Any]], resident: Mapping[Source, int]) -> dict[str, Any]:
        """Both accounts; `conserved` where both equations of both hold."""
        with self._lock:
            report: dict[str, Any] = {
                source.value: account.report(pool[source], resident[source])
                for source, account in self._accounts.items()
            }
        return {**report, "conserved": all(account["conserved"] for account in report.values())}

    def restore(self, report: Mapping[str, Any]) -> None:
        """Continue the accounts of a checkpoint. What was in flight then is gone: it is counted, and made again."""
        with self._lock:
            for source, account in self._accounts.items():
                saved = report[source]
                account.reused, account.inserted = saved["reused"], saved["inserted"]
                account.past_produced = saved["produced"] - saved["reused"]
                account.trained, account.replaced = saved["trained"], saved["replaced"]
                account.dropped = Counter(saved["dropped"])
                account.rejected = Counter(saved["rejected"])
                if saved["in_flight"]:
                    account.rejected["in_flight_at_restart"] += saved["in_flight"]
