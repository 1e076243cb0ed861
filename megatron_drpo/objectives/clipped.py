"""Policy gradients with an importance ratio that is free, clipped, or truncated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_drpo.objectives.ratio import log_ratio, sequence_log_ratio
from megatron_drpo.objectives.tokens import TokenObjective, Tokens


def pg_is(tokens: Tokens) -> TokenObjective:
    """The importance-weighted policy gradient: maximises `r A`; the gradient weight is 1."""
    losses = -log_ratio(tokens).exp() * tokens.advantages
    return TokenObjective(losses, torch.ones_like(tokens.advantages))


def ppo(
    tokens: Tokens, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> TokenObjective:
    """PPO: maximises `min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` (arXiv 1707.06347, eq. 7).

    Two limits instead of one are DAPO's (arXiv 2503.14476). The dual clip (arXiv 1912.09729)
    maximises `max(that, dual_clip * A)` where A < 0, as else nothing bounds r there. The gradient
    weight is 0 on clipped tokens and 1 on others.

    Args:
        tokens: T tokens.
        clip_low: tokens with A < 0 stop below r = 1 - clip_low.
        clip_high: tokens with A > 0 stop above r = 1 + clip_high.
        dual_clip: tokens with A < 0 stop above this r, which is above 1; None is off.

    Returns:
        With `clipped` and, where it is on, `dual_clipped` (0 or 1) as diagnostics.
    """
    return _clipped(log_ratio(tokens), tokens.advantages, clip_low, clip_high, dual_clip)


def gspo(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenObjective:
    """GSPO (arXiv 2507.18071): PPO's clip of the sequence ratio s = exp(mean_t(log pi - log mu)).

    Written per token: each token of a sequence has the loss of the whole sequence, -s A (or the
    clipped one), and s is differentiated by its own log pi with derivative s (see
    `sequence_log_ratio`). A sequence objective s A has the derivative s A / R by each of the R log
    pi that s is the mean of. So if the R tokens have equal weights in the aggregation, W / R each,
    then values and gradients add up to those of W times the sequence's objective.

    The gradient weight is 0 on clipped sequences, 1 on others; the ratio in front of it is s.

    Args:
        tokens: T tokens; `sequence_log_ratio` is read.
        clip_low: sequences with A < 0 stop below s = 1 - clip_low.
        clip_high: sequences with A > 0 stop above s = 1 + clip_high.

    Returns:
        With `clipped` (0 or 1) as diagnostic.
    """
    return _clipped(sequence_log_ratio(tokens), tokens.advantages, clip_low, clip_high, None)


def _clipped(
    log_ratios: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> TokenObjective:
    """Which of the branches counts is decided by comparing, not by min and max.

    Their gradient is split where both are equal.
    """
    ratios = log_ratios.exp()
    rising, falling = advantages > 0, advantages < 0
    clipped = (rising & (ratios > 1 + clip_high)) | (falling & (ratios < 1 - clip_low))
    bound = torch.where(rising, torch.full_like(ratios, 1 + clip_high), 1 - clip_low)
    diagnostics = {"clipped": clipped}
    if dual_clip is not None:
        dual_clipped = falling & (ratios > dual_clip)
        bound = torch.where(dual_clipped, dual_clip, bound)
        clipped = clipped | dual_clipped
        diagnostics["dual_clipped"] = dual_clipped
    return TokenObjective(
        -torch.where(clipped, bound, ratios) * advantages,
        (~clipped).to(ratios.dtype),
        {name: value.to(ratios.dtype) for name, value in diagnostics.items()},
    )


def cispo(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenObjective:
    """CISPO: maximises `sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi` (arXiv 2506.13585).

    The ratio is truncated and no token loses its gradient. The gradient weight is clip(r) / r.

    Args:
        tokens: T tokens.
        clip_low: the ratio counts as 1 - clip_low at least; 1 is no lower limit.
        clip_high: the ratio counts as 1 + clip_high at most.

    Returns:
        With `clipped` (0 or 1) as diagnostic.
    """
    log_low = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    return score_function(tokens, log_low, math.log1p(clip_high), "clipped")


def score_function(
    tokens: Tokens, log_low: float, log_high: float, diagnostic: str
) -> TokenObjective:
    """`sg(clip(r, exp(log_low), exp(log_high))) A log pi`: a truncated ratio as a constant.

    Args:
        tokens: T tokens.
        log_low: nats; -inf is no limit.
        log_high: nats.
        diagnostic: name under which truncated tokens (0 or 1) are reported.
    """
    log_ratios = log_ratio(tokens).detach()
    truncated = log_ratios.clamp(log_low, log_high)
    return TokenObjective(
        -truncated.exp() * tokens.advantages * tokens.logprobs,
        (truncated - log_ratios).exp(),
        {diagnostic: (truncated != log_ratios).to(log_ratios.dtype)},
    )
