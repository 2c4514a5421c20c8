"""The process that runs a reward function, and the frames it exchanges with core.scoring.

    python -m core.scoring_worker FUNCTION FD MEMORY_BYTES PARENT_PID FOLDER

FD is a stream socket. A frame is a little-endian uint32 length and that many bytes of msgpack: RewardItem in; out, one
Started, then one Outcome per item in the order of the items.
"""

import ctypes
import faulthandler
import math
import os
import resource
import signal
import socket
import struct
import sys
from typing import Literal

import msgspec

from core.reward_errors import MAX_DETAIL, described
from core.rewards import Reward, RewardItem, UserReward, resolve_reward
from core.standard_streams import keep_going

Failure = Literal["timeout", "raised", "crashed", "none", "non_finite"]

SIZE = struct.Struct("<I")


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """A finite reward, or why there is none: such a completion is dropped and replaced, never scored 0.

    `timeout`: no score in time; `raised`: the function raised; `crashed`: its process died; `none` and `non_finite`: it
    returned None, NaN or ±inf.

    Example: Outcome(reward=1.0), Outcome(reward=None, failure="raised", detail="KeyError: 'boom' (rewards.py:12)")
    """

    reward: float | None
    failure: Failure | None = None
    detail: str = ""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The first frame: ready, with the columns that the function requires, or why it cannot be used."""

    error: str = ""
    needs: tuple[str, ...] = ()


def frame(message: RewardItem | Outcome | Started) -> bytes:
    """A message with its length in front."""
    payload = msgspec.msgpack.encode(message)
    return SIZE.pack(len(payload)) + payload


def take_replies(received: bytearray) -> list[Outcome | Started]:
    """Decode the whole frames in `received` and remove them from it."""
    replies: list[Outcome | Started] = []
    while len(received) >= SIZE.size:
        end = SIZE.size + SIZE.unpack_from(received)[0]
        if len(received) < end:
            break
        replies.append(msgspec.msgpack.decode(received[SIZE.size : end], type=Outcome | Started))
        del received[:end]
    return replies


def environment() -> dict[str, str]:
    """Of a scoring process: relative entries of PYTHONPATH count from the current folder, not from that of the process.

    Example: subprocess.Popen(command, cwd=REPOSITORY, env=environment())
    """
    found = dict(os.environ)
    if folders := found.get("PYTHONPATH"):
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders.split(os.pathsep)))
    return found


def main(function: str, fd: str, memory_bytes: str, parent_pid: str, folder: str) -> None:
    """Score items from the socket until it closes or the parent dies."""
    _die_with(int(parent_pid))
    _limit(resource.RLIMIT_AS, int(memory_bytes))
    _limit(resource.RLIMIT_CORE, 0)
    faulthandler.register(signal.SIGUSR1)  # the trainer asks for stacks
    # Behind everything else: a user's module is found where the run was started, and shadows nothing.
    sys.path.append(folder)
    os.chdir(folder)
    connection = socket.socket(fileno=int(fd))
    try:
        reward = resolve_reward(function)
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else described(error)
        connection.sendall(frame(Started(error=text[: 2 * MAX_DETAIL])))
        return
    connection.sendall(frame(Started(needs=reward.needs if isinstance(reward, UserReward) else ())))
    items = connection.makefile("rb")
    while header := items.read(SIZE.size):
        item = msgspec.msgpack.decode(items.read(*SIZE.unpack(header)), type=RewardItem)
        connection.sendall(frame(score(reward, item)))


def score(reward: Reward, item: RewardItem) -> Outcome:
    """What the reward function makes of one item."""
    try:
        value = reward(item)
    except Exception as error:
        return Outcome(None, "raised", described(error))
    if value is None:
        return Outcome(None, "none", "the reward function returned None")
    if not math.isfinite(value):
        return Outcome(None, "non_finite", f"the reward function returned {value}")
    return Outcome(value)


def _die_with(parent_pid: int) -> None:
    """Be killed when the parent's thread that started this process ends; PR_SET_PDEATHSIG is 1 (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(f"the parent, process {parent_pid}, is gone")


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (bound, bound))


if __name__ == "__main__":
    keep_going()  # a reward function may print
    main(*sys.argv[1:])
