"""Sentences made of metrics, for the console and the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config
from core.metrics import CORRECT_ABOVE, is_evaluation
from trainer.diagnosis import diagnosis

LOSS_NOTE = "the loss starts near 0 by construction (ratios near 1, advantages that sum to 0): watch reward and pass@1"
FAULTS = {  # running total → what it counts; metrics below it are its parts, by reason
    "fault/dropped": "completions dropped",
    "fault/rejected": "deliveries rejected",
    "fault/skipped_updates": "optimizer updates skipped for a non-finite gradient",
}


def step_text(metrics: Mapping[str, Any], steps: int, eta_s: float, *, brief: bool = False) -> str:
    """One training step in one line; `brief` fits 80 columns beside a bar."""
    parts = [f"step {metrics['step']}/{steps}", f"reward {number_text(metrics.get('reward'))}"]
    parts.append(
        f"α {metrics['mix/alpha']:.2f} = {metrics['mix/explorer_quota']:.0f}+{metrics['mix/learner_quota']:.0f}"
    )
    parts += [f"{name} {number_text(metrics[name])}" for name in ("kl", "entropy") if name in metrics and not brief]
    parts.append(f"{metrics.get('tokens_per_second') or 0:,.0f} tok/s")
    if not brief:
        parts.append(f"{metrics.get('step_time') or 0:.2f} s")
    return "  ".join([*parts, f"ETA {duration_text(eta_s)}" if metrics["step"] < steps else "done"])


def fault_texts(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What went wrong since the line `before`, by reason: `step 7: 3 completions dropped (2 reward_raised, …)`."""
    grown = {
        name: count - (before.get(name) or 0)
        for name, count in metrics.items()
        if name.startswith("fault/") and count and count > (before.get(name) or 0)
    }
    texts = []
    for name, meaning in FAULTS.items():
        if name in grown:
            parts = [key for key in grown if key.startswith(f"{name}/")]
            reasons = [f"{grown[key]:.0f} {key.rpartition('/')[2]}" for key in parts]
            log = "; why rewards failed: logs/reward.log" if any(" reward_" in reason for reason in reasons) else ""
            why = f" ({', '.join(reasons)}{log})" if reasons else ""
            texts.append(f"step {metrics['step']}: {grown[name]:.0f} {meaning}{why}")
    return texts


def flat_text(metrics: Mapping[str, Any], flat_steps: int) -> str:
    """What it means that no group has a mixed reward."""
    fail, succeed = metrics.get("groups/all_fail") or 0.0, metrics.get("groups/all_pass") or 0.0
    cause = (
        "the prompts are too hard, or the reward does not read the answers" if fail >= succeed else "they are too easy"
    )
    return (
        f"step {metrics['step']}: every group's rewards are equal ({fail:.0%} all fail, {succeed:.0%} all pass), so "
        f"nothing is learned{f' for {flat_steps} steps now' if flat_steps > 1 else ''}: {cause}. Look at rollouts/"
    )


def summary(lines: Sequence[Mapping[str, Any]], config: Config, seconds: float, *, resumed: bool = False) -> list[str]:
    """From what to what the evaluations went, at what cost, and what the time went to.

    `seconds`: since this start of the run.
    """
    evaluations = [line for line in lines if is_evaluation(line)]
    training = [line for line in lines if not is_evaluation(line)]
    texts = headline_texts(evaluations, config)
    if training:
        tokens, start = training[-1].get("num_tokens") or 0, " in this start" if resumed else ""
        texts.append(f"{len(training)} steps, {tokens:,.0f} tokens trained, {duration_text(seconds)}{start}")
        texts += diagnosis(training, config)
    return texts


def headline_texts(evaluations: Sequence[Mapping[str, Any]], config: Config) -> list[str]:
    """From what to what the evaluations went, in a line; none where nothing was evaluated."""
    scored = [line for line in evaluations if pass_at_keys(line)]
    if not scored:
        return []
    first, last = scored[0], scored[-1]
    problems = last.get("eval/problems") or config.evaluation.problems
    size = f"{problems:.0f} problems x {config.evaluation.samples}" if problems else f"x {config.evaluation.samples}"
    gains = [
        f"{name} {percent_text(first[key])} → {percent_text(last[key])}"
        for name, key in pass_at_keys(last)
        if key in first
    ]
    if is_graded(scored):
        reward = f"{number_text(first.get('eval/reward'))} → {number_text(last.get('eval/reward'))}"
        return [f"reward {reward} (mean, {size}); above {CORRECT_ABOVE:g}: {', '.join(gains)}{failed_text(last)}"]
    if not gains:
        return []
    head, _, values = gains[0].partition(" ")
    return [", ".join([f"accuracy {values} ({head}, {size})", *gains[1:]]) + failed_text(last)]


def evaluation_text(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The last of a run's evaluations so far, and how far it is from the first.

    `pass@1 41.2 %, pass@8 78.1 %, +8.1 points since the start`; with graded rewards
    `reward 2.310, -0.380 since the start; above 0.5: pass@1 93.8 %, pass@8 100.0 %`
    """
    last = evaluations[-1]
    names = pass_at_keys(last)
    if not names:
        return "no completion got a reward"
    graded = is_graded(evaluations)
    key = "eval/reward" if graded else names[0][1]
    known = [line[key] for line in evaluations if line.get(key) is not None]
    gain = ""
    if len(known) > 1 and last.get(key) is not None:
        change = known[-1] - known[0]
        gain = f", {change:+.3f} since the start" if graded else f", {100 * change:+.1f} points since the start"
    scores = ", ".join(f"{name} {percent_text(last[key])}" for name, key in names)
    if graded:
        return f"reward {number_text(last.get(key))}{gain}; above {CORRECT_ABOVE:g}: {scores}{failed_text(last)}"
    return scores + gain + failed_text(last)


def failed_text(evaluation: Mapping[str, Any]) -> str:
    """How many of an evaluation's completions have no reward; empty for none."""
    share = evaluation.get("eval/failed_ratio")
    return f"; {percent_text(share)} without a reward (it failed), counted as wrong" if share else ""


def is_graded(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rewards are more than right and wrong, so that their mean says what pass@k does not."""
    return any(line.get("eval/graded_ratio") for line in evaluations)


def duration_text(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def pass_at_keys(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and metric of the smallest and the largest k that were evaluated; none where no completion got a reward."""
    keys = sorted((key for key in metrics if key.startswith("eval/pass@")), key=lambda key: int(key.rpartition("@")[2]))
    return [(key.removeprefix("eval/"), key) for key in dict.fromkeys([*keys[:1], *keys[-1:]])]


def percent_text(share: float | None) -> str:
    """`41.2 %`"""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def number_text(value: float | None) -> str:
    """Three decimals; metrics.jsonl has null where a value was not finite."""
    return "not finite" if value is None else f"{value:.3f}"
