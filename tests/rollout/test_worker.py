"""The worker process: started by hand, refused, orphaned, joining again; and what it runs on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from bench.faults import engine as fault_engine
from bench.faults.parts import HANG_GUARD_S, SAMPLING, Sink, eventually, make_completion, make_lease, make_model
from core.config import Config
from core.schema import Source
from rollout.children import REPOSITORY
from rollout.fingerprint import fingerprints, tokenizer_fingerprint, weights_fingerprint
from rollout.inbox import Inbox, Task
from rollout.keys import make_keys
from rollout.messages import Weights
from rollout.outbox import Outbox
from rollout.pool import WorkerPool
from rollout.worker import load_engine

PoolMaker = Callable[..., WorkerPool]


class ByHand:
    """A worker started in another terminal."""

    def __init__(
        self, *arguments: str, module: str = "rollout.explorer", engine: str = "bench.faults.engine:make"
    ) -> None:
        command = [sys.executable, "-m", module, "--engine", engine, *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background job, such as this test run may be, ignores Ctrl-C and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.text = ""

    def end(self) -> int:
        """Wait for its end; what it printed is in `text`."""
        self.text, _ = self.process.communicate(timeout=HANG_GUARD_S)
        return self.process.returncode


@pytest.fixture
def by_hand() -> Iterator[Callable[..., ByHand]]:
    workers: list[ByHand] = []

    def start(*arguments: str, **settings: str) -> ByHand:
        workers.append(ByHand(*arguments, **settings))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def ready(pool: WorkerPool, count: int = 1) -> Callable[[], bool]:
    return lambda: sum(worker["state"] == "ready" for worker in pool.counters()["workers"].values()) == count


def test_an_explorer_started_by_hand_joins_late_and_ends_with_the_run(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], config: Config, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_PACE_S", "0.002")
    pool = make_pool()
    pool.spawn(Source.EXPLORER, 0)
    pool.submit([make_lease(n) for n in range(4)])
    sink.wait(10, pool.check)
    late = by_hand("--connect", config.run.dir, "--name", "late")
    eventually(ready(pool, 2))
    pool.submit([make_lease(n) for n in range(4, 16)])
    sink.wait(256, pool.check)
    counts = pool.counters()
    assert counts["balanced"]
    assert next(w for name, w in counts["workers"].items() if name.startswith("late."))["received"] > 0
    assert max(sink.keys.values()) == 1
    pool.close("training is done")
    assert late.end() == 0
    assert "late: ready" in late.text
    assert "late: stop: training is done" in late.text


def test_a_run_without_explorers_of_its_own_waits_for_one_by_hand(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], sink: Sink
) -> None:
    pool = make_pool()
    pool.submit([make_lease()])
    pool.check()
    waits = "no explorer worker is ready; known: none has joined yet; start one: python -m rollout.explorer --connect "
    assert waits + pool.config.run.dir in pool.waiting_for().line
    by_hand("--connect", pool.endpoint)
    sink.wait(16, pool.check)
    assert len(sink.keys) == 16


def test_a_worker_with_another_model_is_told_and_exits_with_2(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], tmp_path: Path
) -> None:
    pool, other = make_pool(), make_model(tmp_path / "other", vocabulary="b")
    worker = by_hand("--connect", pool.endpoint, "--model", str(other))
    assert worker.end() == 2
    assert f"refused: its tokenizer is {tokenizer_fingerprint(other)}, the run's is" in worker.text
    assert "Traceback" not in worker.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--connect", "tcp://10.1.2.3:5"], "needs keys"),
        (["--connect", "/nowhere"], "directory of a running run"),
        (["--connect", "ipc:///tmp/x", "--keys", "/nowhere"], "no worker.key"),
        (["--connect", "ipc:///tmp/x", "--bogus"], "unrecognized arguments: --bogus"),
        (["--connekt", "x"], "required: --connect"),
    ],
)
def test_wrong_calls_get_one_clear_line_and_exit_code_2(
    by_hand: Callable[..., ByHand], arguments: list[str], message: str
) -> None:
    worker = by_hand(*arguments)
    assert worker.end() == 2
    assert message in worker.text
    assert "Traceback" not in worker.text


def test_a_model_that_is_not_here_is_named(make_pool: PoolMaker, by_hand: Callable[..., ByHand]) -> None:
    worker = by_hand("--connect", make_pool().endpoint, "--model", "/nowhere/model")
    assert worker.end() == 2
    assert "s2l-po: model directory /nowhere/model does not exist here" in worker.text


def test_an_engine_that_cannot_read_weights_on_the_device_is_refused_before_it_works(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], config: Config
) -> None:
    """As an explorer, whose weights never change, it may join."""
    pool = make_pool(msgspec.structs.replace(config, rollout=msgspec.structs.replace(config.rollout, weights="device")))
    worker = by_hand("--connect", pool.endpoint, "--role", "learner", module="rollout.worker")
    assert worker.end() == 2
    assert "s2l-po: engine bench.faults.engine:make has no method load_shared(file, *, version, digest)" in worker.text
    assert worker.text.rstrip().endswith("or start the run with rollout.weights=memory")
    assert "Traceback" not in worker.text
    by_hand("--connect", pool.endpoint)
    eventually(ready(pool))


def test_a_worker_without_a_trainer_gives_up_and_says_so(by_hand: Callable[..., ByHand], tmp_path: Path) -> None:
    worker = by_hand("--connect", f"ipc://{tmp_path}/hub", "--patience", "0.5")
    assert worker.end() == 1
    assert "waiting up to 0.5 s for a trainer (--patience)" in worker.text
    assert f"at ipc://{tmp_path}/hub: no trainer listens there" in worker.text
    assert "silent: no answer from the trainer" in worker.text


@pytest.mark.parametrize("unlisted", [False, True])
def test_a_worker_whose_keys_do_not_fit_is_told_at_once_and_so_is_the_trainer(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], config: Config, tmp_path: Path, unlisted: bool
) -> None:
    make_keys(tmp_path / "keys")
    stream = msgspec.structs.replace(config.stream, endpoint="tcp://127.0.0.1:0", keys=str(tmp_path / "keys"))
    said: list[str] = []
    pool = make_pool(msgspec.structs.replace(config, stream=stream), on_event=said.append)
    make_keys(tmp_path / "keys", worker="late")  # the trainer read its directory before
    (tmp_path / "keys" / "worker.key").unlink()
    keys = ("--keys", str(tmp_path / "keys")) if unlisted else ()
    worker = by_hand("--connect", pool.endpoint, *keys, "--patience", "500")
    assert worker.end() == 2
    why = "does not list this worker's key" if unlisted else "lets nobody in without keys, and this worker gave none"
    assert f"refused: the trainer at {pool.endpoint} {why}" in worker.text
    eventually(lambda: said)
    assert "1 connection was refused in its handshake: a worker without keys, or with a key that was not in" in said[0]
    assert pool.counters()["workers"] == {}


class LoneTrainer:
    """A trainer in a process of its own."""

    def __init__(self, config: Config, model: Path, explorers: int) -> None:
        script = Path(__file__).with_name("lone_trainer.py")
        command = [sys.executable, str(script), msgspec.json.encode(config).decode(), str(model), str(explorers)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def with_stream(config: Config, **changes: object) -> Config:
    return msgspec.structs.replace(config, stream=msgspec.structs.replace(config.stream, **changes))


def test_a_worker_by_hand_outlives_its_trainer_and_serves_the_next(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], config: Config, sink: Sink, tmp_path: Path, model: Path
) -> None:
    config = with_stream(config, endpoint=f"ipc://{tmp_path}/hub", liveness_s=0.5)
    first = LoneTrainer(config, model, 0)
    try:
        worker = by_hand("--connect", f"ipc://{tmp_path}/hub", "--name", "loyal")
        first.line()
        assert [first.line() for _ in range(16)] == ["completion"] * 16
    finally:
        first.kill()
    second = make_pool(config, incarnation=2)
    second.submit([make_lease()])
    sink.wait(16, second.check)
    assert len(sink.keys) == 16
    second.close("done")
    assert worker.end() == 0
    assert "joining again" in worker.text
    assert "start 2" in worker.text


def test_spawned_workers_die_with_their_trainer(config: Config, model: Path, tmp_path: Path) -> None:
    trainer = LoneTrainer(with_stream(config, endpoint=f"ipc://{tmp_path}/hub"), model, 2)
    pids = [int(pid) for pid in trainer.line().split()]
    trainer.kill()
    assert len(pids) == 2
    eventually(lambda: all(is_dead(pid) for pid in pids))


def is_dead(pid: int) -> bool:
    """No longer there, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_worker_leaves_at_once(
    make_pool: PoolMaker, by_hand: Callable[..., ByHand], config: Config, sign: signal.Signals, code: int
) -> None:
    pool = make_pool(with_stream(config, liveness_s=30.0))  # so that silence explains nothing
    worker = by_hand("--connect", pool.endpoint)
    eventually(ready(pool))
    worker.process.send_signal(sign)
    assert worker.end() == code
    eventually(lambda: [w["state"] for w in pool.counters()["workers"].values()] == ["gone"])


def test_sigusr1_prints_all_stacks(make_pool: PoolMaker, config: Config) -> None:
    pool = make_pool()
    pool.spawn(Source.EXPLORER, 0)
    eventually(ready(pool))
    os.kill(pool._children.pids()["explorer-0"], signal.SIGUSR1)
    log = Path(config.run.dir) / "logs" / "explorer-0.log"
    eventually(lambda: "next_task" in log.read_text() and "rollout/courier.py" in log.read_text())
    time.sleep(0.2)
    pool.check()


def test_engines_go_by_name(model: Path) -> None:
    engine = load_engine("bench.faults.engine:make", model, device="cpu", dtype="float32")
    assert isinstance(engine, fault_engine.QuickEngine)
    with pytest.raises(ValueError, match="'warp' is not one of"):
        load_engine("warp", model, device="cpu", dtype="float32")


# What it keeps.


def weights(version: int) -> Weights:
    return Weights(version=version, file=f"{version}.safetensors", digest="")


def test_inbox_gives_training_the_newest_weights_and_evaluation_its_own() -> None:
    inbox = Inbox()
    train, exam = (
        make_lease(version=1, source=Source.LEARNER),
        make_lease(version=2, purpose="eval", source=Source.LEARNER),
    )
    inbox.grant(train)
    inbox.grant(train)
    assert (inbox.ready, inbox.lacks, inbox.leases) == (False, 1, [train.lease_id])
    for version in (1, 2, 3):
        inbox.learn(weights(version))
    assert inbox.take() == Task(train, weights(3))
    inbox.loaded = 3
    inbox.grant(exam)
    assert inbox.take() == Task(exam, weights(2))
    inbox.loaded = 2
    inbox.grant(exam)
    assert not inbox._waiting  # it is in work
    inbox.current = None
    inbox.grant(exam)
    assert inbox.take() == Task(exam, None)


def test_outbox_sends_again_what_a_later_beat_proves_lost() -> None:
    outbox, lease = Outbox(4), make_lease()
    for sample in range(3):
        outbox.put(lease.lease_id, "train", make_completion(lease, 0, sample))
    assert not outbox.full
    first = outbox.unsent(10**6, 2)
    outbox.sent(first, beat=1)
    outbox.sent(outbox.unsent(10**6, 2), beat=2)
    outbox.acknowledge((1,), beat=1)
    assert outbox.unsent(10**6, 9) == []
    outbox.acknowledge((), beat=2)  # 2 was sent before this beat, 3 after it
    assert [deliver.seq for deliver in outbox.unsent(10**6, 9)] == [2]
    outbox.put(lease.lease_id, "train", make_completion(lease, 0, 3))
    outbox.put(lease.lease_id, "train", make_completion(lease, 1, 0))
    assert outbox.full  # 2 … 5 is the window
    outbox.sent(outbox.unsent(10**6, 9), beat=3)
    outbox.acknowledge((2, 3, 4, 5), beat=3)
    assert (len(outbox), outbox.leases, outbox.full) == (0, [], False)


def test_outbox_frames_are_bounded_but_never_empty() -> None:
    outbox, lease = Outbox(99), make_lease()
    for sample in range(4):
        outbox.put(lease.lease_id, "train", make_completion(lease, 0, sample, tokens=100))
    assert len(outbox.unsent(1, 9)) == 1
    assert len(outbox.unsent(1700, 9)) == 2
    assert len(outbox.unsent(10**6, 3)) == 3


# What it is.


def test_fingerprints_follow_content_and_nothing_else(tmp_path: Path) -> None:
    first, same = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    assert fingerprints(first, weights=True) == fingerprints(same, weights=True)
    assert fingerprints(first, weights=False).weights == ""
    (same / "tokenizer.json").write_text(json.dumps({"padding": {"length": 9}, "model": {"vocab": {"a": 0}}}, indent=2))
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(first)
    (same / "README.md").write_text("x")
    assert weights_fingerprint(same) == weights_fingerprint(first)
    (same / "model.safetensors").rename(same / "other.safetensors")
    assert weights_fingerprint(same) != weights_fingerprint(first)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1}}})),
        lambda d: (d / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": ["x"]})),
        lambda d: (d / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"})),
        lambda d: (d / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"})),
        lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"),
    ],
)
def test_a_changed_tokenizer_has_another_fingerprint(tmp_path: Path, change: Callable[[Path], object]) -> None:
    directory = make_model(tmp_path / "a")
    before = tokenizer_fingerprint(directory)
    change(directory)
    assert tokenizer_fingerprint(directory) != before


def test_special_tokens_as_text_or_table_are_the_same(tmp_path: Path) -> None:
    marks = []
    for name, token in (("a", "<end>"), ("b", {"content": "<end>", "lstrip": False})):
        directory = make_model(tmp_path / name)
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": token, "model_max_length": name}))
        marks.append(tokenizer_fingerprint(directory))
    assert marks[0] == marks[1]


def test_a_tokenizer_without_json_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    before = tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"other pieces")
    assert tokenizer_fingerprint(tmp_path) != before


def test_directories_that_are_no_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        weights_fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        tokenizer_fingerprint(tmp_path)


def test_what_a_worker_answers_is_a_function_of_the_seed() -> None:
    tokens, logprobs = fault_engine.expected(12, SAMPLING.max_tokens)
    again, _ = fault_engine.expected(12, SAMPLING.max_tokens)
    assert (tokens == again).all()
    assert len(tokens) == len(logprobs) == 13
