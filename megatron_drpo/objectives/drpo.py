"""DRPO: the smooth, advantage-weighted quadratic regulariser of arXiv 2606.09821, equation 8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenObjective:
    """What an objective says of each token.

    Example: TokenObjective(losses=tensor([-0.62, 0.37]), gradient_weights=tensor([1.0, 0.98]))
    """

    losses: Tensor
    """fp32 [T]: the negative objective, differentiable in log pi."""
    gradient_weights: Tensor
    """fp32 [T], detached: w in d(objective)/d(log pi) = r * advantage * w."""


def drpo(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, delta: float
) -> TokenObjective:
    """DRPO's per-token loss, `-(r A - |A| / (2 delta) * m * (r - 1)^2)` with r = pi/mu, m = mu.

    Its gradient weight `1 - sign(A (r - 1)) |pi - mu| / delta` fades an update that diverges from
    the behaviour policy to zero at `|pi - mu| = delta` and pulls it back beyond; it lies inside
    [1 - 1/delta, 1 + 1/delta] for any pi and mu (arXiv 2606.09821, section 3).

    Args:
        logprobs: fp32 [T], log pi of the sampled tokens at the sampling temperature.
        behaviour_logprobs: fp32 [T], log mu, the law that the sampler drew from.
        advantages: fp32 [T].
        delta: radius of the trust region in |pi - mu|, above 0.

    Raises:
        ValueError: delta is not above 0.
    """
    if not delta > 0:
        raise ValueError(f"delta must be above 0, not {delta}")
    ratio_minus_one = torch.expm1(logprobs - behaviour_logprobs)
    # p - m = m (r - 1) is the signed difference that the trust region bounds; in this form it stays
    # inside [-1, 1] where r overflows and m underflows.
    drift = logprobs.exp() - behaviour_logprobs.exp()
    penalty = advantages.abs() * drift * ratio_minus_one / (2 * delta)
    losses = penalty - (1 + ratio_minus_one) * advantages
    weights = 1 - advantages.sign() * drift.detach() / delta
    return TokenObjective(losses, weights)
