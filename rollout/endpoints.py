"""Which addresses the stream may use: ipc and loopback freely, anything routable only with keys."""

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
import tempfile
from pathlib import Path

# sockaddr_un.sun_path holds 108 bytes on Linux, the last one a NUL.
MAX_IPC_PATH_BYTES = 107
ENDPOINT_FILE = "endpoint"
_PREFIX, _SOCKET = "s2lpo-", "hub"
_STALE_S = 60.0


class PrivateIpc:
    """A new ipc endpoint in a directory that only this user may enter (0700).

    The directory is locked until `close`; the kernel lets go of the lock when this process ends, however it does. So
    others know without a connection, which the hub would report as a stranger's, that it is in use.

    Example: ipc = PrivateIpc(); hub = Hub(ipc.endpoint, ...); hub.close(); ipc.close()
    """

    def __init__(self) -> None:
        for parent in (None, "/tmp"):  # a long TMPDIR does not leave room for a socket's name
            self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            _sweep(self.directory)
            if len(bytes(self.directory / _SOCKET)) <= MAX_IPC_PATH_BYTES:
                self.endpoint = f"ipc://{self.directory / _SOCKET}"
                self._lock = os.open(self.directory, os.O_RDONLY)
                with contextlib.suppress(OSError):  # where a file system knows no locks, others have to connect
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            self.directory.rmdir()
        raise ValueError("no temporary directory with a path short enough for a socket: set TMPDIR to a short one")

    def close(self) -> None:
        """Remove the directory; nobody may listen there any more."""
        (self.directory / _SOCKET).unlink(missing_ok=True)
        self.directory.rmdir()
        os.close(self._lock)


def resolve(target: str) -> str:
    """What --connect means: an endpoint as it stands, or the endpoint that the run in a run directory wrote there."""
    if "://" in target:
        return target
    file = Path(target) / ENDPOINT_FILE
    if not file.is_file():
        raise ValueError(f"--connect {target}: neither ipc://… or tcp://… nor the directory of a running run")
    return file.read_text("utf-8").strip()


def check_endpoint(endpoint: str, *, has_keys: bool) -> None:
    """ValueError for an address that cannot work or that would let strangers in."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        _check_ipc(endpoint, rest)
    elif scheme == "tcp":
        host, port = _split(endpoint)
        if not has_keys and not _is_loopback(host):
            raise ValueError(
                f"{endpoint} can be reached from other machines, so it needs keys: make them with "
                "`python -m rollout.keys DIR` and set stream.keys (workers: --keys DIR), or use 127.0.0.1"
            )
        if not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{endpoint}: the port must be a number from 0 to 65535")
    else:
        raise ValueError(f'{endpoint}: an endpoint is "auto", ipc://PATH or tcp://HOST:PORT')


def bindable(endpoint: str) -> str:
    """The same address in the form that bind wants: numbers, not `localhost`."""
    return endpoint.replace("tcp://localhost:", "tcp://127.0.0.1:")


def reachable(endpoint: str) -> str:
    """A bound address in a form that a worker can connect to: a host name in place of "all interfaces"."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, port = _split(endpoint)
    return f"tcp://{socket.gethostname()}:{port}" if host in ("0.0.0.0", "::", "*") else endpoint


def bind_problem(endpoint: str, code: int, said: str) -> str:
    """Why an address could not be bound: `code` is an errno, `said` its words."""
    what = "is in use by another process" if code == errno.EADDRINUSE else f"cannot be used: {said}"
    return f'stream.endpoint = "{endpoint}" {what}: choose another port, or "auto"'


def refuse_live_ipc(endpoint: str) -> None:
    """ValueError where somebody listens on the ipc path already: bind would silently take the path over."""
    path = Path(endpoint.removeprefix("ipc://"))
    if not endpoint.startswith("ipc://") or not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ValueError(f'stream.endpoint = "{endpoint}" is a file, not a socket: choose another path, or "auto"')
    if _listens(path):
        raise ValueError(f'stream.endpoint = "{endpoint}" is in use by another process: choose another path, or "auto"')


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(str(path)) != errno.ECONNREFUSED


def _sweep(fresh: Path) -> None:
    """Remove, beside a fresh directory, those that killed trainers of this user left: nobody listens there any more."""
    for directory in fresh.parent.glob(f"{_PREFIX}*"):
        hub = directory / _SOCKET
        with contextlib.suppress(FileNotFoundError):  # another trainer sweeps too
            old = fresh.stat().st_mtime - directory.stat().st_mtime > _STALE_S
            mine = directory.stat().st_uid == os.getuid()
            # A trainer of an earlier version listens without a lock.
            if old and mine and hub.is_socket() and not _is_locked(directory) and not _listens(hub):
                hub.unlink()
                directory.rmdir()


def _is_locked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def _check_ipc(endpoint: str, path: str) -> None:
    if path.startswith("@") or not path:
        raise ValueError(f"{endpoint}: name a file; abstract sockets have no permissions")
    if len(path.encode()) > MAX_IPC_PATH_BYTES:
        raise ValueError(
            f"{endpoint}: {len(path.encode())} bytes of path, the system allows {MAX_IPC_PATH_BYTES}: "
            'use a shorter path, or stream.endpoint = "auto"'
        )


def _split(endpoint: str) -> tuple[str, str]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
