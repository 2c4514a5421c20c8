"""A program whose output goes nowhere goes on, and its exit code is its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

REPOSITORY = Path(__file__).parents[2]
LINE = "standard output is gone"
PROGRAM = """
import sys
from core.standard_streams import keep_going
keep_going()
import faulthandler
faulthandler.enable()
opened = open(sys.argv[1], "w")
for number in range(5000):
    print("line", number, flush=number % 7 == 0)
print("unfinished", end="")
print("last words", file=sys.stderr)
opened.write(f"{opened.fileno()} {sys.stdout.encoding}")
opened.close()
sys.exit(7)
"""


def run(out: Path, redirect: str = "", *flags: str, **streams: int | IO[bytes]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, *flags, "-c", PROGRAM, str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "latin-1"}
    return subprocess.run(command, env=environment, text=True, timeout=60, check=False, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_pipe_whose_reader_is_gone(tmp_path: Path, flags: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path / "file", "", *flags, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 7
    assert done.stderr.count(LINE) == 1
    assert "Broken pipe" in done.stderr
    assert "last words" in done.stderr
    assert (tmp_path / "file").read_text().endswith("8859-1")  # the encoding that was asked for


def test_standard_error_in_the_same_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path / "file", "2>&1", stdout=writer)
    os.close(writer)
    assert done.returncode == 7
    assert (tmp_path / "file").read_text()


def test_a_full_disk(tmp_path: Path) -> None:
    done = run(tmp_path / "file", "> /dev/full", stderr=subprocess.PIPE)
    assert done.returncode == 7
    assert done.stderr.count(LINE) == 1
    assert "No space left" in done.stderr


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_not_given_to_other_files(tmp_path: Path, redirect: str) -> None:
    assert run(tmp_path / "file", redirect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 7
    assert int((tmp_path / "file").read_text().split()[0]) > 2


def test_an_open_stream_gets_everything(tmp_path: Path) -> None:
    done = run(tmp_path / "file", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout == "".join(f"line {number}\n" for number in range(5000)) + "unfinished"
    assert done.stderr == "last words\n"


def test_a_pipe_that_does_not_block_and_is_full_is_waited_for(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            received = pipe.read()
        assert process.wait(timeout=60) == 7
    assert received.count(b"line") == 5000
