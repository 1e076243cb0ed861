"""What every rollout engine takes and gives.

Where it fits: L2, between prompts and rewards. In: token ids of prompts and how to sample. Out: the
response's ids with the log-prob of each under the law that it was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_drpo.types import FinishReason


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Example: Sampling(1.0, 1.0, 0, 256, stop_ids=(2,), seed=7)."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """1 is off."""
    top_k: int
    """0 is off."""
    max_response_length: int
    stop_ids: tuple[int, ...]
    seed: int
    """With a request's `stream`, decides every draw: neither batching nor layout does."""
    record_topk: int = 0
    """Likeliest ids recorded at each token, before truncation; 0 is off."""


@dataclass(frozen=True, eq=False)
class Request:
    """One response wanted. Example: Request(prompt_ids=tensor([5, 6, 14]), stream=17)."""

    prompt_ids: Tensor
    """int64 [P]."""
    stream: int
    """Number of this response's own sequence of random numbers."""


@dataclass(frozen=True, eq=False)
class Completion:
    """Example: Completion(tensor([8, 2]), tensor([-0.2, -0.01]), finish_reason="stop")."""

    response_ids: Tensor
    """int64 [R] on the CPU, the stop id included; R >= 1."""
    logprobs: Tensor
    """fp32 [R] on the CPU, under the distribution that was drawn from."""
    finish_reason: FinishReason
    topk_ids: Tensor | None = None
    """int64 [R, K] on the CPU, with `record_topk`."""
    topk_logprobs: Tensor | None = None
    """fp32 [R, K] on the CPU."""


class RolloutEngine(Protocol):
    """Generates with the current weights."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order; the same on all ranks of the replica."""
        ...
