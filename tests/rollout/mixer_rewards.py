"""A reward for test_mixer: its completions say who they are, and the prompt says which of them cannot be scored."""

import time


def by_name(completions, fail, **columns):
    if fail[0] == "slow":
        time.sleep(0.1)
    source, sample = completions[0].split()
    if f"{source}:{sample}" in fail[0].split():
        raise RuntimeError("as the prompt wants it")
    return [float(int(sample) % 2)]
