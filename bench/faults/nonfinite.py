"""Rows about numbers: gradients that are not finite, in both precisions."""

import signal
import time

from bench.faults.rewards import POISON
from bench.faults.rows import Verdict, row
from bench.faults.runs import Run, scratch


def _nonfinite(dtype: str) -> Verdict:
    mark = scratch() / f"poison-{dtype}"
    run = Run(
        f"nonfinite-{dtype}", learner__dtype=dtype, algorithm__advantage_scale="none", algorithm__steps=2000,
        reward__function="bench.faults.rewards:poisoned", learner__max_nonfinite_updates=9, checkpoint__every=5,
    )  # fmt: skip
    run.start(**{POISON: str(mark)})
    run.wait_for_step(3)
    mark.touch()
    start = time.monotonic()
    run.finish(1)
    seconds = time.monotonic() - start
    text, last = run.text(), len(run.lines()) + 1
    file = run.dir / "rollouts" / f"step_{last:06d}.parquet"
    assert "9 updates in a row were skipped" in text, run.tail()
    assert str(file) in text, run.tail()
    assert file.exists(), "the completions of the step it stopped in are not saved"
    skipped = [int(line["fault/skipped_updates"]) for line in run.lines()]
    assert skipped[-1] >= 7, skipped
    assert sorted(skipped) == skipped, skipped
    return Verdict("stopped", f"after 9 skipped updates in a row, counted; completions in {file.name}", seconds)


@row("F18", "non-finite gradients, float32")
def nonfinite_fp32(seed: int) -> Verdict:
    return _nonfinite("float32")


@row("F18b", "non-finite gradients, bfloat16")
def nonfinite_bf16(seed: int) -> Verdict:
    return _nonfinite("bfloat16")


@row("F18c", "non-finite gradients for a while")
def nonfinite_for_a_while(seed: int) -> Verdict:
    mark = scratch() / "poison-briefly"
    run = Run(
        "nonfinite-briefly", algorithm__advantage_scale="none", reward__function="bench.faults.rewards:poisoned",
        learner__max_nonfinite_updates=1000, algorithm__steps=2000,
    )  # fmt: skip
    run.start(**{POISON: str(mark)})
    run.wait_for_step(2)
    mark.touch()
    run.wait_for("updates are skipped", lambda: run.lines()[-1]["fault/skipped_updates"] >= 4)
    mark.unlink()
    run.wait_for_step(len(run.lines()) + 10)
    run.signal(signal.SIGTERM)
    run.finish(143)
    lines = run.lines()
    assert lines[-1]["fault/skipped_updates"] == lines[-2]["fault/skipped_updates"] >= 4, "it went on skipping"
    assert lines[-1]["loss"] is not None, "the loss stayed non-finite"
    assert run.ledger()["conserved"], run.ledger()
    return Verdict(
        "tolerated", f"{lines[-1]['fault/skipped_updates']:.0f} updates skipped and counted, then it trained on"
    )
