"""The directory a run writes into: held by one process at a time, never overwritten without being told to."""

import fcntl
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import msgspec

from core.config import Config
from core.configfile import ConfigError, write_resolved
from core.metrics import FILE_NAME as METRICS_FILE
from core.whole_file import whole_file

CONFIG_FILE, IDENTITY_FILE, LOCK_FILE = "config.resolved.json", "run.json", "lock"

# What a resumed run may change: how it runs, not what it computes.
FREE_KEYS = (
    "run.dir", "run.threads", "run.device", "run.log_to", "algorithm.steps", "algorithm.stream_mini_batches",
    "learner.max_nonfinite_updates", "explorer.processes", "explorer.ahead_steps", "rollout.processes", "rollout.roles",
    "rollout.update_in_flight", "rollout.memory_share", "rollout.max_logprob_gap", "rollout.weights", "stream.",
    "placement.", "reward.workers", "reward.timeout_s", "evaluation.", "checkpoint.",
)  # fmt: skip
# And what it may change where memory ran out: the same updates, added up in another order.
ROUNDING_KEYS = (
    "learner.micro_batch_tokens", "learner.micro_batch_rows", "learner.share_prompts", "learner.skip_zero_gradient",
    "learner.sequence_parallel", "learner.gradient_checkpointing", "learner.recompute", "learner.backend",
    "learner.zero_stage", "learner.offload", "learner.liger", "learner.kernels", "rollout.tensor_parallel",
)  # fmt: skip


class RunDirectory:
    """Opens `config.run.dir`, refusing what would lose or mix results.

    Attributes: path; run_id, equal over all starts of a run; incarnation, 1 for the first start and counting; notes,
    lines about settings that a resumed run changes.
    """

    def __init__(self, config: Config, *, resume: bool, clean: bool) -> None:
        self.path = Path(config.run.dir).resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path)
        except OSError as error:
            raise ConfigError(_not_writable(self.path, error.strerror)) from error
        try:
            self._claim(config, resume=resume, clean=clean)
        except BaseException:
            self.close()
            raise

    def _claim(self, config: Config, *, resume: bool, clean: bool) -> None:
        self.notes = check_directory(config, resume=resume, clean=clean)
        if not resume:
            empty(self.path)
        self.run_id, self.incarnation = self._identity()
        write_resolved(config, self.path / CONFIG_FILE)
        for name in ("logs", "rollouts", "checkpoints"):
            (self.path / name).mkdir(exist_ok=True)

    def _identity(self) -> tuple[str, int]:
        file = self.path / IDENTITY_FILE
        run_id, incarnation = secrets.token_hex(8), 0
        if file.exists():
            saved = json.loads(file.read_text())
            run_id, incarnation = saved["run_id"], saved["incarnation"]
        with whole_file(file) as partial:
            partial.write_text(json.dumps({"run_id": run_id, "incarnation": incarnation + 1}), encoding="utf-8")
        return run_id, incarnation + 1

    def close(self) -> None:
        """Let another process have the directory."""
        os.close(self._lock)


def check_directory(config: Config, *, resume: bool, clean: bool) -> list[str]:
    """Raise ConfigError where a run cannot have `config.run.dir`; changes nothing. What a resume changes."""
    path = Path(config.run.dir).resolve()
    if resume and not (path / CONFIG_FILE).is_file():
        raise ConfigError(f"--resume: {path} holds no run; start it without --resume")
    above = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not above.is_dir():
        raise ConfigError(_not_writable(path, f"{above} is no directory"))
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(_not_writable(path, f"no permission to write in {above}"))
    if above != path:
        return []
    holds_run = (path / CONFIG_FILE).exists()
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK_FILE)
    if foreign and not holds_run:
        raise ConfigError(f"run.dir: {path} holds other files ({', '.join(foreign[:3])} …); choose another")
    if resume:
        return accept_changes(json.loads((path / CONFIG_FILE).read_text()), config)
    if holds_run and not clean and not came_to_nothing(path):
        raise ConfigError(
            f"run.dir: {path} already holds a run; continue it with --resume, delete it with --clean, or choose another"
        )
    return []


def _not_writable(path: Path, why: str | None) -> str:
    return f'run.dir = "{path}" cannot be made or written ({why}); choose another'


def hold(path: Path) -> int:
    """Lock the directory until the descriptor is closed; the kernel does that when the process dies."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 100, 0).decode().strip() or "unknown"
        os.close(descriptor)
        raise ConfigError(f"run.dir: {path} is in use by process {holder}; stop it or choose another run.dir") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def came_to_nothing(path: Path) -> bool:
    """Whether a run's start failed before it had a result, so that nothing is lost with its files."""
    metrics = path / METRICS_FILE
    if metrics.exists() and metrics.stat().st_size:
        return False
    return not any(next((path / name).rglob("*"), None) for name in ("checkpoints", "rollouts", "model"))


def empty(path: Path) -> None:
    """Delete a run's files, keeping the held lock."""
    for entry in path.iterdir():
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def accept_changes(saved: dict[str, Any], config: Config) -> list[str]:
    """What a resumed run says of its changed settings. ConfigError unless it is the computation that was started."""
    before, now = flatten(saved), flatten(msgspec.to_builtins(config))
    changed = {
        name: f"{name}: {before.get(name)!r} → {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(FREE_KEYS)
    }
    if other := [f"  {text}" for name, text in changed.items() if name not in ROUNDING_KEYS]:
        raise ConfigError(
            "\n".join(["--resume: these settings differ from the run's; restore them or start a new run:", *other])
        )
    if not changed:
        return []
    return [f"--resume: the same updates from here on, but for rounding: {', '.join(changed.values())}"]


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
