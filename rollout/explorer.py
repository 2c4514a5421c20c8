"""One more explorer: `python -m rollout.explorer --connect ENDPOINT`, from any machine, while a run goes on."""

import sys

from rollout.worker import main

if __name__ == "__main__":
    sys.exit(main(role="explorer"))
