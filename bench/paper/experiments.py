"""The paper's claims as data: what it says, which runs test it, and which paired difference decides.

Settings in braces are filled in by the scale (bench/paper/scale.py): T_mix as half or 5/16 of the steps, the step of an
abrupt switch of equal samples, and directories of models and recorded completions.
"""

from typing import Literal, NamedTuple

from bench.paper.intervals import Rule

Statistic = Literal["final", "early", "curve", "regress", "pass8", "ood", "matched"]
STATISTICS: dict[Statistic, str] = {
    "final": "final pass@1",
    "early": "pass@1 at a quarter of the steps",
    "curve": "pass@1 over the curve",
    "regress": "final pass@1 less the best before",
    "pass8": "final pass@8",
    "ood": "final pass@1 out of domain",
    "matched": "pass@1 at equal FLOPs",
}


class Arm(NamedTuple):
    """A kind of run. `tuned` names the search whose winner it takes; `main` arms run with all seeds.

    Example: Arm("grpo", "GRPO", "grpo", overrides=("algorithm.anneal_steps=0",), main=True)
    """

    name: str
    label: str
    tuned: str
    setting: str = "main"
    overrides: tuple[str, ...] = ()
    main: bool = False


class Comparison(NamedTuple):
    """arm − control in one statistic. Without `rule` it is a control: shown, and part of no verdict.

    Example: Comparison("s2l", "grpo", "final", "greater")
    """

    arm: str
    control: str
    statistic: Statistic = "final"
    rule: Rule | None = None


class Experiment(NamedTuple):
    """One claim of the paper. `paper` is what it says, with its numbers.

    Example: Experiment("fig6", "Abrupt switch", "Progressive beats abrupt.", (Comparison("abrupt", "s2l"),))
    """

    key: str
    title: str
    paper: str
    comparisons: tuple[Comparison, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm it needs, once each, in order."""
        return tuple(dict.fromkeys(name for one in self.comparisons for name in (one.arm, one.control)))


MIX = "algorithm.anneal_steps={half}"
GRPO = "algorithm.anneal_steps=0"


def _correction(anchor: str, weight: str) -> tuple[str, ...]:
    return (MIX, f"correction.explorer.anchor={anchor}", f"correction.explorer.weight={weight}")


_WEIGHTS = {
    "none": "anchor learner, no weight",
    "token_tis": "anchor learner, token TIS",
    "icepop": "anchor learner, IcePop",
    "sequence_tis": "anchor learner, sequence TIS",
    "geometric_mask": "anchor learner, geometric mask",
    "mixture": "anchor learner, mixture",
    "luffy": "anchor learner, LUFFY",
    "topr": "anchor learner, TOPR",
}
CORRECTION_ARMS = (
    *(
        Arm(f"weight_{weight}", label, "s2l", overrides=_correction("learner", weight))
        for weight, label in _WEIGHTS.items()
    ),
    Arm("drop_negatives", "anchor sampler, A < 0 dropped", "s2l",
        overrides=(MIX, "correction.explorer_negatives=drop")),
    Arm("source_baseline", "anchor sampler, own baseline", "s2l", overrides=(MIX, "algorithm.baseline=source")),
    Arm("authors_code", "authors' code", "s2l",
        overrides=(MIX, "algorithm.mixing=authors_code", "correction.explorer.anchor=learner",
                   "correction.learner.weight=none", "loss.kl_rows=all")),
    Arm("rescue", "rescue", "grpo", overrides=(MIX, "algorithm.mixing=rescue", "algorithm.rescue_quota=2")),
)  # fmt: skip

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("grpo", "GRPO", "grpo", overrides=(GRPO,), main=True),
        Arm("s2l", "S2L-PO", "s2l", overrides=(MIX,), main=True),
        Arm("self", "learner as explorer", "s2l", overrides=(MIX, "explorer.model={learner}"), main=True),
        Arm("grpo_hot", "GRPO, T 1.5", "grpo_hot", overrides=(GRPO, "rollout.temperature=1.5")),
        Arm("s2l_hot", "S2L-PO, learner T 1.5", "s2l_hot", overrides=(MIX, "rollout.temperature=1.5")),
        Arm("s2l_other", "S2L-PO, other explorer size", "s2l", "other_size", (MIX,)),
        Arm("grpo_family2", "GRPO, second family", "grpo", "family2", (GRPO,)),
        Arm("s2l_family2", "S2L-PO, second family", "s2l", "family2", (MIX,)),
        Arm("filtered", "S2L-PO without diversity", "s2l", overrides=(MIX, "explorer.store={filtered}")),
        Arm("small_only", "small-only", "s2l", overrides=("algorithm.schedule=constant", "algorithm.alpha=1")),
        Arm("abrupt", "abrupt switch at T_mix", "s2l", overrides=(MIX, "algorithm.schedule=abrupt")),
        Arm("abrupt_equal", "abrupt switch, equal explorer samples", "s2l",
            overrides=("algorithm.anneal_steps={equal}", "algorithm.schedule=abrupt")),
        Arm("short", "T_mix 5/16 of T", "s2l", overrides=("algorithm.anneal_steps={short}",)),
        Arm("grpo_more", "GRPO, samples of rescue", "grpo", overrides=(GRPO, "{more_prompts}")),
        Arm("grpo_hard", "GRPO, hard prompts", "grpo", "hard", (GRPO,)),
        Arm("s2l_hard", "S2L-PO, hard prompts", "s2l", "hard", (MIX,)),
        Arm("self_hard", "learner as explorer, hard prompts", "s2l", "hard", (MIX, "explorer.model={learner}")),
        Arm("rescue_hard", "rescue, hard prompts", "grpo", "hard",
            (MIX, "algorithm.mixing=rescue", "algorithm.rescue_quota=2")),
        # Another machine or version draws other bits: these controls ran beside the drivers, not with the main arms.
        Arm("s2l_beside", "S2L-PO, run beside", "s2l", overrides=(MIX,)),
        Arm("grpo_beside", "GRPO, run beside", "grpo", overrides=(GRPO,)),
        Arm("driver_ess", "α driven by ESS", "s2l",
            overrides=(MIX, "algorithm.driver=ess", "explorer.ahead_steps=1")),
        Arm("driver_zero", "α driven by dead groups", "s2l",
            overrides=(MIX, "algorithm.driver=zero_variance", "explorer.ahead_steps=1")),
        *CORRECTION_ARMS,
    )
}  # fmt: skip

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "table1", "Table 1: S2L-PO against GRPO",
        "S2L-PO beats GRPO in every family and size: +8.8 / +10.4 / +4.2 / +1.7 points (AIME24, AIME25, MATH-500, "
        "OlympiadBench; Qwen3 1.7B→8B), +6.4 / +1.7 / +4.0 / +3.0 (4B→14B), +4.5 / +3.4 / +4.0 / +1.2 (InternLM2.5).",
        (
            Comparison("s2l", "grpo", "final", "greater"),
            Comparison("s2l_other", "grpo", "final", "greater"),
            Comparison("s2l_family2", "grpo_family2", "final", "greater"),
            Comparison("s2l", "grpo", "curve"),
            Comparison("s2l", "self"),
            Comparison("self", "grpo"),
            Comparison("s2l_hot", "grpo_hot"),
            Comparison("s2l", "grpo", "pass8"),
            Comparison("s2l", "self", "pass8"),
        ),
    ),
    Experiment(
        "table2", "Table 2: out of domain",
        "Trained on mathematics, S2L-PO matches or passes GRPO on CommonsenseQA: 64.2 and 67.8 against 63.9 (8B), "
        "70.7 against 67.2 (14B).",
        (Comparison("s2l", "grpo", "ood", "not_less"), Comparison("self", "grpo", "ood")),
    ),
    Experiment(
        "table3", "Table 3 and Figure 2: smaller is more diverse",
        "Self-BLEU falls, edit diversity and unique answers rise as models get smaller (unique answers .476 at 14B, "
        ".576 at 1.7B), and the smaller model's pass@k catches up: 4B passes 8B from k = 32 on.",
    ),
    Experiment(
        "table4", "Table 4: the gain is the diversity",
        "With the explorer's rollouts filtered to the learner's diversity, S2L-PO falls back to GRPO: 14.7 / 12.0 "
        "against 15.0 / 12.1, with diversity 23.8 / 22.5 (AIME24 / AIME25).",
        (
            Comparison("s2l", "filtered", "final", "greater"),
            Comparison("filtered", "grpo", "final", "equal"),
        ),
    ),
    Experiment(
        "fig3c", "Figure 3c: temperature 1.5 instead",
        "GRPO at temperature 1.5 is unstable and regresses to a significantly lower pass@1; S2L-PO is better.",
        (
            Comparison("grpo_hot", "grpo", "final", "less"),
            Comparison("s2l", "grpo_hot", "final", "greater"),
            Comparison("s2l_hot", "grpo_hot"),
        ),
    ),
    Experiment(
        "fig5", "Figure 5: small-only",
        "Explorer rollouts alone first outpace GRPO, then plateau and regress, and end below progressive annealing.",
        (
            Comparison("small_only", "s2l", "final", "less"),
            Comparison("small_only", "grpo", "early", "greater"),
            Comparison("small_only", "grpo"),
            Comparison("small_only", "s2l", "regress"),
        ),
    ),
    Experiment(
        "fig6", "Figure 6: abrupt switch",
        "Progressive annealing is strictly better than an abrupt switch from explorer to learner.",
        (
            Comparison("abrupt", "s2l", "final", "less"),
            Comparison("abrupt_equal", "s2l"),
            Comparison("abrupt", "s2l", "curve"),
        ),
    ),
    Experiment(
        "fig7", "Figure 7: length of the transition",
        "A transition over 5 of 16 steps has a lower ceiling than one over 8 of 16.",
        (Comparison("short", "s2l", "final", "less"), Comparison("short", "grpo")),
    ),
    Experiment(
        "compute", "Compute",
        "A smaller explorer reduces rollout and total training FLOPs, with better results.",
        (Comparison("s2l", "grpo", "matched", "greater"),),
    ),
    Experiment(
        "corrections", "Which correction for explorer rows",
        "Nothing: eq. 2 divides by the sampler's probability (S2L-PO here), the released code by the learner's.",
        (
            *(Comparison(arm.name, "s2l") for arm in CORRECTION_ARMS),
            Comparison("rescue", "grpo"),
            Comparison("rescue", "grpo_more"),
        ),
    ),
    Experiment(
        "regime", "Where the premise should bite: hard prompts",
        "The explorer helps where the learner's groups have no signal: early mode collapse, vanishing advantages.",
        (
            Comparison("s2l_hard", "grpo_hard", "final", "greater"),
            Comparison("s2l_hard", "self_hard"),
            Comparison("rescue_hard", "grpo_hard"),
            Comparison("s2l_hard", "grpo_hard", "curve"),
        ),
    ),
    Experiment(
        "driver", "Annealing by a measurement instead of the clock",
        "Nothing: α falls by the clock. Here the ESS of explorer rows, or the share of dead groups, moves it.",
        (
            Comparison("driver_ess", "s2l_beside"),
            Comparison("driver_zero", "s2l_beside"),
            Comparison("driver_ess", "grpo_beside"),
            Comparison("driver_zero", "grpo_beside"),
            Comparison("driver_ess", "s2l_beside", "curve"),
            Comparison("driver_zero", "s2l_beside", "curve"),
        ),
    ),
)  # fmt: skip


def find(keys: list[str]) -> tuple[Experiment, ...]:
    """The experiments of these keys, all for none; ValueError for a key that there is not."""
    known = {experiment.key: experiment for experiment in EXPERIMENTS}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: there is no such experiment; use one of {', '.join(known)}")
    return tuple(known[key] for key in keys) if keys else EXPERIMENTS
