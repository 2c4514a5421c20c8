"""A generating process: `python -m rollout.worker --connect ENDPOINT --role learner|explorer`.

It asks the trainer what to load, then generates leases until the trainer says stop. Exit code 0: the run is over; 1:
the engine or the connection failed; 2: refused, or called wrongly; 130, 143: interrupted, terminated.
"""

import argparse
import ctypes
import faulthandler
import importlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.schema import Source
from core.standard_streams import keep_going
from rollout.courier import Courier
from rollout.ended import Ended
from rollout.endpoints import resolve
from rollout.engine import Engine, engine_kind
from rollout.fingerprint import fingerprints
from rollout.generation import Generator
from rollout.keys import worker_keys
from rollout.messages import Join, Welcome
from rollout.wire import Link

EXIT_CODES = {"stop": 0, "silent": 1, "failed": 1, "refused": 2}
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 1.0


def load_engine(name: str, model_dir: Path, *, device: str, dtype: str, **sizes: Any) -> Engine:
    """An engine by name: `torch`, `vllm`, `auto`, or `module:function`, called with (model_dir, device=, dtype=).

    `sizes` are VllmEngine's, such as memory_share.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        engine: Engine = getattr(importlib.import_module(module), function)(model_dir, device=device, dtype=dtype)
        return engine
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if engine_kind(name, device) == "vllm":
        from rollout.vllm_engine import VllmEngine

        return VllmEngine(model_dir, device=device, dtype=dtype, **sizes)
    from rollout.torch_engine import TorchEngine

    return TorchEngine(model_dir, device=device, dtype=dtype)


def _require_shared_loading(engine: Engine, *, name: str) -> None:
    """ValueError for an engine of somebody else's that cannot take new weights as the run will hand them out."""
    if not callable(getattr(engine, "load_shared", None)):
        raise ValueError(
            f'engine {name} has no method load_shared(file, *, version, digest), which rollout.weights = "device" '
            "needs of a learner's worker (rollout.engine.Engine): write it, or start the run with "
            "rollout.weights=memory"
        )


class Worker:
    """The process: sessions with the trainer, one after the other, and the engine between them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._role = options, Source(options.role)
        self._engine: Engine | None = None
        self._served: Welcome | None = None  # what the engine was loaded for
        if options.name is None:
            options.name = f"{options.role}-{socket.gethostname()}-{os.getpid()}"[:100]

    def run(self) -> int:
        """Serve until the run is over; returns the exit code."""
        while True:
            try:
                self._session()
            except Ended as ended:
                again = ended.kind == "rejoin" or (ended.kind == "silent" and self._served is not None)
                stays = ended.role is not None or (again and not self._spawned)
                self._say(f"{ended.kind}: {ended.reason}" + (", joining again" if stays else ""))
                if not stays:
                    return EXIT_CODES.get(ended.kind, 1)
                self._role = ended.role or self._role

    @property
    def _spawned(self) -> bool:
        return self._options.parent is not None

    def _session(self) -> None:
        endpoint = self._endpoint()
        name = f"{self._options.name}.{secrets.token_hex(4)}"
        keys = worker_keys(Path(self._options.keys)) if self._options.keys else None
        patience = self._options.patience
        self._say(f"joining {endpoint} as {name}; waiting up to {patience:g} s for a trainer (--patience)")
        courier = Courier(
            Link(endpoint, name=name, keys=keys),
            Join(worker=name, role=self._role, pid=os.getpid(), host=socket.gethostname()),
            patience_s=patience,
            spawned=self._spawned,
            on_end=_leave_soon,
        )
        reason = "interrupted"
        try:
            self._serve(courier)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            raise
        finally:
            courier.close(reason)

    def _endpoint(self) -> str:
        """Read anew for each session: a run that was resumed has another address."""
        deadline_s = time.monotonic() + self._options.patience
        while self._served is not None and time.monotonic() < deadline_s:
            try:
                return resolve(self._options.connect)
            except ValueError:
                time.sleep(1.0)  # the trainer is not back yet
        return resolve(self._options.connect)

    def _serve(self, courier: Courier) -> None:
        welcome = courier.welcome()
        model_dir = Path(self._options.model or welcome.model)
        self._say(f"joined run {welcome.run_id}, start {welcome.incarnation}; loading {model_dir}")
        generator = self._load(welcome, model_dir)
        marks = fingerprints(model_dir, weights=self._role == Source.EXPLORER)
        courier.ready(marks, generator.engine.vocab_size)
        self._say("ready")
        while True:
            task = courier.next_task()
            if task.weights is not None:
                generator.update(task.weights, courier)
            generator.serve(task.lease, courier)

    def _load(self, welcome: Welcome, model_dir: Path) -> Generator:
        """An explorer keeps its engine from session to session; a learner's weights have moved, so it starts anew."""
        kept = self._served is not None and self._served.model == welcome.model and self._role == Source.EXPLORER
        if self._engine is None or not kept:
            if self._engine is not None:
                self._engine.close()
            if not model_dir.is_dir():
                raise ValueError(f"model directory {model_dir} does not exist here: name a copy of it with --model DIR")
            device, name = self._options.device or welcome.device, self._options.engine or welcome.engine
            self._engine = load_engine(
                name,
                model_dir,
                device=device,
                dtype=welcome.dtype,
                tensor_parallel_size=welcome.tensor_parallel,
                memory_share=welcome.memory_share,
                max_model_len=welcome.max_model_tokens,
            )
        if welcome.shared_weights and self._role is Source.LEARNER:
            _require_shared_loading(self._engine, name=self._options.engine or welcome.engine)
        self._served = welcome
        return Generator(self._engine, in_flight=welcome.update_in_flight)

    def _say(self, line: str) -> None:
        print(f"{self._options.name}: {line}", flush=True)


def main(arguments: Sequence[str] | None = None, *, role: str | None = None) -> int:
    """Entry of `python -m rollout.worker` and, with its role, of `python -m rollout.explorer`."""
    options = _parser(role).parse_args(arguments)
    options.role = options.role or role
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    if options.parent is not None:
        _die_with(options.parent)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.threads is not None:  # torch, which reads it, is imported later
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        return Worker(options).run()
    except (ValueError, OSError) as error:
        print(f"s2l-po: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(role: str | None) -> argparse.ArgumentParser:
    program = "rollout.explorer" if role else "rollout.worker"
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--connect", required=True, metavar="ENDPOINT", help="ipc://…, tcp://host:port, or the run directory of a run")
    add("--role", choices=[source.value for source in Source], default=role, required=role is None)
    add("--name", help="name in logs (default: role, host and process id)")
    add(
        "--model",
        metavar="DIR",
        help="copy of the model on this machine (default: the trainer's directory)",
    )
    add("--keys", metavar="DIR", help="directory of CURVE keys (python -m rollout.keys)")
    add("--threads", type=int, help="threads of the engine on CPU")
    add("--device", help="device of the engine (default: the run's)")
    add("--engine", help="engine, as `torch` or module:function (default: the run's)")
    add("--patience", type=float, default=600.0, metavar="S", help="seconds to wait for a trainer (default: 600)")
    add("--parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    return parser


def _die_with(parent: int) -> None:
    """Be killed when the process that started this one dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _leave_soon(ended: Ended) -> None:
    """An engine that hangs does not outlive the session."""
    if ended.kind in ("stop", "refused"):
        timer = threading.Timer(_LAST_WORDS_S, os._exit, (EXIT_CODES[ended.kind],))
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    keep_going()
    sys.exit(main())
