"""Advantages against exact arithmetic."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.advantages import group_advantages, make_trajectories
from megatron_drpo.config import AdvantageConfig
from megatron_drpo.types import Prompt, Rollout

REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-10, 10, width=32))
GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(REWARDS, min_size=size, max_size=size), min_size=1, max_size=4)
)


@given(groups=GROUPS)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("estimator", ["group-mean", "leave-one-out"])
def test_advantages_equal_exact_arithmetic(groups, estimator, divide):
    got = group_advantages(torch.tensor(groups, dtype=torch.float64), estimator, divide)
    assert got.dtype == torch.float32
    for group, row in zip(groups, got.tolist(), strict=True):
        exact = [Fraction(r) for r in group]
        for i, reward in enumerate(exact):
            others = exact[:i] + exact[i + 1 :]
            pool = exact if estimator == "group-mean" else others
            want = float(reward - sum(pool) / len(pool))
            if divide:
                want /= statistics.stdev(group) + 1e-6
            assert row[i] == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("estimator", ["group-mean", "leave-one-out"])
def test_equal_rewards_give_exact_zeros(estimator, divide):
    rewards = torch.tensor([[0.1] * 3, [1 / 3] * 3, [1e30] * 3, [0.0] * 3], dtype=torch.float64)
    assert group_advantages(rewards, estimator, divide).eq(0).all()
    assert group_advantages(rewards[:, :1], estimator, divide).eq(0).all()


@given(groups=GROUPS, data=st.data())
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("estimator", ["group-mean", "leave-one-out"])
def test_failed_rewards_do_not_belong_to_their_group(groups, estimator, divide, data):
    """The others have the advantages that they have among themselves, the failed ones exact 0."""
    for group in groups:
        places = data.draw(st.lists(st.integers(0, len(group)), max_size=3))
        holed = list(group)
        for place in places:
            holed.insert(place, math.nan)
        rewards = torch.tensor([holed], dtype=torch.float64)
        got = group_advantages(rewards, estimator, divide)[0]
        alone = group_advantages(torch.tensor([group], dtype=torch.float64), estimator, divide)[0]
        failed = rewards[0].isnan()
        assert got[failed].eq(0).all()
        assert got[~failed].tolist() == pytest.approx(alone.tolist(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("estimator", ["group-mean", "leave-one-out"])
def test_fewer_than_two_judged_samples_are_exact_zeros(estimator, divide):
    nan = math.nan
    rewards = torch.tensor([[nan, 3.3, nan], [nan, nan, nan], [7.7, nan, nan], [nan, 0.1, 0.1]])
    assert group_advantages(rewards, estimator, divide).tolist() == [[0.0] * 3] * 4


def test_trajectories_keep_the_order_and_belong_to_their_group():
    rollouts = [
        Rollout(
            Prompt(f"p{i // 2}", "", torch.tensor([1]), None),
            i % 2,
            torch.tensor([2]),
            torch.tensor([-0.5]),
            "stop",
            0,
            "",
        )
        for i in range(4)
    ]
    trajectories = make_trajectories(rollouts, [1.0, 0.0, 5.0, 2.0], 2, AdvantageConfig())
    assert [t.rollout for t in trajectories] == rollouts
    assert [(t.reward, t.advantage) for t in trajectories] == [
        (1.0, 0.5),
        (0.0, -0.5),
        (5.0, 1.5),
        (2.0, -1.5),
    ]
    config = AdvantageConfig(advantage_estimator="leave-one-out")
    leave_one_out = make_trajectories(rollouts, [1.0, 0.0, 5.0, 2.0], 2, config)
    assert [t.advantage for t in leave_one_out] == [1.0, -1.0, 3.0, -3.0]


def test_samples_of_different_prompts_are_not_one_group():
    rollouts = [
        Rollout(
            Prompt(f"p{i}", "", torch.tensor([1]), None),
            0,
            torch.tensor([2]),
            torch.tensor([-0.5]),
            "stop",
            0,
            "",
        )
        for i in range(2)
    ]
    with pytest.raises(AssertionError, match="several prompts"):
        make_trajectories(rollouts, [1.0, 0.0], 2, AdvantageConfig())
