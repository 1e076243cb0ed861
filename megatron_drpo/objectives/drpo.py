"""DRPO and SPO: a quadratic penalty that fades an update out instead of cutting it off."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_drpo.objectives.ratio import log_ratio
from megatron_drpo.objectives.tokens import TokenObjective, Tokens


def drpo(
    tokens: Tokens, *, delta: float, penalty: Literal["sampled", "full"] = "sampled"
) -> TokenObjective:
    """DRPO (arXiv 2606.09821, equation 8): maximises `r A - |A| / (2 delta) * mu * (r - 1)^2`.

    Its gradient weight `1 - sign(A (r - 1)) |pi - mu| / delta` fades an update that diverges from
    the behaviour policy to zero at `|pi - mu| = delta` and pulls it back beyond; it lies inside
    [1 - 1/delta, 1 + 1/delta] for any pi and mu.

    `full` replaces the penalty of the sampled token by its expectation over mu, `|A| / (2 delta) *
    sum_v (pi_v - mu_v)^2`. Averaged over mu, both have the same gradient exactly if |A| does not
    depend on which token was sampled; if it does, `sampled` weighs each v by its own |A_v|, and
    `full` all of them by the mean of |A|. The gradient weight is then that of `r A` alone: 1.

    Args:
        tokens: T tokens; `full` reads `behaviour_l2`.
        delta: radius of the trust region in |pi - mu|, above 0.
        penalty: of the sampled token, or over the full vocabulary.

    Returns:
        With `penalty`, the term that is subtracted, as diagnostic.

    Raises:
        ValueError: delta is not above 0.
    """
    if penalty == "sampled":
        # p - m = m (r - 1) is the signed difference that the trust region bounds; in this form it
        # stays inside [-1, 1] where r is large and m underflows.
        drift = tokens.logprobs.exp() - tokens.behaviour_logprobs.exp()
        return _quadratic(tokens, log_ratio(tokens).expm1(), drift, _above_0("delta", delta))
    distance = tokens.required("behaviour_l2")
    penalties = tokens.advantages.abs() * distance / (2 * _above_0("delta", delta))
    losses = penalties - log_ratio(tokens).exp() * tokens.advantages
    return TokenObjective(
        losses, torch.ones_like(tokens.advantages), {"penalty": penalties.detach()}
    )


def spo(tokens: Tokens, *, epsilon: float) -> TokenObjective:
    """SPO (arXiv 2401.16025): maximises `r A - |A| / (2 epsilon) * (r - 1)^2`.

    DRPO without the factor mu: its trust region is |r - 1| <= epsilon, and its gradient weight
    `1 - sign(A (r - 1)) |r - 1| / epsilon` has no lower bound where mu is small.

    Args:
        tokens: T tokens.
        epsilon: radius of the trust region in |r - 1|, above 0.

    Returns:
        With `penalty`, the term that is subtracted, as diagnostic.

    Raises:
        ValueError: epsilon is not above 0.
    """
    ratio_minus_one = log_ratio(tokens).expm1()
    return _quadratic(tokens, ratio_minus_one, ratio_minus_one, _above_0("epsilon", epsilon))


def _quadratic(
    tokens: Tokens, ratio_minus_one: Tensor, distance: Tensor, radius: float
) -> TokenObjective:
    """`r A - |A| / (2 radius) * distance * (r - 1)`, whose weight is linear in the distance.

    Args:
        tokens: T tokens.
        ratio_minus_one: [T], r - 1.
        distance: [T], of the sign of r - 1, proportional to it, with the same gradient but for the
            factor: what the radius bounds.
        radius: above 0.
    """
    size = tokens.advantages.abs() / (2 * radius) * distance
    # r - 1 is factored out, so that two large terms are never subtracted from each other.
    losses = ratio_minus_one * (size - tokens.advantages) - tokens.advantages
    weights = 1 - tokens.advantages.sign() * distance.detach() / radius
    return TokenObjective(losses, weights, {"penalty": (ratio_minus_one * size).detach()})


def _above_0(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
    return value
