"""The importance ratio of an objective, in log space and safe to exponentiate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_drpo.objectives.tokens import Tokens


def log_ratio(tokens: Tokens) -> Tensor:
    """[T], log pi - log mu, differentiable, 0 where the advantage is 0; see `saturated`.

    A token without advantage has no gradient, so it counts as on policy: nothing is clipped there,
    and no ratio can make a NaN of it.
    """
    difference = tokens.logprobs - tokens.behaviour_logprobs
    return torch.where(tokens.advantages == 0, 0.0, saturated(difference))


def sequence_log_ratio(tokens: Tokens) -> Tensor:
    """[T], log s of the token's sequence, s = exp(mean of log pi - log mu); as `log_ratio`.

    The straight-through form `sg(log s) + log pi - sg(log pi)` has the value log s and, by the
    token's own log pi, the derivative 1.
    """
    own = tokens.logprobs - tokens.logprobs.detach()
    value = tokens.required("sequence_log_ratio").detach()
    return torch.where(tokens.advantages == 0, 0.0, saturated(value) + own)


def saturated(log_ratios: Tensor) -> Tensor:
    """`log_ratios` held where their exponential is finite, with the gradient of the identity.

    An infinite ratio times a zero (a mask, a clipped branch, a penalty that vanishes) would be NaN.
    Beyond the limit, 80 nats in fp32 and 639 in fp64, the ratio stays at exp(limit) and goes on
    being differentiated as one: no token loses its gradient, as it would under a clamp.
    """
    limit = 0.9 * math.log(torch.finfo(log_ratios.dtype).max)
    value = log_ratios.detach()
    return value.clamp(-limit, limit) + (log_ratios - value)
