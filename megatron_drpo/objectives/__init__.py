"""Objectives: pure functions of per-token tensors.

Where it fits: L1, between the vocab-parallel log-probs and the aggregation. In: log pi, log mu and
the advantage of each loss token. Out: `TokenObjective`, one loss and one gradient weight per token.
No function here reduces over tokens, knows a device or a process group, or changes its input.
The mathematics, with sources, is in docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.objectives.drpo import TokenObjective, drpo

Objective = Callable[[Tensor, Tensor, Tensor], TokenObjective]
"""(log pi fp32 [T] with gradient, log mu fp32 [T], advantage fp32 [T]) -> TokenObjective."""

OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "drpo": lambda config: partial(drpo, delta=config.drpo_delta),
}


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `--objective` names, its constants bound."""
    return OBJECTIVES[config.objective](config)


__all__ = ["OBJECTIVES", "Objective", "TokenObjective", "build_objective", "drpo"]
