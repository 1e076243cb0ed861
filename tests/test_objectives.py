"""The objectives against oracles that loop over tokens in plain floats: value, gradient, weight.

An oracle is a function of (x, x0): log pi where it is differentiated, and where a stop-gradient
holds it. Central differences in x are its gradient; nothing of the package is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.config import OBJECTIVE_FIELDS, ObjectiveConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.objectives import (
    OBJECTIVES,
    Needs,
    TokenObjective,
    Tokens,
    bucket_divergence,
    build_objective,
    drpo,
    gspo,
    pg_is,
    ppo,
    reference_kl,
    spo,
)

T, V, K = 240, 10, 3


@dataclass(frozen=True)
class Token:
    """What an oracle sees of one token."""

    m: float
    a: float
    log_s: float
    pi: list[float]
    mu: list[float]
    told_apart: list[int]
    """The sampled id and the behaviour policy's top K."""


@cache
def world() -> tuple[Tokens, list[Token]]:
    """fp64 tokens drawn from known distributions: all fields, all signs, some on policy."""
    generator = torch.Generator().manual_seed(3)
    mu = (2 * torch.randn((T, V), generator=generator, dtype=torch.float64)).log_softmax(-1)
    moved = 0.8 * torch.randn((T, V), generator=generator, dtype=torch.float64)
    moved[:20] = 0
    pi = (mu + moved).log_softmax(-1)
    sampled = torch.multinomial(mu.exp(), 1, generator=generator)
    topk = mu.topk(K).indices
    advantages = torch.randn(T, generator=generator, dtype=torch.float64)
    advantages[10:40] = 0
    log_pi, log_mu = pi.gather(1, sampled)[:, 0], mu.gather(1, sampled)[:, 0]
    old = log_mu + 0.3 * torch.randn(T, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([1, 3, 8, 12] * 10)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def mean(values: Tensor) -> Tensor:
        sums = torch.zeros(len(lengths), dtype=values.dtype).index_add_(0, sequence, values)
        return (sums / lengths)[sequence]

    tokens = Tokens(
        logprobs=log_pi,
        behaviour_logprobs=log_mu,
        advantages=advantages,
        old_logprobs=old,
        sequence_log_ratio=mean(log_pi - log_mu),
        sequence_log_weight=mean(old - log_mu),
        sequence_length=lengths[sequence],
        reference_logprobs=log_mu + moved[:, 0],
        entropy=-(pi.exp() * pi).sum(-1),
        topk_logprobs=pi.gather(1, topk),
        behaviour_topk_logprobs=mu.gather(1, topk),
        sampled_in_topk=topk == sampled,
        behaviour_l2=(pi.exp() - mu.exp()).square().sum(-1),
        reference_kl=moved[:, 1].square(),
    )
    known = [
        Token(
            log_mu[t].exp().item(),
            advantages[t].item(),
            tokens.required("sequence_log_ratio")[t].item(),
            pi[t].exp().tolist(),
            mu[t].exp().tolist(),
            sorted({*topk[t].tolist(), sampled[t].item()}),
        )
        for t in range(T)
    ]
    return tokens, known


def evaluate(objective: Callable[[Tokens], TokenObjective], tokens: Tokens):
    """The result and d losses / d log pi."""
    leaf = tokens.logprobs.detach().clone().requires_grad_()
    result = objective(replace(tokens, logprobs=leaf))
    (gradient,) = torch.autograd.grad(result.losses.sum(), leaf)
    return result, gradient


# Oracles: the objective as it is maximised.

Oracle = Callable[[Token, float, float], float]


def quadratic(of: Callable[[float, float], float], size: float) -> Oracle:
    def value(t: Token, x: float, x0: float) -> float:
        r = math.exp(x) / t.m
        return r * t.a - abs(t.a) / (2 * size) * of(t.m, r)

    return value


def clip(r: float, low: float, high: float) -> float:
    return min(max(r, 1 - low), 1 + high)


def surrogate(r: float, a: float, low: float, high: float, dual: float | None = None) -> float:
    value = min(r * a, clip(r, low, high) * a)
    return max(value, dual * a) if dual is not None and a < 0 else value


def truncated(low: float, high: float) -> Oracle:
    return lambda t, x, x0: clip(math.exp(x0) / t.m, low, high) * t.a * x


def split(p: float, m: float, kind: str) -> float:
    """Divergence of two Bernoulli variables."""
    if kind == "tv":
        return abs(p - m)
    return m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p))


def buckets(t: Token, kind: str) -> float:
    """Divergence of the two distributions with what is not told apart as one bucket."""
    ids = t.told_apart
    p, m = [t.pi[i] for i in ids], [t.mu[i] for i in ids]
    rest = [i for i in range(V) if i not in ids]
    p, m = [*p, sum(t.pi[i] for i in rest)], [*m, sum(t.mu[i] for i in rest)]
    if kind == "tv":
        return sum(abs(a - b) for a, b in zip(p, m, strict=True)) / 2
    return sum(b * math.log(b / a) for a, b in zip(p, m, strict=True))


def masked(kind: str, topk: bool, low: float, high: float, limit: float) -> Oracle:
    def value(t: Token, x: float, x0: float) -> float:
        p = math.exp(x0)
        distance = buckets(t, kind) if topk else split(p, t.m, kind)
        away = (t.a > 0 and p > t.m) or (t.a < 0 and p < t.m)
        if away and distance > (high if t.a > 0 else low):
            return 0.0
        return min(p / t.m, limit) * t.a * x

    return value


def dppo_case(name: str) -> Any:
    _, *topk, kind = name.split("_")
    given = {"dppo_delta_low": 0.06, "dppo_delta_high": 0.03, "dppo_ratio_limit": 1.5}
    return pytest.param(name, given, masked(kind, bool(topk), 0.06, 0.03, 1.5), id=name)


def ppo_oracle(dual: float | None) -> Oracle:
    return lambda t, x, x0: surrogate(math.exp(x) / t.m, t.a, 0.2, 0.28, dual)


CASES = [
    *(
        pytest.param(
            "drpo",
            {"drpo_delta": delta},
            quadratic(lambda m, r: m * (r - 1) ** 2, delta),
            id=f"drpo-{delta}",
        )
        for delta in (0.05, 0.5, 12.5)
    ),
    pytest.param("spo", {"spo_epsilon": 0.7}, quadratic(lambda m, r: (r - 1) ** 2, 0.7), id="spo"),
    pytest.param("pg_is", {}, lambda t, x, x0: math.exp(x) / t.m * t.a, id="pg_is"),
    *(
        pytest.param(
            "ppo",
            {"ppo_clip_high": 0.28, "ppo_dual_clip": dual},
            ppo_oracle(dual),
            id=f"ppo-{dual}",
        )
        for dual in (None, 1.5)
    ),
    pytest.param(
        "cispo", {"cispo_clip_low": 0.4, "cispo_clip_high": 0.6}, truncated(0.4, 0.6), id="cispo"
    ),
    pytest.param("cispo", {"cispo_clip_high": 0.1}, truncated(1.0, 0.1), id="cispo-high-only"),
    pytest.param(
        "gspo",
        {"gspo_clip_low": 0.1, "gspo_clip_high": 0.15},
        lambda t, x, x0: surrogate(math.exp(t.log_s + x - x0), t.a, 0.1, 0.15),
        id="gspo",
    ),
    *map(dppo_case, ("dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl")),
]


@pytest.mark.parametrize(("name", "given_", "oracle"), CASES)
def test_value_gradient_and_weight_equal_the_oracle(
    name: str, given_: dict[str, Any], oracle: Oracle
) -> None:
    tokens, known = world()
    result, gradient = evaluate(build_objective(ObjectiveConfig(name, **given_)), tokens)
    xs, step = tokens.logprobs.tolist(), 1e-6
    slope = torch.tensor(
        [
            (oracle(t, x + step, x) - oracle(t, x - step, x)) / (2 * step)
            for t, x in zip(known, xs, strict=True)
        ],
        dtype=torch.float64,
    )
    value = torch.tensor(
        [oracle(t, x, x) for t, x in zip(known, xs, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(result.losses, -value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, -slope, rtol=1e-6, atol=1e-7)
    log_ratio = tokens.logprobs - tokens.behaviour_logprobs
    ratio = (tokens.required("sequence_log_ratio") if name == "gspo" else log_ratio).exp()
    moved = tokens.advantages != 0
    weights = torch.where(moved, slope / (ratio * tokens.advantages), 1.0)
    torch.testing.assert_close(result.gradient_weights, weights, rtol=1e-5, atol=1e-5)
    # Two computations of the package, to rounding: what is logged is what is trained.
    exact = torch.where(moved, -gradient / (ratio * tokens.advantages), 1.0)
    torch.testing.assert_close(result.gradient_weights, exact, rtol=1e-9, atol=1e-9)
    assert not result.gradient_weights.requires_grad
    if name not in ("pg_is", "drpo", "spo"):  # the case is worth something
        assert 0.05 < ((weights[moved] - 1).abs() > 1e-3).double().mean() < 0.95


@pytest.mark.parametrize(("name", "given_", "oracle"), CASES)
def test_fp32_is_the_fp64_result_rounded(name: str, given_: dict[str, Any], oracle: Oracle) -> None:
    tokens, _ = world()
    optional = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    single = Tokens(**{k: v.float() if v.is_floating_point() else v for k, v in optional.items()})
    objective = build_objective(ObjectiveConfig(name, **given_))
    (expected, slope), (found, gradient) = evaluate(objective, tokens), evaluate(objective, single)
    limit = {"rtol": 2e-5, "atol": 2e-5}
    assert found.losses.dtype == found.gradient_weights.dtype == torch.float32
    torch.testing.assert_close(found.losses.double(), expected.losses, **limit)
    torch.testing.assert_close(gradient.double(), slope, **limit)
    torch.testing.assert_close(found.gradient_weights.double(), expected.gradient_weights, **limit)
    for key, value in found.diagnostics.items():
        torch.testing.assert_close(value.double(), expected.diagnostics[key], **limit)


def test_diagnostics_say_what_the_objective_did() -> None:
    tokens, known = world()

    def told(name: str, **given_: Any) -> dict[str, Tensor]:
        result = build_objective(ObjectiveConfig(name, **given_))(tokens)
        return {key: value.double() for key, value in result.diagnostics.items()}

    ratio = (tokens.logprobs - tokens.behaviour_logprobs).exp()
    rising, falling = tokens.advantages > 0, tokens.advantages < 0
    found = told("ppo", ppo_dual_clip=1.5)
    clipped = (rising & (ratio > 1.2)) | (falling & (ratio < 0.8))
    assert torch.equal(found["clipped"], clipped.double()) and clipped.any()
    dual = falling & (ratio > 1.5)
    assert torch.equal(found["dual_clipped"], dual.double()) and dual.any()
    assert "dual_clipped" not in told("ppo")
    beyond = (ratio > 1.6) & (tokens.advantages != 0)
    assert torch.equal(told("cispo", cispo_clip_high=0.6)["clipped"], beyond.double())
    found = told("dppo_topk_kl", dppo_ratio_limit=1.6)
    assert torch.equal(found["ratio_truncated"], beyond.double())
    expected = torch.tensor([buckets(t, "kl") for t in known], dtype=torch.float64)
    torch.testing.assert_close(found["divergence"], expected)
    weights = build_objective(ObjectiveConfig("dppo_topk_kl"))(tokens).gradient_weights
    assert torch.equal(told("dppo_topk_kl")["masked"], (weights == 0).double())
    plain = -ratio * tokens.advantages
    for name, given_ in (
        ("drpo", {"drpo_delta": 0.1}),
        ("spo", {}),
        ("drpo", {"drpo_penalty": "full"}),
    ):
        result = build_objective(ObjectiveConfig(name, **given_))(tokens)
        torch.testing.assert_close(told(name, **given_)["penalty"], result.losses - plain)


# DRPO's trust region.


@settings(max_examples=200, deadline=None)
@given(
    log_pi=st.floats(-200, 0, width=32),
    log_mu=st.floats(-200, 0, width=32),
    advantage=st.floats(-1e3, 1e3, width=32),
    delta=st.floats(0.01, 100),
)
def test_drpo_weight_stays_inside_its_bounds(
    log_pi: float, log_mu: float, advantage: float, delta: float
) -> None:
    """Also where pi/mu overflows fp32."""
    result = drpo(Tokens(*map(torch.tensor, ([log_pi], [log_mu], [advantage]))), delta=delta)
    weight = result.gradient_weights.item()
    rounding = 1e-6 * (1 + 1 / delta)
    assert 1 - 1 / delta - rounding <= weight <= 1 + 1 / delta + rounding
    pi, mu = math.exp(log_pi), math.exp(log_mu)
    if advantage * (pi - mu) >= 0:  # moving away, or not at all: never amplified
        assert weight <= 1 + rounding
    else:
        assert weight >= 1 - rounding


@pytest.mark.parametrize(
    ("mu", "advantage", "outwards"), [(0.2, 2.0, 1), (0.8, -3.0, -1), (1e-4, 0.5, 1)]
)
@pytest.mark.parametrize("delta", [0.05, 0.15])
def test_drpo_fades_at_the_boundary_and_corrects_beyond(
    mu: float, advantage: float, outwards: int, delta: float
) -> None:
    def at(distance: float) -> tuple[float, float]:
        pi, m, a = (
            torch.tensor([value], dtype=torch.float64)
            for value in (mu + outwards * distance, mu, advantage)
        )
        result, gradient = evaluate(lambda t: drpo(t, delta=delta), Tokens(pi.log(), m.log(), a))
        return result.gradient_weights.item(), -gradient.item()

    assert at(0)[0] == pytest.approx(1)
    assert at(delta / 2)[0] == pytest.approx(0.5)
    weight, ascent = at(delta)
    assert weight == pytest.approx(0, abs=1e-9) and ascent == pytest.approx(0, abs=1e-9)
    # Ascent on log pi goes with the advantage inside, and against it beyond.
    assert at(0.9 * delta)[1] * advantage > 0
    assert at(1.1 * delta)[1] * advantage < 0
    assert at(2 * delta)[0] == pytest.approx(-1)


@pytest.mark.parametrize("objective", [drpo, spo])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_radius_must_be_above_zero(objective: Any, value: float) -> None:
    name = "delta" if objective is drpo else "epsilon"
    with pytest.raises(ValueError, match=f"{name} must be above 0, not {value}"):
        objective(world()[0], **{name: value})


def test_without_a_limit_all_are_the_importance_weighted_policy_gradient() -> None:
    tokens, _ = world()
    expected, slope = evaluate(pg_is, tokens)
    for objective in (
        lambda t: drpo(t, delta=1e12),
        lambda t: spo(t, epsilon=1e12),
        lambda t: ppo(t, clip_low=1.0, clip_high=1e9),
    ):
        result, gradient = evaluate(objective, tokens)
        torch.testing.assert_close(result.losses, expected.losses, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("cispo",) and "dppo" not in n])
def test_on_policy_the_loss_is_the_advantage_and_the_weight_one(name: str) -> None:
    tokens = replace(world()[0], logprobs=world()[0].behaviour_logprobs)
    tokens = replace(tokens, sequence_log_ratio=torch.zeros(T).double())
    result, gradient = evaluate(build_objective(ObjectiveConfig(name)), tokens)
    assert torch.equal(result.losses, -tokens.advantages)
    assert torch.equal(gradient, -tokens.advantages)
    assert (result.gradient_weights == 1).all()


# Full-distribution DRPO, by enumeration of a small vocabulary.


@pytest.mark.parametrize("constant", [True, False])
def test_full_drpo_has_the_expected_gradient_if_the_advantages_size_is_constant(
    constant: bool,
) -> None:
    """E_mu over the sampled id of the gradient for the logits, sampled against full."""
    generator = torch.Generator().manual_seed(8)
    delta, size = 0.3, 9
    logits = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    log_mu = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(size, generator=generator, dtype=torch.float64)
    if constant:
        advantages = 0.7 * advantages.sign()
    log_pi = logits.log_softmax(-1)
    differences = log_pi.exp() - log_mu.exp()
    tokens = Tokens(
        log_pi, log_mu, advantages, behaviour_l2=differences.square().sum().expand(size)
    )

    def expected(result: TokenObjective) -> tuple[Tensor, Tensor]:
        loss = (log_mu.exp() * result.losses).sum()
        return loss, torch.autograd.grad(loss, logits, retain_graph=True)[0]

    sampled, slope = expected(drpo(tokens, delta=delta))
    full = drpo(tokens, delta=delta, penalty="full")
    full_loss, full_slope = expected(full)
    assert (full.gradient_weights == 1).all()
    if constant:
        torch.testing.assert_close(full_loss, sampled)
        torch.testing.assert_close(full_slope, slope)
        return
    assert (full_slope - slope).abs().max() > 0.1 * slope.abs().max()
    # Sampled weighs each id by its own |A|, full all of them by the mean.
    plain = -(log_pi.exp() * advantages).sum()
    sizes = advantages.abs()
    own = plain + (sizes * differences.square()).sum() / (2 * delta)
    mean = plain + (log_mu.exp() * sizes).sum() * differences.square().sum() / (2 * delta)
    for loss, (value, found) in ((own, (sampled, slope)), (mean, (full_loss, full_slope))):
        torch.testing.assert_close(value, loss)
        torch.testing.assert_close(found, torch.autograd.grad(loss, logits, retain_graph=True)[0])


# GSPO: separable per token, and the sequence-level objective all the same.


def test_gspo_per_token_is_the_sequence_objective() -> None:
    """Values and gradients of sum_n W_n min(s_n A_n, clip(s_n) A_n), W_n / R_n on each token."""
    low, high = 0.1, 0.15
    lengths, totals = [1, 3, 5, 2, 4, 2], [0.5, 1.0, 2.0, 0.7, 1.3, 0.1]
    generator = torch.Generator().manual_seed(5)
    shift = torch.tensor([0.3, 0.05, -0.4, -0.5, 0.02, 0.6], dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.8, -1.2, 0.4, -2.0], dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    log_mu = -3 * torch.rand(len(sequence), generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(len(sequence), generator=generator, dtype=torch.float64)
    leaf = (log_mu + shift[sequence] + noise).requires_grad_()
    parts = (leaf - log_mu).split(lengths)
    ratios = torch.stack([part.mean() for part in parts]).exp()
    values = torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    reference = -(torch.tensor(totals) * values).sum()
    weights = (torch.tensor(totals) / torch.tensor(lengths))[sequence]
    tokens = Tokens(
        leaf, log_mu, advantages[sequence], sequence_log_ratio=ratios.detach().log()[sequence]
    )
    result = gspo(tokens, clip_low=low, clip_high=high)
    loss = (weights * result.losses).sum()
    torch.testing.assert_close(loss, reference)
    expected, found = (torch.autograd.grad(x, leaf)[0] for x in (reference, loss))
    torch.testing.assert_close(found, expected)
    assert 0 < result.diagnostics["clipped"].sum() < len(sequence)


# Divergences over buckets.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bucket_divergences_are_finite_where_buckets_are_empty(dtype: torch.dtype) -> None:
    """Certain tokens, underflow, no rest, ids without mass under one or both policies."""
    extreme = [0.0, -1e-9, -1.0, -60.0, -1e4]
    pairs = torch.tensor(list(itertools.product(extreme, extreme)), dtype=dtype)
    size, none = len(pairs), -math.inf
    others = torch.tensor([[none, -2.0, none]] * size, dtype=dtype)
    behind = torch.tensor([[none, none, -1.5]] * size, dtype=dtype)
    tokens = Tokens(
        pairs[:, 0], pairs[:, 1], torch.ones(size, dtype=dtype), topk_logprobs=others,
        behaviour_topk_logprobs=behind, sampled_in_topk=torch.zeros((size, 3), dtype=torch.bool),
    )  # fmt: skip
    for topk in (False, True):
        kl = bucket_divergence(tokens, "kl", topk=topk)
        tv = bucket_divergence(tokens, "tv", topk=topk)
        assert kl.isfinite().all() and (kl > -1e-5).all()
        assert ((tv >= 0) & (tv < 1.2)).all()
    same = replace(tokens, behaviour_logprobs=tokens.logprobs)
    for kind in ("tv", "kl"):
        assert bucket_divergence(same, kind).abs().max() == 0


def test_a_sampled_id_among_the_topk_is_counted_once() -> None:
    p, m = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.3, 0.4]])
    tokens = Tokens(
        p[:, 1].log(), m[:, 1].log(), torch.ones(1), topk_logprobs=p.log(),
        behaviour_topk_logprobs=m.log(), sampled_in_topk=torch.tensor([[False, True]]),
    )  # fmt: skip
    assert bucket_divergence(tokens, "tv", topk=True).item() == pytest.approx(0.2)
    assert bucket_divergence(tokens, "tv").item() == pytest.approx(0.2)
    twice = replace(tokens, sampled_in_topk=torch.tensor([[False, False]]))
    assert bucket_divergence(twice, "tv", topk=True).item() != pytest.approx(0.2)


# Terms.


def test_kl_estimators_and_entropy_are_added_with_their_coefficients() -> None:
    tokens, _ = world()
    x = tokens.required("reference_logprobs") - tokens.logprobs
    expected = {
        "k1": (-x, torch.ones(T).double()),
        "k2": (x**2 / 2, -x),
        "k3": (x.exp() - 1 - x, 1 - x.exp()),
    }
    base, slope = evaluate(build_objective(ObjectiveConfig("ppo")), tokens)
    for name, (value, gradient) in expected.items():
        config = ObjectiveConfig("ppo", kl_coef=0.3, kl_estimator=name, entropy_coef=0.2)
        result, found = evaluate(build_objective(config), tokens)
        loss = base.losses + 0.3 * value - 0.2 * tokens.required("entropy")
        torch.testing.assert_close(result.losses, loss)
        torch.testing.assert_close(found, slope + 0.3 * gradient)
        torch.testing.assert_close(result.diagnostics["reference_kl"], value)
        assert torch.equal(result.gradient_weights, base.gradient_weights)


def test_full_kl_and_entropy_pass_their_own_gradients_on() -> None:
    tokens, _ = world()
    kl, entropy = (tokens.required(n).clone().requires_grad_() for n in ("reference_kl", "entropy"))
    config = ObjectiveConfig("pg_is", kl_coef=0.3, kl_estimator="full", entropy_coef=0.2)
    result = build_objective(config)(replace(tokens, reference_kl=kl, entropy=entropy))
    found = torch.autograd.grad(result.losses.sum(), [kl, entropy])
    torch.testing.assert_close(found[0], torch.full_like(kl, 0.3))
    torch.testing.assert_close(found[1], torch.full_like(entropy, -0.2))


def test_what_the_kl_estimators_gradients_average_to() -> None:
    """Over tokens of pi: k1 to nothing, k2 to KL(pi || ref), k3 to KL(ref || pi)."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    log_ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    tokens = Tokens(log_pi, log_pi.detach(), torch.ones(7), reference_logprobs=log_ref)

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    other = (log_ref.exp() * (log_ref - log_pi)).sum()
    expected = {"k1": torch.zeros(7).double(), "k2": slope(kl), "k3": slope(other)}
    for name, gradient in expected.items():
        estimate = (log_pi.exp().detach() * reference_kl(tokens, name)).sum()
        torch.testing.assert_close(slope(estimate), gradient)
        if name != "k2":
            torch.testing.assert_close(estimate, kl)


# Corrections.


CORRECTIONS = [
    {"tis_limit": 1.2},
    {"icepop_low": 0.8, "icepop_high": 1.3},
    {"icepop_high": 1.3},
    {"tis_limit": 1.2, "icepop_low": 0.7},
    {"sequence_mask": "geometric", "sequence_mask_low": 0.9, "sequence_mask_high": 1.1},
    {"sequence_mask": "product", "sequence_mask_low": 0.5, "sequence_mask_high": 2.0},
    {
        "tis_limit": 1.1, "icepop_low": 0.6, "icepop_high": 1.5, "sequence_mask": "geometric",
        "sequence_mask_low": 0.8, "sequence_mask_high": 1.2,
    },
]  # fmt: skip


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("given_", CORRECTIONS, ids=lambda g: "-".join(g))
@pytest.mark.parametrize("name", ["drpo", "ppo"])
def test_corrections_multiply_the_base_objective(
    name: str, given_: dict[str, Any], decoupled: bool
) -> None:
    tokens, _ = world()
    mu, old = tokens.behaviour_logprobs, tokens.required("old_logprobs")
    base, slope = evaluate(
        build_objective(ObjectiveConfig(name)),
        replace(tokens, behaviour_logprobs=old) if decoupled else tokens,
    )
    rho = ((old if decoupled else tokens.logprobs) - mu).exp().tolist()
    mean = tokens.required("sequence_log_weight" if decoupled else "sequence_log_ratio").tolist()
    length = tokens.required("sequence_length").tolist()
    factors, counts = [], {"tis_truncated": 0, "icepop_masked": 0, "sequence_masked": 0}
    for r, m, n in zip(rho, mean, length, strict=True):
        limit = given_.get("tis_limit", math.inf)
        factor = min(r, limit) / (1 if decoupled else r) if "tis_limit" in given_ else 1.0
        counts["tis_truncated"] += r > limit
        if not given_.get("icepop_low", 0) <= r <= given_.get("icepop_high", math.inf):
            factor, counts["icepop_masked"] = 0, counts["icepop_masked"] + 1
        if "sequence_mask" in given_:
            whole = math.exp(m * (n if given_["sequence_mask"] == "product" else 1))
            if not given_["sequence_mask_low"] <= whole <= given_["sequence_mask_high"]:
                factor, counts["sequence_masked"] = 0, counts["sequence_masked"] + 1
        factors.append(factor)
    factor = torch.tensor(factors, dtype=torch.float64)
    policy = "trainer" if decoupled else "behaviour"
    config = ObjectiveConfig(name, proximal_policy=policy, **given_)
    result, gradient = evaluate(build_objective(config), tokens)
    torch.testing.assert_close(result.losses, base.losses * factor)
    torch.testing.assert_close(gradient, slope * factor)
    weights = torch.where(tokens.advantages == 0, 1.0, base.gradient_weights * factor)
    torch.testing.assert_close(result.gradient_weights, weights)
    told = {key: value.sum() for key, value in result.diagnostics.items() if key in counts}
    assert told == {key: count for key, count in counts.items() if count}
    assert told


def test_the_trainers_policy_alone_changes_the_anchor_and_nothing_else() -> None:
    tokens, _ = world()
    for name in OBJECTIVES:
        if "topk" in name:
            continue
        objective = build_objective(ObjectiveConfig(name, proximal_policy="trainer"))
        assert objective.decoupled
        anchored = replace(tokens, behaviour_logprobs=tokens.required("old_logprobs"))
        expected, slope = evaluate(build_objective(ObjectiveConfig(name)), anchored)
        result, gradient = evaluate(objective, tokens)
        assert torch.equal(result.losses, expected.losses) and torch.equal(gradient, slope)
        assert not torch.equal(
            result.losses, build_objective(ObjectiveConfig(name))(tokens).losses
        ) or name in ("cispo", "gspo")


@pytest.mark.parametrize("name", [*OBJECTIVES, "user"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_token_is_inert_however_wild(
    name: str, dtype: torch.dtype, users: Callable[[str], str]
) -> None:
    """exp(log pi - log mu) overflows: a factor of 0 times that would be NaN."""
    if name == "user":
        source = "def f(t): return -(t.logprobs - t.behaviour_logprobs).exp() * t.advantages\n"
        name = users(source) + ":f"
    behaviour = torch.tensor([-1.0, -1e4, -1.0, -0.5], dtype=dtype)
    logprobs = torch.tensor([-1.1, -0.1, -1e4, -0.6], dtype=dtype)
    topk = torch.full((4, 2), -3.0, dtype=dtype)
    tokens = Tokens(
        logprobs, behaviour, torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=dtype),
        sequence_log_ratio=torch.tensor([0.01, -5e3, 3e3, 0.02], dtype=dtype),
        sequence_length=torch.tensor([4, 4, 4, 4]), topk_logprobs=topk,
        behaviour_topk_logprobs=topk, sampled_in_topk=torch.zeros((4, 2), dtype=torch.bool),
    )  # fmt: skip
    sequences = {"sequence_mask_low": 0.5, "sequence_mask_high": 2.0}
    for given_ in (
        {"icepop_low": 0.5, "icepop_high": 5.0},
        {"sequence_mask": "product", **sequences},
        {"sequence_mask": "geometric", **sequences},
    ):
        objective = build_objective(ObjectiveConfig(name, **given_))
        result, gradient = evaluate(objective, tokens)
        assert not result.losses[1:3].any() and not gradient[1:3].any()
        assert not result.gradient_weights[1:3].any()
        for key in {"clipped", "masked", "ratio_truncated", "penalty"} & result.diagnostics.keys():
            assert not result.diagnostics[key][1:3].any(), key
        assert result.losses[[0, 3]].all() and result.losses.isfinite().all()


@pytest.mark.parametrize("log_ratio", [-30.0, 30.0, 60.0, 79.0, 200.0])
def test_no_ratio_takes_a_tokens_gradient_away(log_ratio: float) -> None:
    """A clamp would, beyond its limit; up to 80 nats r is exact, and from there on constant."""
    expected = math.exp(min(log_ratio, 0.9 * math.log(torch.finfo(torch.float32).max)))
    logprobs, advantages = torch.tensor([-0.5, -0.5]), torch.tensor([2.0, -1.0])
    tokens = Tokens(logprobs, logprobs - log_ratio, advantages)
    result, gradient = evaluate(pg_is, tokens)
    ratios = torch.full((2,), expected)
    torch.testing.assert_close(result.losses, -ratios * advantages, rtol=2e-5, atol=0.0)
    torch.testing.assert_close(gradient, -ratios * advantages, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_finite_input_never_gives_nan(name: str, data: st.DataObject) -> None:
    logs = st.floats(-1e6, 0, width=32) | st.sampled_from(
        [0.0, -1e-7, -40.0, -90.0, -110.0, -200.0]
    )
    column = st.lists(logs, min_size=4, max_size=4).map(torch.tensor)
    sizes = st.floats(-1e3, 1e3, width=32)
    tokens = Tokens(
        data.draw(column),
        data.draw(column),
        torch.tensor(data.draw(st.lists(sizes, min_size=4, max_size=4))),
        old_logprobs=data.draw(column),
        sequence_log_ratio=data.draw(column) - data.draw(column),
        sequence_log_weight=data.draw(column) - data.draw(column),
        sequence_length=torch.tensor([1, 7, 300, 10**5]),
        reference_logprobs=data.draw(column),
        topk_logprobs=torch.stack([data.draw(column), data.draw(column)], 1),
        behaviour_topk_logprobs=torch.stack([data.draw(column), data.draw(column)], 1),
        sampled_in_topk=torch.tensor(
            [[True, False], [False, True], [False, False], [False, False]]
        ),
    )
    given_: dict[str, Any] = {"drpo_delta": 0.5} if name == "drpo" else {}
    if "topk" not in name:
        given_["proximal_policy"] = data.draw(st.sampled_from(["behaviour", "trainer"]))
    if data.draw(st.booleans()):
        given_ |= {"icepop_high": 5.0, "sequence_mask": "product", "kl_coef": 0.1}
        given_ |= {"sequence_mask_low": 0.0, "sequence_mask_high": 2.0}
        if given_.get("proximal_policy") == "trainer":
            given_["tis_limit"] = 2.0
    result, gradient = evaluate(build_objective(ObjectiveConfig(name, **given_)), tokens)
    for values in (result.losses, gradient, result.gradient_weights, *result.diagnostics.values()):
        assert not values.isnan().any()


# Every objective, whatever is on.


def everything_on(name: str) -> ObjectiveConfig:
    given_: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.1, "icepop_high": 3.0}
    given_ |= {"sequence_mask": "geometric", "sequence_mask_low": 0.5, "sequence_mask_high": 1.3}
    return ObjectiveConfig(name, **given_)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30), size=st.integers(0, T))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_does_not_depend_on_its_neighbours(name: str, seed: int, size: int) -> None:
    """Any tokens in any order: each has the result that it has among all."""
    tokens, _ = world()
    objective = build_objective(everything_on(name))
    result, gradient = evaluate(objective, tokens)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))[:size]
    part, slope = evaluate(objective, tokens[order])
    limit = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(part.losses, result.losses[order], **limit)
    torch.testing.assert_close(slope, gradient[order], **limit)
    torch.testing.assert_close(part.gradient_weights, result.gradient_weights[order], **limit)
    assert part.diagnostics.keys() == result.diagnostics.keys()
    for key, value in part.diagnostics.items():
        torch.testing.assert_close(value, result.diagnostics[key][order], **limit)


OPTIONAL = {
    "sequence_log_ratio": "sequences",
    "sequence_log_weight": "sequence_weights",
    "sequence_length": "sequences sequence_weights",
    "topk_logprobs": "topk",
    "behaviour_topk_logprobs": "topk",
    "sampled_in_topk": "topk",
} | {n: n for n in ("reference_logprobs", "behaviour_l2", "reference_kl")}


@pytest.mark.parametrize(
    "config",
    [
        *(ObjectiveConfig(name) for name in OBJECTIVES),
        everything_on("dppo_topk_kl"),
        ObjectiveConfig(drpo_penalty="full", kl_coef=1.0, kl_estimator="full"),
        ObjectiveConfig("gspo", proximal_policy="trainer", entropy_coef=0.1, tis_limit=2.0),
        replace(everything_on("ppo"), proximal_policy="trainer"),
    ],
    ids=lambda config: config.objective,
)
def test_an_objective_reads_what_it_says_it_needs(config: ObjectiveConfig) -> None:
    tokens, _ = world()
    objective = build_objective(config)
    needed = {
        name
        for name, flags in OPTIONAL.items()
        if any(getattr(objective.needs, flag) for flag in flags.split())
    }
    absent = dict.fromkeys(OPTIONAL.keys() - needed)
    lean = replace(tokens, **absent)
    assert torch.equal(objective(lean).losses, objective(tokens).losses)
    for name in needed - {"sequence_length"}:  # a geometric mean does without
        with pytest.raises(ValueError, match=f"Tokens.{name}"):
            objective(replace(lean, **{name: None}))


def test_every_name_has_a_builder_that_reads_just_its_fields() -> None:
    assert OBJECTIVES.keys() == OBJECTIVE_FIELDS.keys()
    constants = set(itertools.chain(*OBJECTIVE_FIELDS.values()))

    class Recorder:
        def __init__(self, config: ObjectiveConfig) -> None:
            self.config, self.read = config, set()

        def __getattr__(self, name: str) -> Any:
            if name == "dppo_deltas":
                self.read |= {"dppo_delta_low", "dppo_delta_high"}
            self.read.add(name)
            return getattr(self.config, name)

    for name, build in OBJECTIVES.items():
        recorder: Any = Recorder(ObjectiveConfig(name))
        build(recorder)
        assert recorder.read & constants == set(OBJECTIVE_FIELDS[name]), name


def test_inputs_stay_as_they_were() -> None:
    tokens, _ = world()
    copies = {f.name: getattr(tokens, f.name).clone() for f in fields(tokens)}
    for name in OBJECTIVES:
        evaluate(build_objective(everything_on(name)), tokens)
    assert all(torch.equal(getattr(tokens, name), copy) for name, copy in copies.items())


# The user's own.


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    numbers = itertools.count()

    def write(source: str) -> str:
        name = f"mine_{tmp_path.name}_{next(numbers)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_a_users_losses_get_their_weight_by_autograd(users: Callable[[str], str]) -> None:
    """DRPO written by a user has the weights that DRPO says it has."""
    name = users(
        "def mine(t):\n"
        "    ratio = (t.logprobs - t.behaviour_logprobs).exp()\n"
        "    penalty = t.advantages.abs() / 0.6 * t.behaviour_logprobs.exp() * (ratio - 1) ** 2\n"
        "    return penalty - ratio * t.advantages\n"
    )
    tokens, _ = world()
    objective = build_objective(ObjectiveConfig(f"{name}:mine"))
    assert objective.needs == Needs() and objective.name == f"{name}:mine"
    result, gradient = evaluate(objective, tokens)
    expected, slope = evaluate(lambda t: drpo(t, delta=0.3), tokens)
    torch.testing.assert_close(result.losses, expected.losses)
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(result.gradient_weights, expected.gradient_weights)
    with torch.no_grad():  # as where only the diagnostics are wanted
        silent = objective(tokens)
    assert not silent.losses.requires_grad
    torch.testing.assert_close(silent.gradient_weights, expected.gradient_weights)


def test_a_users_objective_says_what_it_needs_and_may_return_everything(
    users: Callable[[str], str],
) -> None:
    name = users(
        "import torch\n"
        "from megatron_drpo.objectives import Needs, TokenObjective\n"
        "def mine(t):\n"
        "    return TokenObjective(-t.logprobs * t.advantages - 0.5 * t.behaviour_l2,\n"
        "                          torch.full_like(t.advantages, 0.25),\n"
        "                          {'rare': (t.behaviour_logprobs < -5).to(t.advantages)})\n"
        "mine.needs = Needs(behaviour_l2=True)\n"
    )
    tokens, _ = world()
    objective = build_objective(ObjectiveConfig(f"{name}:mine", kl_coef=0.1))
    assert objective.needs == Needs(behaviour_l2=True, reference_logprobs=True)
    result = objective(replace(tokens, logprobs=tokens.logprobs.clone().requires_grad_()))
    assert (result.gradient_weights == 0.25).all()
    assert result.diagnostics.keys() == {"rare", "reference_kl"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def ff(t): return t.logprobs", "has no function 'f' .did you mean ff"),
        ("f = 3", "has no function 'f'"),
        ("async def f(t): return t.logprobs", "async"),
        ("import no_such_package", "ModuleNotFoundError"),
        (
            "def f(t): return t.logprobs / (t.advantages * 0)",
            "losses of made-up tokens are .*nan|inf",
        ),
        ("def f(t): return 1.0", "returned float; must be a tensor of losses"),
        ("def f(t): return t.logprobs.sum()", r"shape \[\]; must be one per token, \[4\]"),
        ("def f(t): return t.logprobs.long()", "dtype torch.int64; must be floats"),
        ("def f(t): return -t.advantages", "without gradient"),
        ("def f(t): return t.logprobs.detach() * t.advantages", "without gradient"),
        (
            "import torch\ndef f(t): return torch.ones(len(t.advantages), requires_grad=True)",
            "do not depend on tokens.logprobs",
        ),
        (
            "def f(t): return -(t.advantages - t.advantages.mean()) * t.logprobs",
            "own entries only",
        ),
        ("def f(t): return t.nothing", r"raised AttributeError: .*\.py:1\)"),
        ("def f(t): return t.behaviour_l2 * t.logprobs", "raised TypeError"),
        (
            "def f(t): return t.logprobs\nf.needs = 'entropy'",
            "must be megatron_drpo.objectives.Needs",
        ),
        (
            "from megatron_drpo.objectives import TokenObjective\n"
            "def f(t): return TokenObjective(t.logprobs, t.advantages.sum())",
            "gradient_weights .*must be a detached tensor",
        ),
        (
            "from megatron_drpo.objectives import TokenObjective\n"
            "def f(t): return TokenObjective(t.logprobs, t.advantages, {'x': t.logprobs})",
            "x tensor.*must be a detached tensor",
        ),
    ],
)
def test_a_users_objective_that_cannot_be_used(
    users: Callable[[str], str], source: str, said: str
) -> None:
    name = f"{users(source)}:f"
    with pytest.raises(ConfigError, match=f"(?s)^--objective {name}: .*{said}"):
        build_objective(ObjectiveConfig(name))


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--objective nowhere:f: no module 'nowhere'"):
        build_objective(ObjectiveConfig("nowhere:f"))
