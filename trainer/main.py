"""Entry point: torchrun trainer/main.py [configs/NAME.toml] [section.key=value …] [--dry-run] [--resume] [--clean]."""

import sys
from pathlib import Path

# The repository comes first on the import path: not trainer/ (as a script), not site-packages (with -m).
sys.path[0] = str(Path(__file__).resolve().parents[1])

from core.standard_streams import keep_going
from trainer.command import main

if __name__ == "__main__":
    keep_going()
    sys.exit(main(sys.argv[1:]))
