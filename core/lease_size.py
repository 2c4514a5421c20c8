"""How many completions one lease can have: what an engine generates at once, and what a worker's credit must cover."""

from typing import NamedTuple

from core.anneal import all_quotas
from core.config import Config


class LeaseRows(NamedTuple):
    """The most completions of a lease, by what it is for. A replacement is one.

    Example: LeaseRows(explorer=256, learner=256, evaluation=256)
    """

    explorer: int
    learner: int
    evaluation: int


def lease_rows(config: Config) -> LeaseRows:
    """The largest lease of each kind that the run can make; 0 where it makes none."""
    prompts, quotas = _prompts(config), all_quotas(config)
    evaluated = evaluation_prompts(config) * config.evaluation.samples if config.data.eval else 0
    return LeaseRows(
        explorer=prompts * max(quota.explorer for quota in quotas),
        learner=prompts * max(quota.learner for quota in quotas),
        evaluation=evaluated,
    )


def evaluation_prompts(config: Config) -> int:
    """Held-out problems of one evaluation lease: as many as make no more rows than a training lease of whole groups, so
    that they fit where those fit; one at least."""
    return max(1, _prompts(config) * config.algorithm.group_size // config.evaluation.samples)


def _prompts(config: Config) -> int:
    """Prompts of one training lease, which is of one step."""
    return min(config.rollout.lease_prompts, config.algorithm.prompts_per_step)
