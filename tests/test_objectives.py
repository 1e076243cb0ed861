"""DRPO against its closed form: value, gradient, weight, bounds and limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.objectives import TokenObjective, build_objective, drpo

DELTAS = [0.05, 0.5, 12.5]


def tokens(rows: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 log pi, log mu and advantages of all sizes and signs; ratios from 1/30 to 30."""
    generator = torch.Generator().manual_seed(3)
    behaviour = -6 * torch.rand(rows, generator=generator) ** 2
    drift = 3.4 * (2 * torch.rand(rows, generator=generator) - 1)
    advantages = torch.randn(rows, generator=generator)
    drift[:20] = 0  # on-policy tokens
    advantages[10:40] = 0
    return (behaviour + drift).clamp(max=-1e-4), behaviour, advantages


def closed_form(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 8 in fp64 by probabilities: the loss, the weight and d loss / d log pi."""
    pi, mu, a = logprobs.double().exp(), behaviour.double().exp(), advantages.double()
    ratio = pi / mu
    objective = ratio * a - a.abs() / (2 * delta) * mu * (ratio - 1) ** 2
    weight = 1 - torch.sign(a * (ratio - 1)) * (pi - mu).abs() / delta
    return -objective, weight, -ratio * a * weight


def computed(*args: Tensor, delta: float) -> tuple[TokenObjective, Tensor]:
    """The objective, and its gradient by log pi."""
    logprobs = args[0].clone().requires_grad_()
    result = drpo(logprobs, *args[1:], delta=delta)
    (gradient,) = torch.autograd.grad(result.losses.sum(), logprobs)
    return result, gradient


@pytest.mark.parametrize("delta", DELTAS)
def test_loss_gradient_and_weight_equal_the_closed_form(delta: float) -> None:
    args = tokens()
    result, gradient = computed(*args, delta=delta)
    loss, weight, slope = closed_form(*args, delta)
    limit = {"rtol": 3e-6, "atol": 3e-6 / delta}
    torch.testing.assert_close(result.losses.double(), loss, **limit)
    torch.testing.assert_close(result.gradient_weights.double(), weight, **limit)
    torch.testing.assert_close(gradient.double(), slope, **limit)
    assert result.losses.dtype == result.gradient_weights.dtype == torch.float32
    assert not result.gradient_weights.requires_grad


@pytest.mark.parametrize("delta", DELTAS)
def test_weight_is_the_gradient_over_ratio_and_advantage(delta: float) -> None:
    """The weight is what is logged, the gradient what is trained: two computations, one truth."""
    logprobs, behaviour, advantages = (x.double() for x in tokens())
    result, gradient = computed(logprobs, behaviour, advantages, delta=delta)
    moved = advantages != 0
    weight = -gradient / ((logprobs - behaviour).exp() * advantages)
    torch.testing.assert_close(result.gradient_weights[moved], weight[moved])


@pytest.mark.parametrize("delta", DELTAS)
def test_gradient_equals_central_differences(delta: float) -> None:
    logprobs, behaviour, advantages = (x.double() for x in tokens())
    _, gradient = computed(logprobs, behaviour, advantages, delta=delta)
    step = 1e-6
    up, down = (
        drpo(logprobs + sign * step, behaviour, advantages, delta=delta).losses for sign in (1, -1)
    )
    torch.testing.assert_close(gradient, (up - down) / (2 * step), rtol=1e-6, atol=1e-6 / delta)


@settings(max_examples=300, deadline=None)
@given(
    log_pi=st.floats(-200, 0, width=32),
    log_mu=st.floats(-200, 0, width=32),
    advantage=st.floats(-1e3, 1e3, width=32),
    delta=st.floats(0.01, 100),
)
def test_weight_stays_inside_its_bounds(
    log_pi: float, log_mu: float, advantage: float, delta: float
) -> None:
    """Also where pi/mu overflows fp32."""
    result = drpo(*map(torch.tensor, ([log_pi], [log_mu], [advantage])), delta=delta)
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
def test_update_fades_at_the_boundary_and_is_corrected_beyond(
    mu: float, advantage: float, outwards: int, delta: float
) -> None:
    def at(distance: float) -> tuple[float, float]:
        pi = torch.tensor([mu + outwards * distance], dtype=torch.float64)
        fixed = torch.tensor([mu], dtype=torch.float64).log(), torch.tensor([advantage]).double()
        result, gradient = computed(pi.log(), *fixed, delta=delta)
        return result.gradient_weights.item(), -gradient.item()

    assert at(0)[0] == pytest.approx(1)
    assert at(delta / 2)[0] == pytest.approx(0.5)
    weight, ascent = at(delta)
    assert weight == pytest.approx(0, abs=1e-9) and ascent == pytest.approx(0, abs=1e-9)
    # Ascent on log pi goes with the advantage inside, and against it beyond.
    assert at(0.9 * delta)[1] * advantage > 0
    assert at(1.1 * delta)[1] * advantage < 0
    assert at(2 * delta)[0] == pytest.approx(-1)


def test_update_towards_the_behaviour_policy_is_amplified() -> None:
    """pi below mu with A > 0, and pi above mu with A < 0: the weight is 1 + |pi - mu| / delta."""
    logprobs, behaviour = torch.tensor([0.1, 0.5]).log(), torch.tensor([0.5, 0.1]).log()
    result = drpo(logprobs, behaviour, torch.tensor([1.0, -1.0]), delta=0.4)
    torch.testing.assert_close(result.gradient_weights, torch.tensor([2.0, 2.0]))


def test_large_delta_is_the_importance_weighted_policy_gradient() -> None:
    logprobs, behaviour, advantages = (x.double() for x in tokens())
    result, gradient = computed(logprobs, behaviour, advantages, delta=1e12)
    plain = -(logprobs - behaviour).exp() * advantages
    torch.testing.assert_close(result.losses, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, plain, rtol=1e-10, atol=1e-10)
    assert (result.gradient_weights - 1).abs().max() < 1e-11


def test_zero_advantage_gives_exact_zeros() -> None:
    logprobs, behaviour, advantages = tokens()
    result, gradient = computed(logprobs, behaviour, torch.zeros_like(advantages), delta=0.05)
    assert not result.losses.any() and not gradient.any()
    assert (result.gradient_weights == 1).all()


def test_on_policy_the_loss_is_the_advantage_and_the_weight_one() -> None:
    _, behaviour, advantages = tokens()
    result, gradient = computed(behaviour, behaviour, advantages, delta=0.05)
    assert torch.equal(result.losses, -advantages) and torch.equal(gradient, -advantages)
    assert (result.gradient_weights == 1).all()


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_delta_must_be_above_zero(delta: float) -> None:
    with pytest.raises(ValueError, match=f"delta must be above 0, not {delta}"):
        drpo(*tokens(), delta=delta)


def test_inputs_stay_as_they_were() -> None:
    args = tokens()
    copies = [x.clone() for x in args]
    computed(*args, delta=0.1)
    assert all(torch.equal(x, copy) for x, copy in zip(args, copies, strict=True))


@pytest.mark.parametrize("advantage", [1.7, -0.4])
def test_expected_penalty_is_the_squared_l2_distance(advantage: float) -> None:
    """E_mu[r A - objective] = |A| / (2 delta) * sum_v (pi_v - mu_v)^2, by enumeration."""
    delta, size = 0.3, 9
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn((2, size), generator=generator, dtype=torch.float64)
    log_pi, log_mu = logits.log_softmax(-1)
    advantages = torch.full((size,), advantage, dtype=torch.float64)
    losses = drpo(log_pi, log_mu, advantages, delta=delta).losses
    penalty = losses + (log_pi - log_mu).exp() * advantages
    distance = (log_pi.exp() - log_mu.exp()).square().sum()
    expected = (log_mu.exp() * penalty).sum()
    torch.testing.assert_close(expected, abs(advantage) / (2 * delta) * distance)


def test_flag_reaches_the_objective() -> None:
    args = tokens()
    built = build_objective(ObjectiveConfig(drpo_delta=0.3))(*args)
    assert torch.equal(built.losses, drpo(*args, delta=0.3).losses)
    assert not torch.equal(built.losses, drpo(*args, delta=12.5).losses)
