"""From a row's hidden states to its loss: what is inert, what is refused, and the plain way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.config import ObjectiveConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.objectives import build_objective
from megatron_drpo.packing import pack
from megatron_drpo.row_loss import OutputLayer, check_finite, fused_loss, plain_loss, score
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory

VOCAB, HIDDEN = 23, 6
LAYER = OutputLayer(vocab_size=VOCAB, temperature=0.7, group=None)
DRPO = build_objective(ObjectiveConfig(drpo_delta=0.5))


def a_row(masked: bool = False) -> Row:
    generator = torch.Generator().manual_seed(4)
    members = []
    for number, length in enumerate((3, 5, 1)):
        logprobs = -3 * torch.rand(length, generator=generator)
        mask = None
        if masked and length > 1:
            mask = torch.arange(length) != 1
            logprobs[1] = torch.nan
        rollout = Rollout(
            Prompt(f"p{number}", "", torch.tensor([1, 2]), None),
            sample=number,
            response_ids=torch.randint(0, VOCAB, (length,), generator=generator),
            behaviour_logprobs=logprobs,
            finish_reason="stop",
            policy_version=0,
            response_text="",
            loss_mask=mask,
        )
        members.append(Trajectory(rollout, 0.0, 1.0 - number))
    ((row,),) = pack(
        members, max_tokens=64, num_replicas=1, aggregation="token-mean", horizon=1, pad_multiple=8
    )
    return row


def tensors(row: Row) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(row.tokens.numel(), HIDDEN, generator=generator)
    return hidden.requires_grad_(), torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()


def scored(row: Row, hidden: Tensor, weight: Tensor) -> Row:
    return replace(row, old_logprobs=score(row, hidden, weight, LAYER).logprobs)


def gradients(row: Row, hidden: Tensor, weight: Tensor) -> tuple[Any, ...]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss, diagnostics = fused_loss(scored(row, hidden, weight), hidden, weight, LAYER, DRPO)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, diagnostics


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_no_loss_token_is_inert_whatever_it_holds(masked: bool) -> None:
    row = a_row(masked)
    hidden, weight = tensors(row)
    wild = hidden.detach().clone()
    others = torch.ones(row.tokens.numel(), dtype=torch.bool)
    others[row.loss_index] = False
    assert others.sum() >= 6
    wild[others] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 0.0])
    loss, hidden_grad, weight_grad, said = gradients(row, wild, weight)
    loss_, hidden_grad_, weight_grad_, said_ = gradients(row, hidden, weight)
    assert loss == loss_ and loss.isfinite()
    assert torch.equal(hidden_grad, hidden_grad_) and not hidden_grad[others].any()
    assert torch.equal(weight_grad, weight_grad_)
    for name in ("logprobs", "behaviour_logprobs", "gradient_weight", "entropy"):
        assert torch.equal(getattr(said, name), getattr(said_, name))
        assert getattr(said, name).isfinite().all()


def test_the_plain_way_gives_the_same() -> None:
    row = a_row()
    hidden, weight = tensors(row)
    loss, hidden_grad, weight_grad, said = gradients(row, hidden, weight)
    logits = hidden[row.loss_index] @ weight.T
    plain, said_ = plain_loss(scored(row, hidden, weight), logits, LAYER, DRPO)
    plain.backward()
    torch.testing.assert_close(plain.detach(), loss)
    torch.testing.assert_close(hidden.grad, hidden_grad)
    torch.testing.assert_close(weight.grad, weight_grad)
    torch.testing.assert_close(said_.gradient_weight, said.gradient_weight)
    torch.testing.assert_close(said_.objective["penalty"], said.objective["penalty"])


def test_the_first_look_at_a_batch_has_no_drift() -> None:
    row = a_row()
    _, _, _, said = gradients(row, *tensors(row))
    assert torch.equal(said.logprobs, said.old_logprobs)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_logprob_that_is_not_finite_names_its_token(value: float) -> None:
    """The longest comes first: token 4 of the row is the fifth of sample 1, after two of prompt."""
    row = a_row()
    row.behaviour_logprobs[4] = value
    with pytest.raises(RolloutError) as caught:
        check_finite(row, row.behaviour_logprobs, "the behaviour policy's", "look at the engine")
    message = str(caught.value)
    assert f"token {int(row.targets[4])} at position 6 of sample 1 of prompt p1" in message
    assert f"is {value}" in message and "(1 of 9 tokens" in message and "look at" in message


def test_logits_that_are_not_finite_are_refused_by_name() -> None:
    row = a_row()
    hidden, weight = tensors(row)
    row = scored(row, hidden, weight)
    with torch.no_grad():
        hidden[row.loss_index[2]] = torch.nan
    with pytest.raises(RolloutError, match="at position 4 of sample 1 of prompt p1 is nan"):
        fused_loss(row, hidden, weight, LAYER, DRPO)


def test_a_row_without_tokens_is_nothing() -> None:
    batch = [Trajectory(r, 0.0, 1.0) for r in [_rollout()]]
    (_,), (row,) = pack(
        batch, max_tokens=8, num_replicas=2, aggregation="token-mean", horizon=1, pad_multiple=8
    )
    assert row.targets.numel() == 0
    hidden, weight = tensors(row)
    for config in (ObjectiveConfig(), ObjectiveConfig(objective="gspo")):
        ready = scored(row, hidden, weight)
        loss, said = fused_loss(ready, hidden, weight, LAYER, build_objective(config))
        loss.backward()
        assert loss == 0 and said.logprobs.numel() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def _rollout() -> Rollout:
    ids = torch.tensor([3])
    return Rollout(Prompt("p", "", ids, None), 0, ids, torch.tensor([-0.5]), "stop", 0, "")
