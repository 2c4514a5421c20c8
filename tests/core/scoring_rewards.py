"""Reward functions that misbehave, for test_scoring: their processes import them by name."""

import ctypes
import os
import time


def act(completions, **columns):
    """Do what the completion says."""
    order, _, rest = completions[0].partition(" ")
    match order:
        case "score":
            return [float(rest)]
        case "raise":
            raise KeyError(rest)
        case "slow":
            time.sleep(0.02)
            return [0.0]
        case "take":
            time.sleep(float(rest))
            return [0.0]
        case "none":
            return [None]
        case "sleep":
            time.sleep(600)
        case "spin":
            while True:
                pass
        case "allocate":
            return [float(len(bytearray(int(rest))))]
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "print":
            print(rest, flush=True)
            return [0.5]
        case "pid":
            return [float(os.getpid())]
        case "child":
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
            with open(rest, "w") as file:
                file.write(str(pid))
            time.sleep(600)
    raise AssertionError(order)
