"""An objective of the user's own: `--objective MODULE:FUNCTION`.

The function takes `Tokens` and returns the loss of each token, [T], or a `TokenObjective`. It may
carry an attribute `needs`, the `Needs` of optional fields that it reads:

    def reinforce(tokens):
        weight = (tokens.logprobs - tokens.behaviour_logprobs).detach().exp().clamp(max=2)
        surprise = tokens.logprobs - tokens.reference_logprobs
        return -weight * tokens.advantages * tokens.logprobs + 0.01 * surprise.square()

    reinforce.needs = Needs(reference_logprobs=True)

A token's loss may depend on the token's own entries only: the program cuts batches into rows and
chunks as it needs, and divides the sum once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_drpo.errors import ConfigError
from megatron_drpo.objectives.ratio import log_ratio
from megatron_drpo.objectives.tokens import Needs, Objective, TokenObjective, Tokens
from megatron_drpo.user_code import described, load_function


def load_user_objective(name: str) -> Objective:
    """The user's objective, tried on a few made-up tokens first.

    Args:
        name: MODULE:FUNCTION, neither part empty.

    Raises:
        ConfigError: it cannot be loaded, raises, returns something else than float losses [T] that
            depend on `logprobs`, or lets tokens influence each other.
    """
    option = f"--objective {name}"
    function = load_function(option, name, ConfigError)
    needs = getattr(function, "needs", Needs())
    if not isinstance(needs, Needs):
        raise ConfigError(
            f"{option}: its attribute `needs` is {needs!r}; must be megatron_drpo.objectives.Needs"
        )
    objective = Objective(name, _Checked(option, function), needs)
    probe = _probe(needs)
    whole, first = objective(probe), objective(probe[:2])
    if not whole.losses.isfinite().all():
        raise ConfigError(
            f"{option}: the losses of made-up tokens are {whole.losses.tolist()}; ordinary ratios, "
            "log-probs and advantages must give finite losses"
        )
    if not torch.allclose(whole.losses[:2], first.losses, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{option}: the losses of two tokens are {first.losses.tolist()} alone and "
            f"{whole.losses[:2].tolist()} beside others; a token's loss must depend on its own "
            "entries only (no mean over tokens: --loss-aggregation does that)"
        )
    return objective


@dataclass(frozen=True)
class _Checked:
    """The user's function with what it returns checked and its gradient weight derived."""

    option: str
    function: Callable[[Tokens], Any]

    def __call__(self, tokens: Tokens) -> TokenObjective:
        wanted = torch.is_grad_enabled() and tokens.logprobs.requires_grad
        with torch.enable_grad():
            if not tokens.logprobs.requires_grad:
                tokens = replace(tokens, logprobs=tokens.logprobs.detach().requires_grad_())
            try:
                result = self.function(tokens)
            except (Exception, SystemExit) as error:
                raise ConfigError(f"{self.option}: raised {described(error)}") from error
            if not isinstance(result, TokenObjective):
                result = self._with_weights(tokens, self._losses(tokens, result))
            else:
                self._losses(tokens, result.losses)
                self._details(tokens, result)
        return result if wanted else replace(result, losses=result.losses.detach())

    def _losses(self, tokens: Tokens, losses: object) -> Tensor:
        """`losses`, if they are what they should be."""
        shape = tokens.logprobs.shape
        if not isinstance(losses, Tensor):
            self._refuse(f"{type(losses).__name__}", "a tensor of losses or a TokenObjective")
        if losses.shape != shape:
            self._refuse(f"losses of shape {[*losses.shape]}", f"one per token, {[*shape]}")
        if not losses.is_floating_point():
            self._refuse(f"losses of dtype {losses.dtype}", "floats")
        if not losses.requires_grad:
            self._refuse(
                "losses without gradient", "differentiable in tokens.logprobs (no detach, no item)"
            )
        return losses

    def _details(self, tokens: Tokens, result: TokenObjective) -> None:
        shape = tokens.logprobs.shape
        details = {"gradient_weights": result.gradient_weights, **result.diagnostics}
        for name, value in details.items():
            if not isinstance(value, Tensor) or value.shape != shape or value.requires_grad:
                self._refuse(f"{name} {value!r}", f"a detached tensor, one per token, {[*shape]}")

    def _with_weights(self, tokens: Tokens, losses: Tensor) -> TokenObjective:
        """w = -(d loss / d log pi) / (r A), and 1 where A is 0."""
        (slope,) = torch.autograd.grad(
            losses.sum(), tokens.logprobs, retain_graph=True, allow_unused=True
        )
        if slope is None:
            self._refuse("losses that do not depend on tokens.logprobs", "differentiable in it")
        step = log_ratio(tokens).detach().exp() * tokens.advantages
        weights = torch.where(tokens.advantages == 0, 1.0, -slope / step)
        return TokenObjective(losses, weights)

    def _refuse(self, found: str, need: str) -> NoReturn:
        raise ConfigError(f"{self.option}: returned {found}; must be {need}")


def _probe(needs: Needs) -> Tokens:
    """Four tokens of both signs and none, off policy, with the optional fields that are needed."""
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.1], requires_grad=True)
    behaviour = torch.tensor([-0.6, -0.8, -2.0, -0.3])
    topk, in_topk = torch.tensor([[-1.5, -2.5]] * 4), torch.tensor([[False, False]] * 4)
    sequences = needs.sequences or needs.sequence_weights
    return Tokens(
        logprobs=logprobs,
        behaviour_logprobs=behaviour,
        advantages=torch.tensor([1.0, -0.5, 0.7, 0.0]),
        old_logprobs=behaviour + 0.01,
        sequence_log_ratio=torch.tensor([-0.05, -0.05, 0.1, 0.1]) if needs.sequences else None,
        sequence_log_weight=torch.full((4,), 0.01) if needs.sequence_weights else None,
        sequence_length=torch.tensor([2, 2, 2, 2]) if sequences else None,
        reference_logprobs=behaviour - 0.1 if needs.reference_logprobs else None,
        entropy=-behaviour,
        topk_logprobs=topk if needs.topk else None,
        behaviour_topk_logprobs=topk - 0.1 if needs.topk else None,
        sampled_in_topk=in_topk if needs.topk else None,
        behaviour_l2=behaviour.exp() if needs.behaviour_l2 else None,
        reference_kl=-behaviour if needs.reference_kl else None,
    )
