"""One more explorer, from any machine, while a run goes on: `python -m rollout.explorer --connect ENDPOINT`.

Or with no learner running, to fill a store that runs read: `python -m rollout.explorer --record STORE …`.
"""

import sys

from core.standard_streams import keep_going

if __name__ == "__main__":
    keep_going()
    if "--record" in sys.argv:
        from rollout.record import main as record

        sys.exit(record(sys.argv[1:]))
    from rollout.worker import main

    sys.exit(main(role="explorer"))
