"""What a run writes down while it goes (rank 0): metrics, rollouts, trace, ledger, report."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from core.anneal import Quota
from core.config import Config
from core.metrics import RunLog, is_evaluation, read_metrics
from core.schema import Group, ScoredCompletion
from core.whole_file import whole_file
from rollout.store import cut_rollouts, write_rollouts
from trainer.console import Console
from trainer.report import LiveReport
from trainer.step_metrics import diversity_metrics, group_metrics
from trainer.timeline import PROCESS, Part, Spans, trace_leases, trace_step, wait_shares
from trainer.tracer import Tracer
from trainer.trackers import Trackers


class Recorder:
    """Files of a run directory, and the console beside them. `resume_step` cuts back what a killed run wrote later.

    The report is renewed at evaluations and checkpoints, and written whatever ends the run. Raises ValueError where
    something of `run.log_to` does not start.
    """

    def __init__(self, path: Path, console: Console, resume_step: int | None, config: Config) -> None:
        self.path, self.console = path, console
        self._diversity_every = config.evaluation.diversity_every
        self._limit = config.rollout.max_response_tokens  # longer answers, of explorers, are cut to it
        self._trackers = Trackers(path, config, resume_step, console.warn)
        self.log = RunLog(path, resume_step=resume_step)
        if resume_step is not None:
            cut_rollouts(path, resume_step)
        self.tracer = Tracer(path, resume=resume_step is not None)
        self._total_tokens = 0
        if resume_step:
            steps = [line for line in read_metrics(path) if not is_evaluation(line)]
            self._total_tokens = steps[-1]["num_tokens"]
        self._began_s = time.monotonic()
        self._concluded, self._report = False, LiveReport(path, console.warn)
        self._report.write()
        console.say(f"report: {self._report.path}, renewed at evaluations and checkpoints")

    def begin(self) -> None:
        """The clock of the next step starts."""
        self._began_s = time.monotonic()

    def step(
        self,
        step: int,
        parts: Sequence[Part],
        quota: Quota,
        metrics: Mapping[str, float],
        ranks: Sequence[Spans],
    ) -> dict[str, Any]:
        """A step trained: its line, which is returned as it was written, its rows and the spans of each rank."""
        groups = [group for part in parts for group in part.groups]
        seconds = time.monotonic() - self._began_s
        tokens = sum(min(row.completion.num_tokens, self._limit) for group in groups for row in group.rows)
        self._total_tokens += tokens
        throughput = {"step_time": seconds, "num_tokens": self._total_tokens, "tokens_per_second": tokens / seconds}
        waited = wait_shares(parts)
        spread = self._diversity(step, groups)
        line = {
            "step": step,
            **group_metrics(groups, quota, step, limit=self._limit),
            **spread,
            **metrics,
            **waited,
            **throughput,
        }
        written = self.log.write(line)
        self.console.step(written)
        self._trackers.log(written)
        write_rollouts(self.path, step, groups)
        trace_step(self.tracer, step, parts, ranks)
        return written

    def _diversity(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        if not self._diversity_every:
            return {}
        began_s = time.monotonic()
        found = diversity_metrics(groups, self_bleu=(step - 1) % self._diversity_every == 0)
        return {**found, "time/diversity": time.monotonic() - began_s}

    def evaluation(self, step: int, rows: Sequence[Sequence[ScoredCompletion]], metrics: Mapping[str, float]) -> None:
        """Held-out completions after `step`, and what they measure."""
        trace_leases(self.tracer, f"evaluation after step {step}", chain.from_iterable(rows), {"step": step})
        written = self.log.write({"step": step, **metrics})
        self.console.evaluation(written)
        self._trackers.log(written)
        self._report.refresh()

    @contextmanager
    def stage(self, name: str, step: int) -> Iterator[None]:
        """Note in the trace how long something between two steps took."""
        start_s = time.monotonic()
        yield
        self.tracer.add(PROCESS, name, name, start_s, time.monotonic(), {"step": step})

    def ledger(self, report: Mapping[str, Any]) -> None:
        """The accounts at a checkpoint, and a loud line where they do not add up."""
        with whole_file(self.path / "ledger.json") as partial:
            partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
        if not report["conserved"]:
            self.console.warn("the ledger does not add up: completions were lost or counted twice; see ledger.json")
        self._report.refresh()

    def conclude(self) -> None:
        """The report, and the console's last words."""
        self.tracer.flush()
        self._report.write()
        self._concluded = True
        self.console.finish(read_metrics(self.path), report=self._report.path, model=self.path / "model")

    def close(self) -> None:
        """Close the files. Of a run that was stopped or failed, this is when its report is written."""
        if not self._concluded:
            self._report.write()
            self.console.say(f"report: {self._report.path}")
        self.tracer.close()
        self.log.close()
        self._trackers.close(done=self._concluded)
