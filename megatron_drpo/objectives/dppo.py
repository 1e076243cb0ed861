"""DPPO: a mask where a divergence of the two policies leaves a trust region."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_drpo.objectives.clipped import score_function
from megatron_drpo.objectives.tokens import TokenObjective, Tokens

Divergence = Literal["tv", "kl"]


def dppo(
    tokens: Tokens,
    *,
    divergence: Divergence,
    topk: bool = False,
    delta_low: float,
    delta_high: float,
    ratio_limit: float,
) -> TokenObjective:
    """DPPO (arXiv 2602.04879): maximises `M sg(min(r, ratio_limit)) A log pi`, M = 0 or 1.

    M = 0 where the update would drive pi further away from mu (A > 0 and pi > mu, or A < 0 and
    pi < mu) and the divergence is already above its limit. The gradient weight is M min(1, c / r).

    Args:
        tokens: T tokens; `topk` reads the three top-K fields.
        divergence: total variation, or KL(mu || pi) in nats; see `bucket_divergence`.
        topk: over the behaviour policy's top-K ids, the sampled one and the rest; otherwise the
            sampled one against the rest (binary).
        delta_low: limit where A < 0, above 0.
        delta_high: limit where A > 0, above 0.
        ratio_limit: c, at least 1.

    Returns:
        With `masked` and `ratio_truncated` (0 or 1) and `divergence` as diagnostics.
    """
    distance = bucket_divergence(tokens, divergence, topk=topk)
    drift = tokens.logprobs.detach() - tokens.behaviour_logprobs
    masked = ((tokens.advantages > 0) & (drift > 0) & (distance > delta_high)) | (
        (tokens.advantages < 0) & (drift < 0) & (distance > delta_low)
    )
    kept = (~masked).to(distance.dtype)
    free = score_function(tokens, -math.inf, math.log(ratio_limit), "ratio_truncated")
    diagnostics = {**free.diagnostics, "masked": 1 - kept, "divergence": distance}
    return TokenObjective(kept * free.losses, kept * free.gradient_weights, diagnostics)


@torch.no_grad()
def bucket_divergence(tokens: Tokens, divergence: Divergence, *, topk: bool = False) -> Tensor:
    """[T], a divergence of mu and pi where all ids that are not told apart are one bucket.

    A lower bound of the divergence over the whole vocabulary (data processing). Finite for all
    finite log-probs: the rest's mass is known to rounding only (one minus a sum), so in logarithms
    it counts as that at least; a log-prob of -inf counts as the smallest float's.

    Args:
        tokens: T tokens; `topk` reads the three top-K fields.
        divergence: total variation, or KL(mu || pi) in nats.
        topk: buckets are the behaviour policy's top-K ids, the sampled id where it is not one of
            them, and the rest; otherwise the sampled id and the rest.
    """
    log_p, log_m = tokens.logprobs[:, None], tokens.behaviour_logprobs[:, None]
    if topk:
        # The sampled id stands in front for itself; among the top-K it would count twice.
        sampled = tokens.required("sampled_in_topk")
        others_p = tokens.required("topk_logprobs").masked_fill(sampled, -math.inf)
        others_m = tokens.required("behaviour_topk_logprobs").masked_fill(sampled, -math.inf)
        log_p, log_m = torch.cat([log_p, others_p], -1), torch.cat([log_m, others_m], -1)
    p, m = log_p.exp(), log_m.exp()
    rest_p, rest_m = _rest(log_p), _rest(log_m)
    if divergence == "tv":
        return ((p - m).abs().sum(-1) + (rest_p - rest_m).abs()) / 2
    limits = torch.finfo(p.dtype)
    floor = math.log(limits.tiny)
    known = (m * (log_m.clamp(min=floor) - log_p.clamp(min=floor))).sum(-1)
    rest = rest_m * (rest_m.clamp(min=limits.eps) / rest_p.clamp(min=limits.eps)).log()
    return known + rest


def _rest(logprobs: Tensor) -> Tensor:
    """[T], mass of everything but these ids ([T, K], the sampled one first), at least 0."""
    # expm1: where the sampled token is nearly certain, 1 - p is a small difference.
    first, others = logprobs[:, 0], logprobs[:, 1:]
    return (-torch.expm1(first) - others.exp().sum(-1)).clamp(min=0)
