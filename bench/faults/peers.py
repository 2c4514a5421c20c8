"""Rows about who may take part: keys, addresses, fingerprints, names; and a network between them that is cut."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.faults.parts import ENGINE, ScriptedWorker, eventually, make_model
from bench.faults.rows import NotHere, Verdict, row
from bench.faults.runs import REPOSITORY, environment, scratch
from bench.faults.stream import PoolOfQuickWorkers
from rollout.keys import make_keys, worker_keys
from rollout.messages import Acknowledge, Grant, Leave
from rollout.wire import Link


def _by_hand(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rollout.explorer", "--connect", endpoint, "--patience", "20", *ENGINE, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@row("F16", "explorer with another tokenizer, with other weights", quick=True)
def fingerprints(seed: int) -> Verdict:
    with PoolOfQuickWorkers("fingerprints") as stream:
        said = ""
        start = time.monotonic()
        for name, changes in (("tokenizer", {"vocabulary": "b"}), ("model", {"content": b"other"})):
            other = scratch() / f"other-{name}"
            make_model(other, **changes)
            done = _by_hand(stream.pool.endpoint, "--model", str(other))
            said = done.stdout + done.stderr
            assert done.returncode == 2, said
            assert f"its {name} is" in said, said
        seconds = (time.monotonic() - start) / 2
        stream.spawn(1)
        stream.submit(4)
        counts = stream.settle()
    return Verdict("refused", "exit code 2, both hashes named; the run went on with others", seconds, **counts)


@row("F27", "peers without a key, with an unknown key, with another trainer's key", quick=True)
def strangers(seed: int) -> Verdict:
    keys, others = scratch() / "keys", scratch() / "other-keys"
    make_keys(keys)
    make_keys(others)
    with PoolOfQuickWorkers("strangers", endpoint="tcp://127.0.0.1:0", keys=str(keys)) as stream:
        stream.spawn(1)
        mixed = worker_keys(others)._replace(trainer=worker_keys(keys).trainer)
        start = time.monotonic()
        links = [
            Link(stream.pool.endpoint, name="plain.1"),
            Link(stream.pool.endpoint, name="unknown.1", keys=mixed),
            Link(stream.pool.endpoint, name="wrong.1", keys=worker_keys(others)),
        ]
        eventually(lambda: stream.pool.counters()["sockets"].get("key_refused"), "the unknown key is refused")
        eventually(lambda: stream.pool.counters()["sockets"].get("handshake_failed"), "handshakes fail")
        seconds = time.monotonic() - start
        assert not any(link.send([Leave(reason="x")]) for link in links), "a stranger is connected"
        for link in links:
            link.close()
        stream.submit(4)
        counts = stream.settle()
        seen = stream.pool.counters()["sockets"]
        assert len(stream.pool.counters()["workers"]) == 1
    return Verdict("refused", f"{dict(sorted(seen.items()))}; the worker with a key went on", seconds, **counts)


@row("F27b", "routable address without keys; keys that others may read", quick=True)
def open_doors(seed: int) -> Verdict:
    said = []
    start = time.monotonic()
    try:
        PoolOfQuickWorkers("open-door", endpoint="tcp://0.0.0.0:0")
    except ValueError as problem:
        said.append(str(problem))
    keys = scratch() / "loose-keys"
    make_keys(keys)
    (keys / "trainer.key").chmod(0o644)
    try:
        PoolOfQuickWorkers("loose-keys-run", endpoint="tcp://127.0.0.1:0", keys=str(keys))
    except ValueError as problem:
        said.append(str(problem))
    assert len(said) == 2, said
    assert "needs keys" in said[0], said
    assert "mode 0644" in said[1], said
    with PoolOfQuickWorkers("default-door") as stream:
        mode = Path(stream.pool.endpoint.removeprefix("ipc://")).parent.stat().st_mode & 0o777
        assert mode == 0o700, oct(mode)
    return Verdict(
        "refused",
        "both named, with the remedy; the default is an ipc socket in a 0700 directory",
        time.monotonic() - start,
    )


@row("F35", "an explorer comes back under the same name while its old connection hangs", quick=True)
def same_name(seed: int) -> Verdict:
    with PoolOfQuickWorkers("same-name") as stream:
        old = stream.scripted("twin.1")
        old.enter(stream.model)
        stream.submit(1)
        old.hear(Grant)  # and says nothing any more
        start = time.monotonic()
        new = ScriptedWorker(stream.pool.endpoint, "twin.1")
        try:
            new.enter(stream.model)
            for _ in range(4):  # beats that do not name the lease
                new.say(new.heartbeat())
            new.hear(Grant)
            seconds = time.monotonic() - start
            new.say(*(new.deliver(n + 1, stream.leases[0], n // 4, n % 4) for n in range(16)))
            new.hear(Acknowledge)
            counts = stream.settle()
        finally:
            new.close()
    return Verdict("tolerated", "the new connection is heard, the old one's lease is its own", seconds, **counts)


@row("F24", "network partition between namespaces, 1 s and longer than liveness, under CURVE", quick=True)
def partition(seed: int) -> Verdict:
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        raise NotHere(f"no {', '.join(missing)}")
    probe = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise NotHere(f"no network namespaces for this user ({probe.stderr.strip()})")
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-m", "bench.faults.partition"], cwd=REPOSITORY, env=environment(),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    found = json.loads(done.stdout.splitlines()[-1])
    text = f"1 s: healed by itself; {found['cut_s']:.1f} s: dead, regranted to the other, back: {found['events']}"
    return Verdict("tolerated", text, found["detection_s"], found["lost"], found["duplicated"])
