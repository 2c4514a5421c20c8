"""Rows beside each other in processes of their own: most of them wait, for processes to start or for deadlines."""

import contextlib
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from bench.faults.rows import Row
from bench.faults.runs import REPOSITORY

Line = dict[str, Any]

# Rows of minutes, longest first: started last, one of them would run on alone.
LONG = ("F5", "F21", "F36", "F31", "F5b", "F7", "F5c")


def run_beside(rows: Sequence[Row], seed: int, report: Callable[[Line], None]) -> list[Line]:
    """All lines, in the order of the rows. Two processes take whole runs first, the third one quick rows."""
    order = sorted(rows, key=lambda row: (row.quick, LONG.index(row.name) if row.name in LONG else len(LONG)))
    waiting, found = deque(order), dict[str, Line]()

    def lane(take: Callable[[], Row]) -> None:
        process = _start(seed)
        while (row := _next(take)) is not None:
            found[row.name] = line = _ask(process, row)
            report(line)
            if process.poll() is not None:
                _end(process)
                process = _start(seed)
        _end(process)

    lanes = [threading.Thread(target=lane, args=(take,)) for take in (waiting.popleft, waiting.popleft, waiting.pop)]
    for thread in lanes:
        thread.start()
    try:
        for thread in lanes:
            thread.join()
    except KeyboardInterrupt:
        waiting.clear()  # the processes were interrupted too
        raise
    return [found[row.name] for row in rows]


def serve(rows: Sequence[Row], run: Callable[[Row], Line], asked: TextIO, answers: TextIO) -> None:
    """Such a process: names of rows come in, their lines go out."""
    known = {row.name: row for row in rows}
    for name in asked:
        with contextlib.redirect_stdout(sys.stderr):
            line = run(known[name.strip()])
        print(json.dumps(line), file=answers, flush=True)


def _next(take: Callable[[], Row]) -> Row | None:
    try:
        return take()
    except IndexError:  # another lane took the last one
        return None


def _start(seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.faults", "--serve", "--seed", str(seed)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended
        process.stdin.close()
    process.stdout.close()
    process.wait()


def _ask(process: subprocess.Popen[str], row: Row) -> Line:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; there is no answer either
        print(row.name, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if answer:
        line: Line = json.loads(answer)
        return line
    what = f"the process that ran it ended with {process.wait()}"
    verdict = {"holds": False, "verdict": "FAILED", "what happened": what, "took_s": 0.0}
    return {"row": row.name, "fault": row.fault, **verdict}
