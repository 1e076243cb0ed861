"""What every rollout engine takes and gives.

Where it fits: L2, between prompts and rewards. In: token ids of prompts and how to sample. Out: the
response's ids with the log-prob of each under the law that it was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_drpo.config import RolloutConfig
from megatron_drpo.types import FinishReason, KeptIds


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
    """Likeliest ids recorded at each token; 0 is off. Not together with truncation."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these in its text."""
    record_experts: bool = False
    """Record the experts that each token is routed to."""

    @property
    def truncated(self) -> bool:
        """Whether top-p or top-k cut the law that is drawn from."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


def sampling_of(
    config: RolloutConfig, stop_ids: tuple[int, ...], seed: int, *, record_experts: bool = False
) -> Sampling:
    """How the flags of rollouts say that responses are drawn."""
    return Sampling(
        temperature=config.rollout_temperature,
        top_p=config.rollout_top_p,
        top_k=config.rollout_top_k,
        max_response_length=config.rollout_max_response_length,
        stop_ids=stop_ids,
        seed=seed,
        record_topk=config.rollout_topk,
        stop_strings=config.rollout_stop_strings,
        record_experts=record_experts,
    )


@dataclass(frozen=True, eq=False)
class Request:
    """One response wanted. Example: Request(prompt_ids=tensor([5, 6, 14]), stream=17).

    Requests next to each other whose prompts are equal, a group's samples, share the work on it.
    """

    prompt_ids: Tensor
    """int64 [P]."""
    stream: int
    """Number of this response's own sequence of random numbers."""
    first_position: int = 0
    """Where in that sequence to begin: so many tokens of the response are in `prompt_ids` already
    (a later turn, or a response that is continued)."""
    max_response_length: int | None = None
    """Limit of this response, if it is not `Sampling.max_response_length`; at least 1."""


@dataclass(frozen=True, eq=False)
class Completion:
    """Example: Completion(tensor([8, 2]), tensor([-0.2, -0.01]), finish_reason="stop")."""

    response_ids: Tensor
    """int64 [R] on the CPU, the stop id included; R >= 1, but that an aborted one may be empty."""
    logprobs: Tensor
    """fp32 [R] on the CPU, under the distribution that was drawn from."""
    finish_reason: FinishReason
    topk_ids: Tensor | None = None
    """int64 [R, K] on the CPU, with `record_topk`."""
    topk_logprobs: Tensor | None = None
    """fp32 [R, K] on the CPU."""
    kept_ids: KeptIds | None = None
    """Of R tokens, on the CPU, where `Sampling.truncated`."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """As in `Rollout`: (tokens, policy version) where the weights changed on the way."""
    experts: Tensor | None = None
    """As in `Rollout`, on the CPU, with `record_experts`."""


class RolloutEngine(Protocol):
    """Generates with the current weights."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order; the same on all ranks of the replica."""
        ...
