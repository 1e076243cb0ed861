"""The gate between generation and training: behaviour log-probs against the trainer's.

L3, called by the loop on each scored batch, before its first update. In: rows that hold both. Out:
the engine gap of the tokens that the current weights drew, or an error that says what the
difference looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_drpo.config import Config
from megatron_drpo.errors import RolloutError
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.metrics import engine_gap_statistics
from megatron_drpo.rollout.diagnosis import diagnose
from megatron_drpo.types import Row
from megatron_drpo.vocab_parallel import TokenScores


class Bound(NamedTuple):
    """Largest mean difference that training accepts, and where the number comes from."""

    nats: float
    reason: str


def bound(config: Config, *, exact: bool) -> Bound:
    """The value of `--max-engine-gap` with its default resolved.

    Args:
        exact: generation was proven to equal training bit for bit.
    """
    rollout = config.rollout
    if rollout.max_engine_gap is not None:
        return Bound(rollout.max_engine_gap, "as given")
    if rollout.uses_servers:
        return Bound(0.2, "for servers")
    if exact:
        return Bound(0.0, "generation equals training bit for bit")
    numbers = "fp32" if not config.model.bf16 else "bf16"
    numbers = "FP8" if config.precision.fp8_format else numbers
    return Bound(rounding(config), f"for {numbers}")


def rounding(config: Config) -> float:
    """Mean gap in nats that arithmetic alone can make.

    That of FP8 is not measured: its numbers round 16 times as coarsely as those of bf16, but
    generation and training round the same weights alike (docs/precision.md).
    """
    if config.precision.fp8_format:
        return 0.2
    return 0.1 if config.model.bf16 else 1e-3


class _Compared(NamedTuple):
    """Of the tokens that the current weights drew, on the CPU."""

    trainer: Tensor
    behaviour: Tensor


class Gate:
    """Compares each batch, and stops the run where the gap is above the bound."""

    def __init__(self, config: Config, policy: Policy, *, exact: bool) -> None:
        self._config, self._policy = config, policy
        self.bound = bound(config, exact=exact)

    def check(self, updates: Sequence[Sequence[Row]], step: int) -> dict[str, float]:
        """`engine_gap/*` of a batch's fresh tokens; the same on every rank, collective.

        Args:
            updates: annotated rows of the batch.
            step: from 0, for the message.

        Raises:
            RolloutError: on all ranks, if responses were generated and their mean gap is above the
                bound.
        """
        rows = [*chain.from_iterable(updates)]
        compared = self._gather(rows, [row.old_logprobs for row in rows])
        gap = engine_gap_statistics(*compared)
        recorded = self._config.rollout.rollouts_file is not None
        if gap and not recorded and not gap["engine_gap/mean_abs"] <= self.bound.nats:
            raise RolloutError(
                f"--max-engine-gap {self.bound.nats:g} ({self.bound.reason}): behaviour log-probs "
                f"of step {step + 1} differ from the trainer's by "
                f"{gap['engine_gap/mean_abs']:.4g} nats per token on average, so they do not "
                "describe the policy that is trained. "
                f"{self._diagnose(rows, compared)} Raise the limit only if you know why"
            )
        return gap

    def _gather(self, rows: Sequence[Row], logprobs: Sequence[Tensor | None]) -> _Compared:
        """All ranks' fresh tokens with `logprobs`, one [T] per row; None off the last stage."""
        layout, pair = self._policy.layout, None
        if layout.is_last_stage and layout.tp_rank == 0:
            fresh = [row.policy_versions == self._policy.num_updates for row in rows]
            if self._config.rollout.rollouts_file is not None:  # of no version of this run
                fresh = [torch.ones_like(mask) for mask in fresh]
            pair = (
                torch.cat([t[m.to(t.device)].cpu() for t, m in zip(logprobs, fresh, strict=True)]),  # type: ignore[index,union-attr]
                torch.cat([r.behaviour_logprobs[m] for r, m in zip(rows, fresh, strict=True)]),
            )
        pairs = layout.gather_objects(pair)
        trainer, behaviour = zip(*pairs, strict=True)
        return _Compared(torch.cat(trainer), torch.cat(behaviour))

    def _diagnose(self, rows: Sequence[Row], compared: _Compared) -> str:
        """What the gap looks like, after scoring the batch under other assumptions."""
        rollout = self._config.rollout
        candidates = {"the trainer's law": compared.trainer}

        def score(which: Callable[[TokenScores], Tensor], **how: Any) -> Tensor:
            scores = self._policy.score(rows, **how)
            return self._gather(rows, [*map(which, scores)] or [None] * len(rows)).trainer

        if rollout.rollout_temperature != 1:
            candidates["temperature 1"] = score(lambda each: each.logprobs, temperature=1.0)
        if rollout.truncated:
            candidates["without truncation"] = score(lambda each: each.logprobs, untruncated=True)
        return diagnose(
            compared.behaviour,
            candidates,
            entropy=score(lambda each: each.entropy),
            rounding=rounding(self._config),
        )
