"""Advantages inside groups (eq. 1): what a completion earned above its group."""

from typing import Literal

import numpy as np

Scale = Literal["std", "none"]


def group_advantages(rewards: object, groups: object, *, scale: Scale = "std", eps: float = 1e-6) -> np.ndarray:
    """Advantage of every row over the combined group it belongs to.

        A_i = (r_i − mean_g) / (std_g + ε),  std the sample standard deviation (ddof 1)

    (arXiv:2605.30789, eq. 1.) A group of one has mean 0 and std 1, as in verl. `scale="none"` leaves out the division
    (Dr.GRPO, arXiv:2503.20783). A group whose rewards are all equal gets exact zeros.

    Args: rewards [N], finite; groups [N], any integer labels in any order. Returns float64 [N].
    Raises ValueError for a reward that is not finite (with its row), other shapes, other labels.
    """
    reward_N, member_N = _checked(rewards, groups, scale, eps)
    return _standardise(reward_N, member_N, scale, eps)


def source_baseline_advantages(
    rewards: object, groups: object, is_explorer: object, *, scale: Scale = "std", eps: float = 1e-6
) -> np.ndarray:
    """Advantages with a baseline per source: learner rows are compared with the learner rows of their group only.

    A learner row takes mean and std of its group's learner rows, so that explorer rows do not move its baseline; an
    explorer row takes those of the whole group, as in `group_advantages`. A learner row that is alone of its source in
    a larger group has no baseline of its own and takes the whole group's.

    Args: rewards [N], finite; groups [N] integer labels; is_explorer [N] bool. Returns float64 [N].
    Raises ValueError as `group_advantages` does, and for an `is_explorer` that is not bool [N].
    """
    reward_N, member_N = _checked(rewards, groups, scale, eps)
    explorer_N = np.asarray(is_explorer)
    if explorer_N.dtype != np.bool_ or explorer_N.shape != reward_N.shape:
        raise ValueError(
            f"is_explorer must be bool of shape {reward_N.shape}, got {explorer_N.dtype} of shape {explorer_N.shape}"
        )
    advantage_N = _standardise(reward_N, member_N, scale, eps)
    learners_G = np.bincount(member_N, weights=~explorer_N)
    own_N = ~explorer_N & ((learners_G > 1) | (learners_G == np.bincount(member_N)))[member_N]
    if own_N.any():
        _, own_member = np.unique(member_N[own_N], return_inverse=True)
        advantage_N[own_N] = _standardise(reward_N[own_N], own_member, scale, eps)
    return advantage_N


def _checked(rewards: object, groups: object, scale: str, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Rewards as float64 [N] and dense group numbers 0 … G−1 [N]."""
    reward_N, label_N = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if reward_N.ndim != 1 or reward_N.shape != label_N.shape:
        raise ValueError(f"rewards and groups must be 1-D and equally long, got {reward_N.shape} and {label_N.shape}")
    if reward_N.size and not np.issubdtype(label_N.dtype, np.integer):
        raise ValueError(f"groups must be integer labels, got {label_N.dtype}")
    if scale not in ("std", "none"):
        raise ValueError(f'scale must be "std" or "none", got {scale!r}')
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    finite_N = np.isfinite(reward_N)
    if not finite_N.all():
        row = int(np.argmin(finite_N))
        raise ValueError(f"reward {row} is {reward_N[row]}: drop a completion without a finite reward before grouping")
    _, member_N = np.unique(label_N, return_inverse=True)
    return reward_N, member_N


def _standardise(reward_N: np.ndarray, member_N: np.ndarray, scale: Scale, eps: float) -> np.ndarray:
    size_G = np.bincount(member_N)
    # Rewards are shifted by the group's smallest before averaging: equal rewards then give exact zeros.
    lowest_G = np.full(size_G.shape, np.inf)
    np.minimum.at(lowest_G, member_N, reward_N)
    lowest_G[size_G == 1] = 0.0
    shifted_N = reward_N - lowest_G[member_N]
    mean_G = np.bincount(member_N, weights=shifted_N) / size_G
    mean_G[size_G == 1] = 0.0
    centred_N = shifted_N - mean_G[member_N]
    if scale == "none":
        return centred_N
    std_G = np.sqrt(np.bincount(member_N, weights=centred_N**2) / np.maximum(size_G - 1, 1))
    std_G[size_G == 1] = 1.0
    # eps = 0 on equal rewards is 0/0; nothing was earned, so the answer is 0.
    scale_N = (std_G + eps)[member_N]
    return np.divide(centred_N, scale_N, out=np.zeros_like(centred_N), where=scale_N > 0)
