"""What an objective takes and gives: records of per-token tensors.

Dims: T loss tokens, K the behaviour policy's most likely ids. All tensors are floats of one dtype
(fp32 in training, fp64 in tests) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Everything that is known of T loss tokens; what an objective does not need may be None.

    In training, the first four and `entropy` are always there.

    Example: Tokens(logprobs=tensor([-0.5, -1.0], requires_grad=True),
                    behaviour_logprobs=tensor([-0.5, -1.2]), advantages=tensor([0.6, -0.4]))
    """

    logprobs: Tensor
    """[T], log pi of the sampled token at the sampling temperature; carries the gradient."""
    behaviour_logprobs: Tensor
    """[T], log mu of the sampled token: the law that it was drawn from. With `--proximal-policy
    trainer` an objective finds `old_logprobs` here: whatever its ratio is taken against."""
    advantages: Tensor
    """[T]."""
    old_logprobs: Tensor | None = None
    """[T], the trainer's log-prob of the sampled token before the batch's first update."""
    sequence_log_ratio: Tensor | None = None
    """[T], detached: mean over the tokens of the token's sequence of the objective's log-ratio, log
    pi - log mu (of a decoupled objective: log pi - old_logprobs)."""
    sequence_log_weight: Tensor | None = None
    """[T]: mean over the tokens of the token's sequence of old_logprobs - log mu."""
    sequence_length: Tensor | None = None
    """[T]: number of loss tokens of the token's sequence."""
    reference_logprobs: Tensor | None = None
    """[T], log-prob of the sampled token under the frozen reference model."""
    entropy: Tensor | None = None
    """[T], nats, of pi over the whole vocabulary; carries its gradient."""
    topk_logprobs: Tensor | None = None
    """[T, K], log pi of the K ids that the behaviour policy found likeliest."""
    behaviour_topk_logprobs: Tensor | None = None
    """[T, K], log mu of those ids."""
    sampled_in_topk: Tensor | None = None
    """bool [T, K]: the id is the sampled one; in a row at most once."""
    behaviour_l2: Tensor | None = None
    """[T], sum over the vocabulary of (pi_v - mu_v)^2; carries its gradient."""
    reference_kl: Tensor | None = None
    """[T], KL(pi || reference) over the whole vocabulary; carries its gradient."""

    def required(self, name: str) -> Tensor:
        """The optional field `name`.

        Raises:
            ValueError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the objective reads Tokens.{name}, which is None")
        return value

    def __getitem__(self, index: slice | Tensor) -> Tokens:
        """The tokens that `index` (over T) chooses."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in chosen.items() if v is not None})


@dataclass(frozen=True, eq=False)
class TokenObjective:
    """What an objective says of each token.

    Example: TokenObjective(losses=tensor([-0.62, 0.37]), gradient_weights=tensor([1.0, 0.98]),
                            diagnostics={"clipped": tensor([0.0, 0.0])})
    """

    losses: Tensor
    """[T]: the negative objective, differentiable in log pi."""
    gradient_weights: Tensor
    """[T], detached: w in d(objective)/d(log pi) = r * advantage * w, r the objective's ratio; 1
    where the advantage is 0."""
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, [T] each, detached: logged as the mean over all tokens, `objective/NAME`."""


@dataclass(frozen=True)
class Needs:
    """Which fields of `Tokens` an objective reads that are computed only where one does."""

    sequences: bool = False
    """`sequence_log_ratio` and `sequence_length`: a sweep over the tokens of its own."""
    sequence_weights: bool = False
    """`sequence_log_weight` and `sequence_length`: known before the first update."""
    topk: bool = False
    """The three top-K fields: rollouts must carry the behaviour policy's (`--rollout-topk`)."""
    reference_logprobs: bool = False
    behaviour_l2: bool = False
    reference_kl: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What either needs."""
        return Needs(
            **{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class Objective:
    """A per-token objective with its constants bound: call it with `Tokens`."""

    name: str
    function: Callable[[Tokens], TokenObjective]
    needs: Needs = Needs()
    decoupled: bool = False
    """The ratio is taken against `old_logprobs` (`--proximal-policy trainer`), not log mu."""

    def __call__(self, tokens: Tokens) -> TokenObjective:
        return self.function(tokens)
