"""Standard output and error that may go away: a pipe whose reader ended, a full disk, a descriptor that was closed.

What a run says is worth less than the run. Called by programs, before anything else, not by modules: it replaces
`sys.stdout` and `sys.stderr`, so that whatever prints (rich, libraries, the interpreter as it shuts down) is safe.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

LOST = "s2l-po: standard output is gone ({why}); this goes on, and writes its files as before\n"


class _Tolerant(io.FileIO):
    """A descriptor to write to. What it does not take is dropped; the first time, `notice` goes to standard error."""

    def __init__(self, descriptor: int, notice: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._notice = notice

    def write(self, data: Any) -> int:
        """Bytes taken or dropped."""
        try:
            while (written := super().write(data)) is None:  # somebody made the pipe non-blocking, and it is full
                select.select([], [self], [])
            return written
        except OSError as error:  # each time anew: a full disk may have room again
            notice, self._notice = self._notice.format(why=error.strerror), ""
            with contextlib.suppress(OSError):
                os.write(2, notice.encode())
            return memoryview(data).nbytes


def keep_going() -> None:
    """From here on no error of writing to standard output or error raises, nor changes the exit code."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # it was closed: a file that the run opens must not take its number
            os.open(os.devnull, os.O_RDWR)
    quiet = os.environ.get("RANK", "0") != "0"
    sys.stdout = _wrapped(sys.stdout, 1, "" if quiet else LOST)
    sys.stderr = _wrapped(sys.stderr, 2, "")


def _wrapped(stream: TextIO | None, descriptor: int, notice: str) -> TextIO:
    """As the interpreter makes it: unbuffered under `python -u`."""
    raw = _Tolerant(descriptor, notice)
    if not isinstance(stream, io.TextIOWrapper):  # None where the descriptor was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace")
    unbuffered = stream.write_through
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )
