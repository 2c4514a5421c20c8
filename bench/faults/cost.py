"""What the promises cost: checksums, dedupe, ledger and CURVE against a step of the embedded default, in CPU time."""

import time
from collections.abc import Callable

import psutil

from bench.faults.parts import eventually, make_completion, make_lease
from bench.faults.rows import Verdict, row
from bench.faults.runs import SETTINGS, Run, scratch
from bench.faults.soak import Trainer, enter, one_step
from core.config import Config
from core.schema import Source
from rollout.access import Keys
from rollout.frame import _checksum, trainer_codec, worker_codec
from rollout.keys import make_keys, trainer_keys, worker_keys
from rollout.ledger import Ledger
from rollout.messages import Deliver
from rollout.wire import Hub, Link

LIMIT = 0.02
ROUNDS = 20
STEPS = 8  # measured, after two that warm up


def _frames() -> tuple[list[Deliver], int]:
    """The completions of one step of the embedded default, at full length."""
    algorithm = Config().algorithm
    rows = algorithm.prompts_per_step * algorithm.group_size
    lease = make_lease(slots=algorithm.prompts_per_step, samples=algorithm.group_size)
    completions = [
        make_completion(lease, item.slot, sample, tokens=24) for item in lease.items for sample in item.samples
    ]
    delivers = [
        Deliver(seq=number + 1, lease_id=lease.lease_id, purpose="train", completion=completion)
        for number, completion in enumerate(completions)
    ]
    return delivers, rows


def _cpu_s(work: Callable[[], object]) -> float:
    """Least CPU seconds of a call, over all threads of this process."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _transfer_s(delivers: list[Deliver], keys: tuple[Keys, Keys] | None) -> float:
    """CPU seconds of sending a step's completions over loopback, both ends."""
    settings = {"session": 7, "max_frame_bytes": 1 << 24, "heartbeat_s": 10.0, "liveness_s": 60.0}
    hub = Hub("tcp://127.0.0.1:0", keys=keys[0] if keys else None, **settings)  # type: ignore[arg-type]
    link = Link(hub.endpoint, name="w.1", keys=keys[1] if keys else None)
    link.session = 7
    try:
        eventually(lambda: link.send([]), "connected")

        def send() -> None:
            link.send(delivers)
            heard = 0
            while heard < len(delivers):
                heard += sum(len(received.messages) for received in hub.poll(1.0))

        send()
        return _cpu_s(send)
    finally:
        link.close()
        hub.close()


def _step_s() -> float:
    """CPU seconds of a step of the embedded default: trainer, explorer, rollout worker and scorer together."""
    import torch

    from trainer.models import save_model
    from trainer.pretrain import Recipe, build_model, build_tokenizer

    recipe, root = Recipe(), scratch() / "default-models"
    torch.manual_seed(0)
    for name, shape in (("learner", recipe.learner), ("explorer", recipe.explorer)):
        save_model(build_model(shape, recipe), build_tokenizer(recipe.max_positions), root / name)
    kept = {name: value for name, value in SETTINGS.items() if name in ("data.eval", "stream.liveness_s")}
    run = Run("default", learner__model=root / "learner", explorer__model=root / "explorer", algorithm__steps=40)
    run.words = [word for word in run.words if word.partition("=")[0] not in SETTINGS or word.partition("=")[0] in kept]
    run.words += ["algorithm.steps=40", "checkpoint.every=1000"]
    run.start()
    assert run.process is not None
    family = psutil.Process(run.process.pid)

    def cpu_s() -> float:
        every = [family, *family.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in every)

    run.wait_for_step(2)
    begun, before = len(run.lines()), cpu_s()
    run.wait_for_step(begun + STEPS)
    seconds = (cpu_s() - before) / (len(run.lines()) - begun)
    run.kill()
    return seconds


@row("cost", "checksums, dedupe, ledger and CURVE: share of a step of the embedded default")
def cost(seed: int) -> Verdict:
    delivers, rows = _frames()
    frame = bytes(worker_codec(1 << 24).encode(delivers, 7))
    ledger = Ledger()

    def account() -> None:
        for _ in range(rows):
            ledger.insert(Source.EXPLORER)
            ledger.train(Source.EXPLORER, 1)

    keys = scratch() / "cost-keys"
    make_keys(keys)
    plain = _transfer_s(delivers, None)
    parts = {
        "checksums": 2 * _cpu_s(lambda: _checksum(frame)),
        "ledger": _cpu_s(account),
        "leases, dedupe, buffer": _receiving_s() * rows - _cpu_s(lambda: trainer_codec(1 << 24).decode(frame)),
        "CURVE": max(0.0, _transfer_s(delivers, (trainer_keys(keys), worker_keys(keys))) - plain),
    }
    step = _step_s()
    share = sum(parts.values()) / step
    assert share < LIMIT, f"{share:.1%} of a step of {step:.2f} s of CPU: {parts}"
    shown = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in parts.items())
    return Verdict("tolerated", f"{share:.2%} of {step:.2f} s of CPU a step ({rows} completions): {shown}")


def _receiving_s() -> float:
    """CPU seconds for each completion at the trainer's end, decoding included."""
    trainer, name = Trainer(), "cost.1"
    enter(trainer, name)
    seq = one_step(trainer, name, 1, 0)
    start, before = time.process_time(), seq
    seq = one_step(trainer, name, 2, seq)
    return (time.process_time() - start) / (seq - before)
