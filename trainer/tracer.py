"""trace.json: what every process did when, as Chrome trace events that Perfetto (ui.perfetto.dev) opens."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "trace.json"
PENDING_EVENTS = 256
TAIL = b"\n]\n"


class Moment(NamedTuple):
    """A point on a track.

    Example: Moment(process="explorer-0", thread="generate", seconds=12.5)
    """

    process: str
    thread: str
    seconds: float


class Tracer:
    """Collects spans from any thread and writes them as one JSON array.

    Times are CLOCK_MONOTONIC seconds, which the processes of one host share; other hosts' spans keep their own clock.
    The array is complete after every flush: new events go over the closing bracket in one write. At most 256 events
    wait in memory. A resumed run goes on in the same file, behind what stands there even if the host restarted.
    Spans of one track must nest or follow each other. `Tracer(None)` records nothing (ranks other than 0).

    Example: with tracer.span("train", step=3): ...
    """

    def __init__(self, run_dir: Path | None, *, process: str = "trainer", resume: bool = False) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._pending: list[dict[str, Any]] = []
        self._tracks: dict[tuple[str, str], tuple[int, int]] = {}
        self._arrows = 0
        self._shift_s = 0.0
        self._file = -1
        self._end = 0
        if run_dir is not None:
            path = run_dir / FILE_NAME
            events, self._end = _scan(path.read_bytes()) if resume and path.exists() else ([], 1)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(self._file, b"[", 0)
            os.ftruncate(self._file, self._end)
            self._adopt(events)
            self.flush()

    @contextlib.contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record how long the block took, on this process's track of the calling thread."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(self._process, threading.current_thread().name, name, start, time.monotonic(), args)

    def add(self, process: str, thread: str, name: str, start_s: float, end_s: float, args: Any = None) -> None:
        """Record a span that is over, of any process."""
        duration = max(end_s - start_s, 0.0)
        self._event(
            process, thread, start_s, {"ph": "X", "name": name, "dur": round(1e6 * duration, 1), "args": args or {}}
        )

    def arrow(self, name: str, start: Moment, end: Moment) -> None:
        """Draw an arrow between two spans, such as from a completion's birth to the step that trains it.

        Each end must lie within a span of its track.
        """
        with self._lock:
            self._arrows += 1
            number = self._arrows
        for phase, moment in (("s", start), ("f", end)):
            event = {"ph": phase, "name": name, "cat": "flow", "id": number} | ({"bp": "e"} if phase == "f" else {})
            self._event(moment.process, moment.thread, moment.seconds, event)

    def counter(self, name: str, seconds: float, **values: float) -> None:
        """Record values that Perfetto draws as a filled curve, such as the buffer's residents."""
        self._event(self._process, "counters", seconds, {"ph": "C", "name": name, "args": values})

    def flush(self) -> None:
        """Write what waits; the file is then valid JSON and holds every event so far."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Flush, then record nothing more."""
        with self._lock:
            self._flush()
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _event(self, process: str, thread: str, seconds: float, event: dict[str, Any]) -> None:
        with self._lock:
            if self._file < 0:
                return
            pid, tid = self._track(process, thread)
            at = round(1e6 * (seconds + self._shift_s), 1)
            self._pending.append(event | {"pid": pid, "tid": tid, "ts": at})
            if len(self._pending) >= PENDING_EVENTS:
                self._flush()

    def _track(self, process: str, thread: str) -> tuple[int, int]:
        if (process, thread) not in self._tracks:
            pids = {name: pid for (name, _), (pid, _) in self._tracks.items()}
            pid = pids.get(process, len(pids) + 1)
            self._tracks[process, thread] = pid, len(self._tracks) + 1
            name = {"ph": "M", "pid": pid, "tid": len(self._tracks), "args": {"name": process}}
            if process not in pids:
                self._pending.append(name | {"name": "process_name"})
            self._pending.append(name | {"name": "thread_name", "args": {"name": thread}})
        return self._tracks[process, thread]

    def _flush(self) -> None:
        if self._file < 0:
            return
        lines = [json.dumps(event, default=str, separators=(",", ":")) for event in self._pending]
        self._pending.clear()
        body = ",\n".join(lines).encode()
        if body:
            body = (b",\n" if self._end > 1 else b"\n") + body
        os.pwrite(self._file, body + TAIL, self._end)
        self._end += len(body)

    def _adopt(self, events: list[dict[str, Any]]) -> None:
        """Go on after `events`: their tracks keep their numbers, and no new event is earlier than they are."""
        processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        for event in events:
            if event["name"] == "thread_name":
                self._tracks[processes[event["pid"]], event["args"]["name"]] = event["pid"], event["tid"]
        self._arrows = max((event["id"] for event in events if event["ph"] == "s"), default=0)
        last_s = max((event["ts"] + event.get("dur", 0.0) for event in events if "ts" in event), default=0.0) / 1e6
        self._shift_s = max(0.0, last_s - time.monotonic())


def read_trace(run_dir: Path) -> list[dict[str, Any]]:
    """Every event of a run's trace, of a file that a kill cut as well: events stand one on a line."""
    return _scan((run_dir / FILE_NAME).read_bytes())[0]


def _scan(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Events, and the offset just behind the last whole one."""
    events: list[dict[str, Any]] = []
    end, start = 1, data.find(b"\n") + 1
    while 0 < start < len(data):
        stop = data.find(b"\n", start)
        line = data[start : stop if stop >= 0 else len(data)].removesuffix(b",")
        try:
            event = json.loads(line)
        except ValueError:
            break  # the closing bracket, or an event that a kill cut: nothing stands behind either
        events.append(event)
        end, start = start + len(line), stop + 1
    return events, end
