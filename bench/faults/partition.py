"""Inside a network namespace of its own (`unshare -rn`): a worker in a second one, and the cable pulled."""

import json
import os
import subprocess
import sys
import time

from bench.faults.parts import ENGINE, eventually
from bench.faults.runs import REPOSITORY, environment, scratch
from bench.faults.stream import LIVENESS_S, PoolOfQuickWorkers
from rollout.keys import make_keys

HERE, THERE = "10.77.0.1", "10.77.0.2"


def _ip(*words: str, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", "-n", "-t", str(inside)]
    subprocess.run([*enter, "ip", *words], check=True)


def _other_namespace() -> int:
    """A process that keeps a second network namespace, connected by a cable of two ends."""
    keeper = subprocess.Popen(["unshare", "-n", "sleep", "100"])
    ours = os.stat("/proc/self/ns/net").st_ino
    eventually(lambda: os.stat(f"/proc/{keeper.pid}/ns/net").st_ino != ours, "the namespace is made")
    _ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(keeper.pid))
    for address, device, inside in ((HERE, "here", None), (THERE, "there", keeper.pid)):
        _ip("link", "set", "lo", "up", inside=inside)
        _ip("address", "add", f"{address}/24", "dev", device, inside=inside)
        _ip("link", "set", device, "up", inside=inside)
    return keeper.pid


def main() -> None:
    """Print what happened as one line of JSON."""
    keeper, keys = _other_namespace(), scratch() / "keys"
    make_keys(keys)
    command = [sys.executable, "-m", "rollout.explorer", *ENGINE, "--keys", str(keys), "--name", "far"]
    with PoolOfQuickWorkers("partition", endpoint=f"tcp://{HERE}:0", keys=str(keys)) as stream:
        far = subprocess.Popen(
            ["nsenter", "-n", "-t", str(keeper), *command, "--connect", stream.pool.endpoint], cwd=REPOSITORY,
            env=environment(QUICK_PACE_S="0.01"), stdout=sys.stderr,
        )  # fmt: skip
        try:
            eventually(lambda: len(stream.ready()) == 1, "the far worker is ready")
            stream.submit(10)
            stream.wait(16)
            _ip("link", "set", "here", "down")
            time.sleep(1.0)
            _ip("link", "set", "here", "up")
            stream.wait(160)
            assert not stream.pool.counters()["events"].get("dead"), "a short cut needs nobody's death"
            stream.spawn(1, QUICK_PACE_S="0.01")
            stream.submit(20)
            stream.wait(200)
            _ip("link", "set", "here", "down")
            start = time.monotonic()
            detection_s = stream.event("dead")
            time.sleep(max(0.0, LIVENESS_S + 1 - (time.monotonic() - start)))
            _ip("link", "set", "here", "up")
            cut_s = time.monotonic() - start
            counts = stream.settle()
            eventually(lambda: any(name.startswith("far.") for name in stream.ready()), "the far worker is back")
            events = {name: count for name, count in stream.pool.counters()["events"].items() if count}
        finally:
            far.terminate()
            far.wait()
            os.kill(keeper, 9)
    print(json.dumps({"detection_s": detection_s, "cut_s": cut_s, "events": events, **counts}))


if __name__ == "__main__":
    main()
