"""What a gap between behaviour and trainer log-probs looks like: pure, from numbers to a sentence.

Each cause leaves a mark on d = log mu - log pi of the sampled tokens:

    temperature   another temperature's log-probs fit; or d is proportional to log pi + H, how much
                  a token surprises (the derivative of log softmax(z / T) in log T, up to sign)
    truncation    d has one sign: renormalisation over the kept ids raises every log-prob, by at
                  most minus the log of the mass kept
    ids           log mu and log pi have nothing in common: they are of different tokens
    numerics      d is small, of both signs
    weights       d is large, and yet the two go together: two versions of a model
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_FITS = 0.25
"""A variant explains the gap if it leaves at most this share of it."""
_UNRELATED = 0.3
"""Correlation of log mu and log pi below which they are of different tokens."""
_RELATED = 0.9
"""And from which on they are of one law, give or take what the text says."""
_ONE_SIDED = 0.95
"""Mean over mean absolute difference from which on it counts as one of one sign."""
_EXPLAINED = 0.75
"""Share of the squared gap that a temperature must explain."""


def diagnose(
    behaviour: Tensor,
    candidates: Mapping[str, Tensor],
    *,
    entropy: Tensor | None = None,
    rounding: float = 0.1,
) -> str:
    """A sentence or two: what the gap looks like, with the figures, and where to look.

    Args:
        behaviour: fp32 [T], log-probs that came with the sampled tokens; finite.
        candidates: fp32 [T] each: the trainer's log-probs of these tokens under the law they are
            said to be drawn from comes first; then under others, by name: `temperature 1`,
            `without truncation`.
        entropy: fp32 [T], of the trainer's law, nats; with it a temperature that is not among the
            candidates is recognised and estimated.
        rounding: mean gap in nats that arithmetic alone can make: 0.1 in bf16, 0.001 in fp32.

    Raises:
        ValueError: no tokens.
    """
    (name, expected), *variants = candidates.items()
    mu, pi = behaviour.double(), expected.double()
    if not mu.numel():
        raise ValueError("there is no token to compare")
    difference = mu - pi
    gap = _mean_abs(difference)
    if gap == 0:
        return f"Behaviour log-probs equal {name}."
    closest = min(variants, key=lambda item: _mean_abs(mu - item[1]), default=None)
    if closest and (left := _mean_abs(mu - closest[1].double())) <= _FITS * gap:
        return (
            f"It looks like another law, {closest[0]}: the gap to its log-probs is {left:.2g} nats "
            f"per token instead of {gap:.2g}; check what the engine is told to return (vLLM: "
            "--logprobs-mode processed_logprobs)."
        )
    shift = next((by for by in (1, -1) if _shifted(mu, pi, by) <= _FITS * gap), None)
    if shift:
        side = "after" if shift > 0 else "before"
        return (
            f"It looks like log-probs in the wrong place: each is that of the token {side} it; "
            "check how the engine's answer is cut into prompt and response."
        )
    correlation = _correlation(mu, pi)
    if correlation < _UNRELATED and gap > rounding:
        return (
            f"It looks like different tokens (tokenizer): the two hardly go together (correlation "
            f"{correlation:.2f}), so that ids mean one thing to the engine and another to the "
            "trainer, or the prompt differs, or the engine serves an unrelated model; compare "
            "tokenizer and config.json of both."
        )
    related = correlation >= _RELATED
    if related and difference.mean() >= _ONE_SIDED * gap:
        return (
            "It looks like truncation: tokens are likelier to the engine than to the trainer, by "
            f"up to {float(difference.max()):.2g} nats, and none is less likely, as after a cut "
            f"that keeps {math.exp(-float(difference.max())):.0%} of the mass; check top-p, top-k "
            "and min-p of the engine, its generation_config.json included."
        )
    if related and difference.mean() <= -_ONE_SIDED * gap:
        return (
            "It looks like truncation: tokens are less likely to the engine than to the trainer, "
            f"by up to {float(-difference.min()):.2g} nats, and none is likelier: the engine's "
            "log-probs are not renormalised over the kept ids (SGLang returns them before "
            "truncation)."
        )
    if related and entropy is not None:
        slope, explained = _temperature(difference, pi + entropy.double())
        if explained >= _EXPLAINED and slope > -1:
            return (
                "It looks like temperature: the gap grows with how unusual a token is, as if the "
                f"engine sampled at about {1 / (1 + slope):.2g} times the trainer's temperature; "
                "compare the two, and the engine's generation_config.json."
            )
    if gap <= rounding:
        return (
            f"It looks like numerics: {gap:.2g} nats, within the {rounding:g} that other kernels "
            "or a lower precision make; or the weights are a few updates old."
        )
    return (
        f"It looks like other weights: the two go together (correlation {correlation:.2f}) but "
        f"differ by {gap:.2g} nats, more than the {rounding:g} that rounding makes; the engine's "
        "weights are stale or of another model, or its prompt differs: check its version and the "
        "last weight sync."
    )


def _mean_abs(difference: Tensor) -> float:
    return float(difference.double().abs().mean())


def _shifted(mu: Tensor, pi: Tensor, by: int) -> float:
    """The gap if each mu belongs to the token `by` places later."""
    if mu.numel() < 3:
        return math.inf
    return _mean_abs(mu[:-1] - pi[1:] if by > 0 else mu[1:] - pi[:-1])


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 1 where one of them does not vary, which says nothing against them."""
    if x.numel() < 3 or float(x.std()) == 0 or float(y.std()) == 0:
        return 1.0
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _temperature(difference: Tensor, surprise: Tensor) -> tuple[float, float]:
    """a of d = a (log pi + H), which is T / T' - 1 to first order, and the share of d^2 explained.

    With z = logits / T: d log softmax(s z)_y / ds at s = 1 is z_y - E[z] = log pi_y + H.
    """
    slope = float((difference * surprise).sum() / surprise.square().sum())
    left = (difference - slope * surprise).square().sum() / difference.square().sum()
    return slope, 1 - float(left)
