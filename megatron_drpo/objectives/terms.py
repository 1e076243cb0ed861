"""What is added to a base objective: KL to a frozen reference model. (The entropy bonus is a
field of `Tokens` and needs no function.)"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_drpo.config import KlEstimator
from megatron_drpo.objectives.ratio import saturated
from megatron_drpo.objectives.tokens import Tokens


def reference_kl(tokens: Tokens, estimator: KlEstimator) -> Tensor:
    """[T], KL(pi || reference) of each token's distribution, estimated or exact; differentiable.

    With x = log reference - log pi of the sampled token (http://joschu.net/blog/kl-approx.html):

    - `k1` = -x. Unbiased, but the mean of its gradient is 0: as a loss it is noise.
    - `k2` = x^2 / 2. Biased; the mean of its gradient is that of KL(pi || reference).
    - `k3` = exp(x) - 1 - x. Unbiased and never negative; the mean of its gradient is that of
      KL(reference || pi), the other direction.
    - `full`: over the whole vocabulary, value and gradient exact.

    The means are over tokens that pi itself draws (arXiv 2506.09477 derives them); tokens of an
    older policy shift all but `full`.

    Args:
        tokens: T tokens; `reference_logprobs` is read, or for `full` `reference_kl`.
        estimator: which one.
    """
    if estimator == "full":
        return tokens.required("reference_kl")
    x = saturated(tokens.required("reference_logprobs") - tokens.logprobs)
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    return torch.expm1(x) - x
