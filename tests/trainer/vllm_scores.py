"""What vLLM draws from model directories, for tests in whose process vLLM must not be.

vllm_scores.py DIRECTORY ...        prints {directory: [[token ids, log-probs], ...]}, a pair per prompt of PROMPTS
"""

import json
import sys
from pathlib import Path

from core.schema import Sampling
from rollout.engine import Request
from rollout.vllm_engine import VllmEngine

PROMPTS = ((5, 9, 12, 3), (7,), (2, 4, 6, 8, 10, 12, 14))
SAMPLING = Sampling(temperature=1.0, max_tokens=16, stop_token_ids=(1,))


def draw(directory: Path) -> list[tuple[list[int], list[float]]]:
    engine = VllmEngine(directory, device="cpu", dtype="float32", cpu_cache_bytes=64 << 20)
    requests = [Request(prompt, (seed,)) for seed, prompt in enumerate(PROMPTS, start=1)]
    drawn = {
        row.request: (row.token_ids.tolist(), row.logprobs.tolist()) for row in engine.generate(requests, SAMPLING)
    }
    engine.close()
    return [drawn[index] for index in range(len(PROMPTS))]


if __name__ == "__main__":
    print("\n" + json.dumps({name: draw(Path(name)) for name in sys.argv[1:]}))
