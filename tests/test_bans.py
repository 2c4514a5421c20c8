"""What must never be written here is refused by the linter, and each ban really fires."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "kernels", "rollout", "trainer", "bench")
# Methods of objects whose type the linter does not know.
UNPICKLING_METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized"}


def lint(snippet: str, place: str = "rollout/snippet.py") -> str:
    found = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    assert found is not None
    command = [found, "check", "--no-cache", "--output-format", "concise", "--stdin-filename", place, "-"]
    return subprocess.run(
        command, cwd=REPOSITORY, input=snippet, capture_output=True, text=True, check=False
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("snippet", "message"),
    [
        ("import pickle\n\npickle.dumps(1)\n", "`pickle` is banned"),
        ("from pickle import loads\n\nloads(b'')\n", "`pickle` is banned"),
        ("import cloudpickle\n\ncloudpickle.loads(b'')\n", "`cloudpickle` is banned"),
        ("import dill\n\ndill.loads(b'')\n", "`dill` is banned"),
        ("import shelve\n\nshelve.open('x')\n", "`shelve` is banned"),
        ("import marshal\n\nmarshal.loads(b'')\n", "`marshal` is banned"),
        ("import joblib\n\njoblib.load('x')\n", "`joblib` is banned"),
        ("import torch\n\ntorch.load('x')\n", "`torch.load` is banned"),
        ("import torch\n\ntorch.load('x', weights_only=True)\n", "`torch.load` is banned"),
        ("from torch import load\n\nload('x')\n", "`torch.load` is banned"),
        ("import torch.distributed as dist\n\ndist.broadcast_object_list([1])\n", "object collectives unpickle"),
        ("import torch.distributed as dist\n\ndist.all_gather_object([None], 1)\n", "object collectives unpickle"),
        ("import time\n\nprint(time.time())\n", "`time.time` is banned"),
        ("from time import time\n\nprint(time())\n", "`time.time` is banned"),
        ("import yaml\n\nyaml.load('x')\n", "S506"),
        ("eval('1')\n", "S307"),
        ("exec('1')\n", "S102"),
    ],
)
@pytest.mark.parametrize("place", ["rollout/snippet.py", "trainer/snippet.py", "bench/snippet.py"])
def test_the_linter_refuses(snippet: str, message: str, place: str) -> None:
    said = lint(snippet, place)
    assert message in said or f" {message} " in said, said


def test_a_harmless_snippet_passes() -> None:
    assert lint("import time\n\nprint(time.monotonic())\n") == "All checks passed!\n"


def unpickling_calls(source: str) -> list[int]:
    """Lines that use a method which unpickles, whatever the object."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in UNPICKLING_METHODS
    ]


def test_no_socket_unpickles() -> None:
    assert unpickling_calls("socket.recv_pyobj()") == [1]
    found = {
        str(file): lines
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*.py")
        if (lines := unpickling_calls(file.read_text("utf-8")))
    }
    assert found == {}


def test_no_exemption_hides_a_ban() -> None:
    """`noqa` could switch a ban off line by line."""
    hidden = [
        f"{file}: {line}"
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if "noqa" in line and any(code in line for code in ("TID251", "S301", "S302", "S307", "S102", "S506"))
    ]
    assert hidden == []
