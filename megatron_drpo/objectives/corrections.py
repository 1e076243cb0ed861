"""Importance corrections: a detached factor on the loss of each token, and which are masked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_drpo.objectives.ratio import saturated
from megatron_drpo.objectives.tokens import TokenObjective, Tokens


@dataclass(frozen=True, eq=False)
class Correction:
    """Example: Correction(factor=tensor([0.5, 0.0]), masked=tensor([False, True]),
    diagnostics={"tis_truncated": tensor([1.0, 0.0]), "icepop_masked": tensor([0.0, 1.0])})
    """

    factor: Tensor
    """[T], detached, finite, multiplies the base objective's losses; 0 where masked."""
    masked: Tensor
    """bool [T]."""
    diagnostics: Mapping[str, Tensor]
    """[T] each, 0 or 1."""


@torch.no_grad()
def importance_correction(
    tokens: Tokens,
    *,
    decoupled: bool,
    tis_limit: float | None = None,
    icepop: tuple[float, float] | None = None,
    sequence_mask: Literal["off", "geometric", "product"] = "off",
    sequence_bounds: tuple[float, float] | None = None,
) -> Correction:
    """The factor of all corrections that are on. They act on the importance weight rho.

    Not decoupled, rho = pi / mu is already inside the objective's ratio, so that the factor is
    what turns rho into min(rho, tis_limit): min(1, tis_limit / rho). Decoupled, the objective's
    ratio is pi / old, and the factor is min(rho, tis_limit) itself, with rho = old / mu. Without
    `tis_limit` it is 1: masks only mask, since a rho without a limit would weigh most what is most
    off. On top, the factor is 0 where rho lies outside `icepop`, and on whole sequences whose rho,
    as geometric mean or product over their tokens, lies outside `sequence_bounds`.

    TIS: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    IcePop: Ling team 2025. Sequence masks: Liu, Li et al. 2025, "When Speed Kills Stability".

    Args:
        tokens: T tokens; decoupled reads `old_logprobs`, a sequence mask `sequence_length` and
            `sequence_log_ratio` (decoupled: `sequence_log_weight`).
        decoupled: whether the objective's ratio is taken against the trainer's old log-probs.
        tis_limit: of rho, above 0; None is off.
        icepop: (low, high) of rho; None is off.
        sequence_mask: whether and how rho is taken over a sequence.
        sequence_bounds: (low, high) of it; given where it is.

    Returns:
        With `tis_truncated`, `icepop_masked` and `sequence_masked`, as far as they are on.
    """
    numerator = tokens.required("old_logprobs") if decoupled else tokens.logprobs
    log_rho = numerator - tokens.behaviour_logprobs
    # Comparisons see log rho as it is; what is exponentiated must not overflow.
    finite = saturated(log_rho)
    log_factor = torch.zeros_like(log_rho)
    masked = torch.zeros_like(log_rho, dtype=torch.bool)
    diagnostics: dict[str, Tensor] = {}
    if tis_limit is not None:
        limit = math.log(tis_limit)
        log_factor = finite.clamp(max=limit) if decoupled else (limit - finite).clamp(max=0)
        diagnostics["tis_truncated"] = log_rho > limit
    if icepop is not None:
        diagnostics["icepop_masked"] = _outside(log_rho, icepop)
        masked = masked | diagnostics["icepop_masked"]
    if sequence_mask != "off" and sequence_bounds is not None:
        name = "sequence_log_weight" if decoupled else "sequence_log_ratio"
        log_sequence = tokens.required(name)
        if sequence_mask == "product":
            log_sequence = log_sequence * tokens.required("sequence_length")
        diagnostics["sequence_masked"] = _outside(log_sequence, sequence_bounds)
        masked = masked | diagnostics["sequence_masked"]
    return Correction(
        log_factor.exp().masked_fill(masked, 0.0),
        masked,
        {name: value.to(log_rho.dtype) for name, value in diagnostics.items()},
    )


def neutralised(tokens: Tokens, masked: Tensor) -> Tokens:
    """The tokens with those in `masked` (bool [T]) on policy, of advantage 0 and cut off.

    A factor of 0 alone would not do: 0 times the infinite gradient of a wild token is NaN.
    """
    return replace(
        tokens,
        logprobs=torch.where(masked, tokens.behaviour_logprobs, tokens.logprobs),
        advantages=tokens.advantages.masked_fill(masked, 0.0),
    )


def corrected(result: TokenObjective, advantages: Tensor, correction: Correction) -> TokenObjective:
    """A base objective's `result` times the factor.

    Args:
        result: of `neutralised` tokens.
        advantages: [T], of the tokens themselves.
        correction: of the tokens themselves.
    """
    weights = result.gradient_weights * correction.factor
    return TokenObjective(
        result.losses * correction.factor,
        torch.where(advantages == 0, 1.0, weights),
        {**result.diagnostics, **correction.diagnostics},
    )


def _outside(log_values: Tensor, bounds: tuple[float, float]) -> Tensor:
    log_low, log_high = (math.log(bound) if bound > 0 else -math.inf for bound in bounds)
    return (log_values < log_low) | (log_values > log_high)
