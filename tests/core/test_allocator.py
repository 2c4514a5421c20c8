import os
import subprocess
import sys

# Page faults of a loop that allocates ten pieces of 8 MB and frees them, the settings made or not.
LOOP = """
import resource, sys
from core.allocator import keep_freed_memory

size = 8 << 20
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(2):
    [b"x" * size for _ in range(10)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    [b"x" * size for _ in range(10)]
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(word: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", LOOP, word]
    kept, count = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return kept, int(count)


def test_freed_memory_is_not_given_back_to_the_kernel():
    kept, few = _faults("keep")
    _, many = _faults("leave")
    assert kept == "True"
    assert few < 100 < many
