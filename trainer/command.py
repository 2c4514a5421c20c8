"""`torchrun trainer/main.py …`: parse, say what is wrong in a line, or train."""

import gc
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from core.configfile import Command, ConfigError, parse_command
from core.confighelp import help_text
from trainer.signals import SIGNALS, Stopped

OK, FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated."""
    SIGNALS.install()
    try:
        command = parse_command(arguments)
        if command.help:
            print(help_text(words=command.words))
            return OK
        return run(command)
    except ConfigError as error:
        return complain(str(error), BAD_INPUT)
    except Stopped as stopped:
        return complain(f"stopped by {stopped.name}; continue with --resume", stopped.exit_code)


def run(command: Command) -> int:
    """Train, or say what would be trained. Ends that have a name are a line, not a stack trace."""
    # Imported late: torch and transformers take seconds, a typo should not. Imports leave no garbage: a fifth faster.
    gc.disable()
    from rollout.mixer import NothingToTrain
    from rollout.patience import Starved
    from rollout.pool import WorkersLost
    from trainer.dry_run import dry_run
    from trainer.learner import NonFiniteUpdatesError
    from trainer.loop import train

    gc.enable()
    if command.dry_run:
        for line in dry_run(command):
            print(line)
        return OK
    try:
        train(command)
    except (NothingToTrain, Starved, WorkersLost, NonFiniteUpdatesError) as error:
        saved = any((Path(command.config.run.dir) / "checkpoints").glob("step_*"))
        return complain(f"{error}{' (--resume continues from the last checkpoint)' if saved else ''}", FAILED)
    return OK


def complain(text: str, code: int) -> int:
    """One message on the error stream from one rank, and once more in torchrun's own summary below its stack trace."""
    if os.environ.get("RANK", "0") == "0":
        print(f"s2l-po: {text}", file=sys.stderr, flush=True)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        detail = {"py_callstack": text, "timestamp": datetime.now().strftime("%s")}
        Path(error_file).write_text(json.dumps({"message": {"message": text, "extraInfo": detail}}))
    return code
