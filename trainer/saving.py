"""When a run saves itself: a full disk costs a checkpoint, not the run."""

import errno
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint import Part, write_checkpoint
from trainer.learner import Learner
from trainer.record import Recorder
from trainer.stream import Rollouts

WRITTEN = b"written"  # what rank 0 says of a checkpoint that is


class Saver:
    """Checkpoints of everything a resumed run needs, with a Hugging Face directory inside.

    A collective. `rollouts` and `recorder` are None on all ranks but 0, which take part in gathering what 0 writes.
    `failed`: checkpoints that the disk had no room for.
    """

    def __init__(
        self, root: Path, learner: Learner, rollouts: Rollouts | None, recorder: Recorder | None, *, keep: int
    ) -> None:
        self.root, self.learner, self.rollouts, self.recorder, self.keep = root, learner, rollouts, recorder, keep
        self.saved_step = learner.step
        self.failed = 0

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, unless it is written. A disk that is full is said, and no error."""
        if step == self.saved_step:
            return
        written = WRITTEN if self.learner.world.is_main else None  # a replay has nothing to write
        if self.rollouts is None or self.recorder is None:
            self.learner.save_model(None)
            self.learner.save_state(None)
        else:
            with self.recorder.stage("checkpoint", step):
                written = self._write(step, self.rollouts, self.recorder)
            self.recorder.ledger(self.rollouts.report())
        if self.learner.world.broadcast_bytes(written) == WRITTEN:
            self.saved_step = step

    def _write(self, step: int, rollouts: Rollouts, recorder: Recorder) -> bytes:
        begun: set[str] = set()

        def noted(name: str, part: Part) -> Part:
            def write(directory: Path) -> None:
                begun.add(name)
                part(directory)

            return write

        collectives: dict[str, Callable[[Path | None], None]] = {
            "model": self.learner.save_model,
            "optimizer": lambda directory: self.learner.save_state(directory and directory / "trainer"),
        }
        parts = collectives | {"rollouts": lambda directory: rollouts.save(directory / "trainer")}
        noting = {name: noted(name, part) for name, part in parts.items()}
        try:
            write_checkpoint(
                self.root, step, noting, keep=self.keep, previous=self.saved_step, log=recorder.console.warn
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            for name in [
                name for name in collectives if name not in begun
            ]:  # the other ranks wait there, in this order
                collectives[name](None)
            self.failed += 1
            recorder.console.warn(
                f"NO CHECKPOINT of step {step} ({self.failed} failed so far): {error.strerror}. "
                "Training goes on; the next one is due as planned"
            )
            return b""
        return WRITTEN
