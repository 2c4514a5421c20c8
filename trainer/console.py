"""What the person at the terminal sees: a live line where there is one, plain lines where there is none."""

import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import rich.console
from rich.live import Live
from rich.text import Text

from core.config import Config
from core.metrics import is_evaluation
from trainer.wording import LOSS_NOTE, evaluation_text, fault_texts, flat_text, step_text, summary

SHOW_WAIT_AFTER_S = 2.0
PRINT_WAIT_AFTER_S = 15.0
PRINTED_STEPS = 200
# Of DeepSpeed, in every run: that there is no GPU, and that it does not know our AdamW.
NOISE = ("Setting accelerator to CPU", "using ZeRO with an untested optimizer")


class Console:
    """Shows a run's progress on rank 0, and nothing on the others.

    On a terminal one line at the bottom is redrawn in place and events scroll above it. Elsewhere each step is a line
    (at most 200 of them in a run), a wait is a line after 15 s and after each doubling. `history` holds the metrics
    lines of a run that is resumed.

    Example: with Console(config) as console: console.step({"step": 1, "reward": 0.3, ...})
    """

    def __init__(self, config: Config, stream: TextIO | None = None, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._steps = config.algorithm.steps
        self._enabled = os.environ.get("RANK", "0") == "0"
        logging.getLogger("DeepSpeed").addFilter(_no_noise)  # transformers imports it when it first saves a model
        stream = stream or sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Latin-1 terminal shows "?" for α; it does not end the run
        self._terminal = rich.console.Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._live: Live | None = None
        self._status, self._wait = "", ""
        self._printed_quarter, self._printed_wait_s = 0, 0.0
        self._step_times: deque[float] = deque(maxlen=20)
        trained = [line for line in history if not is_evaluation(line)]
        self._trained: Mapping[str, Any] = trained[-1] if trained else {}  # the last step's line
        self._flat_steps = 0
        self._resumed = bool(history)
        self._evaluations = [line for line in history if is_evaluation(line)]
        self._noted_loss = False
        self._started_s = time.monotonic()

    def __enter__(self) -> "Console":
        if self._enabled and self._terminal.is_terminal and not self._terminal.is_dumb_terminal:
            self._live = Live(get_renderable=self._line, console=self._terminal, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._enabled:
            self._terminal.print(text)
            self._terminal.file.flush()

    def warn(self, text: str) -> None:
        """Print a warning that stays."""
        if self._enabled:
            self._terminal.print(Text(f"warning: {text}", style="yellow"))
            self._terminal.file.flush()

    def phase(self, text: str) -> None:
        """Begin something that comes before training, such as "starting 1 explorer"."""
        self._status, self._wait, self._printed_quarter, self._printed_wait_s = text, "", 0, 0.0
        self.say(text)

    def progress(self, text: str, done: int, total: int, note: str = "") -> None:
        """Say how far a phase is; without a terminal, at each quarter."""
        self._status = f"{text}  {_bar(done, total)} {done}/{total}  {note}"
        quarter = 4 * done // total
        if self._live is None and quarter > self._printed_quarter:
            self.say(f"{text}: {done}/{total}  {note}".rstrip())
        self._printed_quarter = quarter

    def waiting(self, what: str, seconds: float) -> None:
        """Called again and again while something is waited for: what, and for how long already."""
        self._wait = f"waiting for {what} ({seconds:.0f} s)" if seconds >= SHOW_WAIT_AFTER_S else ""
        if seconds < self._printed_wait_s:
            self._printed_wait_s = 0.0
        if self._live is None and seconds >= max(PRINT_WAIT_AFTER_S, 2 * self._printed_wait_s):
            self._printed_wait_s = seconds
            self.say(self._wait)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a training step from its metrics line."""
        step = metrics["step"]
        self._step_times.append(metrics.get("step_time") or 0.0)
        self._wait, self._printed_wait_s = "", 0.0
        text = step_text(metrics, self._steps, self._eta_s(step))
        self._status = f"{_bar(step, self._steps)} {step_text(metrics, self._steps, self._eta_s(step), brief=True)}"
        stride = -(-self._steps // PRINTED_STEPS)
        if self._live is None and (step % stride == 0 or step in (1, self._steps)):
            self.say(text)
        self._note(metrics)

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Show held-out results from their metrics line."""
        self._evaluations.append(metrics)
        when = f"after step {metrics['step']}" if metrics["step"] else "before training"
        self.say(f"evaluation {when}: {evaluation_text(self._evaluations)}")

    def finish(self, lines: Sequence[Mapping[str, Any]], *, report: Path, model: Path) -> None:
        """Print the summary of a run from its metrics lines."""
        self._status, self._wait = "", ""
        for text in summary(lines, self._config, time.monotonic() - self._started_s, resumed=self._resumed):
            self.say(text)
        self.say(f"report: {report}")
        self.say(f"model:  {model}")

    def _line(self) -> Text:
        parts = [part for part in (self._status, self._wait) if part]
        return Text("\n".join(parts), no_wrap=True, overflow="ellipsis")

    def _eta_s(self, step: int) -> float:
        """Mean of the last steps, without the first one, which warms up."""
        times = list(self._step_times)
        times = times[1:] if step == len(times) > 1 else times
        return sum(times) / len(times) * (self._steps - step)

    def _note(self, metrics: Mapping[str, Any]) -> None:
        loss = metrics.get("loss")  # None where every update was skipped
        if not self._noted_loss and loss is not None and abs(loss) < 0.01:
            self.say(f"note: {LOSS_NOTE}")
        self._noted_loss = True
        self._flat_steps = self._flat_steps + 1 if metrics.get("frac_reward_zero_std") == 1 else 0
        if self._flat_steps in (1, 10, 100, 1000):
            self.warn(flat_text(metrics, self._flat_steps))
        for text in fault_texts(metrics, self._trained):
            self.warn(text)
        self._trained = metrics


def _no_noise(record: logging.LogRecord) -> bool:
    """Whether to show what DeepSpeed has to say, on standard output and in the middle of our lines."""
    return not any(noise in record.getMessage() for noise in NOISE)


def _bar(done: int, total: int, width: int = 10) -> str:
    filled = width * done // max(total, 1)
    return "━" * filled + "╌" * (width - filled)
