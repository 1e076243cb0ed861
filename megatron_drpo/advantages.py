"""Advantages: how much better a response is than the others of its prompt.

In: rollouts grouped by prompt, and their rewards. Out: `types.Trajectory` records.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_drpo.config import AdvantageConfig
from megatron_drpo.types import Rollout, Trajectory

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as in verl's GRPO."""


def group_advantages(rewards: Tensor, estimator: str, divide_by_std: bool) -> Tensor:
    """Rewards centred within each group: [G, K] in any precision -> fp32 [G, K].

    With m the mean of the group: `group-mean` is r - m (the DRPO recipe, arXiv 2606.09821);
    `leave-one-out` (RLOO, arXiv 2402.14740) subtracts the mean of the group's other K - 1 samples,
    which is K/(K-1) (r - m). `divide_by_std` divides by s + 1e-6, s being the group's sample
    standard deviation (over K - 1, as GRPO trainers compute it; arXiv 2402.03300, section 4.1.2).

    A NaN, the reward of a sample that could not be judged, does not belong to its group: K counts
    the others, and its own advantage is 0. A group of equal rewards, or of fewer than two, has
    exact zeros. Computed in fp64.
    """
    judged = rewards.isnan().logical_not()
    size = judged.sum(dim=1, keepdim=True)
    # Relative to the first judged sample, equal rewards are exact zeros before any rounding.
    first = rewards.double().gather(1, judged.int().argmax(dim=1, keepdim=True))
    offsets = torch.where(judged, rewards.double() - first, 0.0)
    mean = offsets.sum(dim=1, keepdim=True) / size.clamp(min=1)
    advantages = centred = torch.where(judged, offsets - mean, 0.0)
    others = (size - 1).clamp(min=1)  # a group of one has no spread: its advantage is 0
    if estimator == "leave-one-out":
        advantages = centred * size / others
    elif estimator != "group-mean":
        raise ValueError(f"estimator {estimator!r}: must be group-mean or leave-one-out")
    if divide_by_std:
        std = (centred.square().sum(dim=1, keepdim=True) / others).sqrt()
        advantages = advantages / (std + STD_EPSILON)
    return advantages.float()


def make_trajectories(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    samples_per_prompt: int,
    config: AdvantageConfig,
) -> tuple[Trajectory, ...]:
    """Rollouts with their rewards and advantages, in the same order.

    Args:
        rollouts: the samples of one prompt next to each other.
        rewards: one per rollout; NaN where it failed.
        samples_per_prompt: size of a group.
        config: the estimator.
    """
    assert len(rollouts) == len(rewards) and len(rollouts) % samples_per_prompt == 0
    for start in range(0, len(rollouts), samples_per_prompt):
        group = rollouts[start : start + samples_per_prompt]
        assert len({rollout.prompt.id for rollout in group}) == 1, "group of several prompts"
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64).view(-1, samples_per_prompt),
        config.advantage_estimator,
        config.advantage_divide_by_std,
    )
    return tuple(map(Trajectory, rollouts, rewards, advantages.flatten().tolist()))
