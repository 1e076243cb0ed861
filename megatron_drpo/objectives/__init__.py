"""Objectives: pure functions of per-token tensors.

Where it fits: L1, between the vocab-parallel log-probs and the aggregation. In: `Tokens`, what is
known of each loss token. Out: `TokenObjective`, one loss and one gradient weight per token. No
function here reduces over tokens, knows a device or a process group, or changes its input.
The mathematics, with sources, is in docs/objectives.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.objectives.clipped import cispo, gspo, pg_is, ppo
from megatron_drpo.objectives.corrections import corrected, importance_correction, neutralised
from megatron_drpo.objectives.dppo import Divergence, bucket_divergence, dppo
from megatron_drpo.objectives.drpo import drpo, spo
from megatron_drpo.objectives.terms import reference_kl
from megatron_drpo.objectives.tokens import Needs, Objective, TokenObjective, Tokens
from megatron_drpo.objectives.user import load_user_objective


def _drpo(config: ObjectiveConfig) -> Objective:
    penalty = config.drpo_penalty
    function = partial(drpo, delta=config.drpo_delta, penalty=penalty)
    return Objective("drpo", function, Needs(behaviour_l2=penalty == "full"))


def _dppo(config: ObjectiveConfig, *, divergence: Divergence, topk: bool = False) -> Objective:
    low, high = config.dppo_deltas
    function = partial(
        dppo,
        divergence=divergence,
        topk=topk,
        delta_low=low,
        delta_high=high,
        ratio_limit=config.dppo_ratio_limit,
    )
    return Objective(config.objective, function, Needs(topk=topk))


def _ppo(config: ObjectiveConfig) -> Objective:
    limits = {"clip_low": config.ppo_clip_low, "clip_high": config.ppo_clip_high}
    return Objective("ppo", partial(ppo, **limits, dual_clip=config.ppo_dual_clip))


def _spo(config: ObjectiveConfig) -> Objective:
    return Objective("spo", partial(spo, epsilon=config.spo_epsilon))


def _pg_is(config: ObjectiveConfig) -> Objective:
    return Objective("pg_is", pg_is)


def _cispo(config: ObjectiveConfig) -> Objective:
    limits = {"clip_low": config.cispo_clip_low, "clip_high": config.cispo_clip_high}
    return Objective("cispo", partial(cispo, **limits))


def _gspo(config: ObjectiveConfig) -> Objective:
    limits = {"clip_low": config.gspo_clip_low, "clip_high": config.gspo_clip_high}
    return Objective("gspo", partial(gspo, **limits), Needs(sequences=True))


OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "drpo": _drpo,
    "dppo_tv": partial(_dppo, divergence="tv"),
    "dppo_kl": partial(_dppo, divergence="kl"),
    "dppo_topk_tv": partial(_dppo, divergence="tv", topk=True),
    "dppo_topk_kl": partial(_dppo, divergence="kl", topk=True),
    "ppo": _ppo,
    "spo": _spo,
    "pg_is": _pg_is,
    "cispo": _cispo,
    "gspo": _gspo,
}
"""By name, what binds the constants, those that `config.OBJECTIVE_FIELDS` lists, to a function."""


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `--objective` names, with everything that is added to it.

    The loss of a token is `base * factor + kl_coef * KL - entropy_coef * entropy`, the factor being
    that of the importance corrections.

    Raises:
        ConfigError: a MODULE:FUNCTION of the user cannot be loaded or fails on made-up tokens.
    """
    name = config.objective
    base = OBJECTIVES[name](config) if name in OBJECTIVES else load_user_objective(name)
    decoupled = config.proximal_policy == "trainer"
    masks = config.sequence_mask != "off"
    full = config.kl_estimator == "full"
    needs = base.needs | Needs(
        sequences=masks and not decoupled,
        sequence_weights=masks and decoupled,
        reference_logprobs=config.kl_coef > 0 and not full,
        reference_kl=config.kl_coef > 0 and full,
    )
    return Objective(name, partial(_composed, base=base, config=config), needs, decoupled)


def _composed(tokens: Tokens, *, base: Objective, config: ObjectiveConfig) -> TokenObjective:
    decoupled = config.proximal_policy == "trainer"
    seen = tokens
    if decoupled:
        seen = replace(tokens, behaviour_logprobs=tokens.required("old_logprobs"))
    if config.corrects:
        correction = importance_correction(
            tokens,
            decoupled=decoupled,
            tis_limit=config.tis_limit,
            icepop=_bounds(config.icepop_low, config.icepop_high),
            sequence_mask=config.sequence_mask,
            sequence_bounds=_bounds(config.sequence_mask_low, config.sequence_mask_high),
        )
        result = base(neutralised(seen, correction.masked))
        result = corrected(result, tokens.advantages, correction)
    else:
        result = base(seen)
    if config.kl_coef:
        kl = reference_kl(tokens, config.kl_estimator)
        result = replace(
            result,
            losses=result.losses + config.kl_coef * kl,
            diagnostics={**result.diagnostics, "reference_kl": kl.detach()},
        )
    if config.entropy_coef:
        bonus = config.entropy_coef * tokens.required("entropy")
        result = replace(result, losses=result.losses - bonus)
    return result


def _bounds(low: float | None, high: float | None) -> tuple[float, float] | None:
    """(low, high) with the one that is not given left open; None where neither is."""
    if low is None and high is None:
        return None
    return 0.0 if low is None else low, math.inf if high is None else high


__all__ = [
    "OBJECTIVES",
    "Needs",
    "Objective",
    "TokenObjective",
    "Tokens",
    "bucket_divergence",
    "build_objective",
    "cispo",
    "dppo",
    "drpo",
    "gspo",
    "importance_correction",
    "pg_is",
    "ppo",
    "reference_kl",
    "spo",
]
