"""What is compared: each contender as one forward and backward pass over the same inputs.

Two families. From logits [T, V/tp], to the logits' gradient; from hidden states [T, H], to their
gradient and that of the output layer's weight [V/tp, H]. The loss is the log-probs of the sampled
ids, each with a weight of its own, as a policy gradient has it; where a contender gives the
entropy as well, a part of that is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Place
from megatron_drpo.vocab_parallel.linear import fused_linear_objective, linear_scores
from megatron_drpo.vocab_parallel.logprobs import TokenScores, logprobs_and_entropy

Family = Literal["logits", "hidden"]
Call = Callable[[], tuple[Tensor, ...]]

_ENTROPY_WEIGHT = 0.01
_TORCH_CHUNK = 64
"""Tokens per chunk for torch's chunked loss, about as many as ours takes. By its own default it
takes 2 at this hidden size, reads the whole weight for them, and needs ten times as long."""


@dataclass(frozen=True)
class Problem:
    """The sizes. Example: Problem(tokens=1024, hidden=512, vocab=151936, dtype="fp32", tp=1)."""

    tokens: int
    hidden: int
    vocab: int
    dtype: Literal["fp32", "bf16"]
    tp: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    @property
    def columns(self) -> int:
        """V/tp."""
        return self.vocab // self.tp

    @property
    def logits_bytes(self) -> int:
        """Of one rank."""
        return self.tokens * self.columns * self.torch_dtype.itemsize

    @property
    def tiny(self) -> Problem:
        """The same kind, small: to load libraries and to build kernels before memory is read."""
        return Problem(32, 32, 256 * self.tp, self.dtype, self.tp)


class Inputs:
    """The tensors of a problem on one rank; what a contender does not ask for does not exist."""

    def __init__(self, problem: Problem, place: Place) -> None:
        self.problem, self.place = problem, place
        self._original: Tensor | None = None
        # The same on all ranks.
        self.ids = self._randint(problem.vocab)
        self.weights = self._randn(problem.tokens, dtype=torch.float32)

    @cached_property
    def logits(self) -> Tensor:
        """[T, V/tp]."""
        problem = self.problem
        return self._randn(problem.tokens, problem.columns, std=2.0, seed=1 + self.place.rank)

    @cached_property
    def hidden(self) -> Tensor:
        """[T, H], the same on all ranks."""
        return self._randn(self.problem.tokens, self.problem.hidden)

    @cached_property
    def weight(self) -> Tensor:
        """[V/tp, H]."""
        problem = self.problem
        std = 2.0 / problem.hidden**0.5
        return self._randn(problem.columns, problem.hidden, std=std, seed=1 + self.place.rank)

    @cached_property
    def weight_grad(self) -> Tensor:
        """fp32 [V/tp, H], as Megatron keeps it from one micro-batch to the next."""
        return _written(torch.empty_like(self.weight, dtype=torch.float32))

    def keep_logits(self) -> None:
        """Remember the logits, so that contenders that overwrite them can run again."""
        self._original = self.logits.clone()

    def restore(self) -> None:
        """The logits as they were, and as recently written before one contender as the next."""
        if self._original is not None:
            self.logits.copy_(self._original)

    def _randn(
        self, *shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        device = self.place.device.torch
        generator = torch.Generator(device).manual_seed(seed)
        empty = torch.empty(shape, dtype=dtype or self.problem.torch_dtype, device=device)
        return empty.normal_(0, std, generator=generator)

    def _randint(self, high: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(high, (self.problem.tokens,), generator=generator)
        return ids.to(self.place.device.torch)


def _written(x: Tensor) -> Tensor:
    """Zeros; and the system has given the memory, which it else does at the first write."""
    return x.fill_(0)


@dataclass(frozen=True)
class Contender:
    """Something that computes the log-probs, or a lower bound of what doing so costs."""

    key: str
    label: str
    family: Family
    prepare: Callable[[Inputs], Call]
    """-> a call that does the work and returns its gradients, first that of logits or hidden, then
    a new one of the weight; to be run any number of times."""
    scale: float = 1.0
    """The time in the tables is this times the call's."""
    bound: bool = False
    """True if it does a part of the work, on memory of its own."""
    shards: bool = True
    """False if it knows nothing of tensor parallelism."""
    missing: str = ""
    """Why it cannot run here."""


# From logits.


def _loss(scores: TokenScores, weights: Tensor) -> Tensor:
    """Minimised: the log-probs, weighted, and a bonus for entropy."""
    return -(scores.logprobs @ weights) - _ENTROPY_WEIGHT * scores.entropy.sum()


def _ours(x: Inputs, overwrite: bool) -> Call:
    def call() -> tuple[Tensor, ...]:
        logits = x.logits.detach().requires_grad_()
        scores = logprobs_and_entropy(
            logits, x.ids, group=x.place.group, overwrite_logits=overwrite
        )
        return torch.autograd.grad(_loss(scores, x.weights), logits)

    _ = x.logits
    return call


def _log_softmax(x: Inputs, entropy: bool) -> Call:
    """Over the gathered vocabulary, where it is sharded."""
    gather: Any = None
    if x.place.size > 1:
        x.place.start_megatron()
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    def call() -> tuple[Tensor, ...]:
        logits = x.logits.detach().requires_grad_()
        whole = logits if gather is None else gather(logits)
        logp = whole.float().log_softmax(-1)
        picked = logp.gather(-1, x.ids[:, None])[:, 0]
        if not entropy:
            return torch.autograd.grad(-(picked @ x.weights), logits)
        scores = TokenScores(picked, -(logp.exp() * logp).sum(-1))
        return torch.autograd.grad(_loss(scores, x.weights), logits)

    _ = x.logits
    return call


def _megatron(x: Inputs) -> Call:
    x.place.start_megatron()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def call() -> tuple[Tensor, ...]:
        logits = x.logits.detach().requires_grad_()
        # Megatron's own shapes, [S, B, V/tp] and [S, B].
        loss = vocab_parallel_cross_entropy(logits[:, None], x.ids[:, None])
        return torch.autograd.grad(loss[:, 0] @ x.weights, logits)

    _ = x.logits
    return call


def _copy(x: Inputs) -> Call:
    source, target = x.logits, _written(torch.empty_like(x.logits))

    def call() -> tuple[Tensor, ...]:
        return (target.copy_(source),)

    return call


# From hidden states.


def _fused(x: Inputs) -> Call:
    weight, grad = x.weight, x.weight_grad

    def call() -> tuple[Tensor, ...]:
        hidden = x.hidden.detach().requires_grad_()
        result = fused_linear_objective(
            hidden,
            weight.detach().requires_grad_(),
            x.ids,
            lambda tokens, scores: (
                -scores.logprobs * x.weights[tokens] - _ENTROPY_WEIGHT * scores.entropy
            ),
            weight_grad=grad,
            group=x.place.group,
        )
        return torch.autograd.grad(result.loss, hidden)

    _ = x.hidden
    return call


def _linear(x: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron's output layer: a GEMM whose backward pass sums the hidden gradient over ranks."""
    x.place.start_megatron()
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce,
    )

    _ = x.hidden, x.weight
    return lambda hidden, weight: linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=x.place.size > 1,
        sequence_parallel=False,
    )


def _ours_plain(x: Inputs) -> Call:
    linear = _linear(x)

    def call() -> tuple[Tensor, ...]:
        hidden, weight = (v.detach().requires_grad_() for v in (x.hidden, x.weight))
        logits = linear(hidden, weight)
        scores = logprobs_and_entropy(logits, x.ids, group=x.place.group, overwrite_logits=True)
        return torch.autograd.grad(_loss(scores, x.weights), (hidden, weight))

    return call


def _megatron_plain(x: Inputs) -> Call:
    linear = _linear(x)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def call() -> tuple[Tensor, ...]:
        hidden, weight = (v.detach().requires_grad_() for v in (x.hidden, x.weight))
        loss = vocab_parallel_cross_entropy(linear(hidden[:, None], weight), x.ids[:, None])
        return torch.autograd.grad(loss[:, 0] @ x.weights, (hidden, weight))

    return call


def _torch_loss(x: Inputs, chunked: bool) -> Call:
    options = None
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_TORCH_CHUNK)

    def call() -> tuple[Tensor, ...]:
        hidden, weight = (v.detach().requires_grad_() for v in (x.hidden, x.weight))
        loss = F.linear_cross_entropy(hidden, weight, x.ids, reduction="none", options=options)
        return torch.autograd.grad(loss.float() @ x.weights, (hidden, weight))

    _ = x.hidden, x.weight
    return call


def _scores(x: Inputs) -> Call:
    _ = x.hidden, x.weight

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            linear_scores(x.hidden, x.weight, x.ids, group=x.place.group)
        return ()

    return call


def _gemms(x: Inputs) -> Call:
    hidden, weight = x.hidden, x.weight
    logits = _written(hidden.new_empty((hidden.size(0), weight.size(0))))
    hidden_grad, weight_grad = (_written(torch.empty_like(v)) for v in (hidden, weight))

    def call() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.T, hidden, out=weight_grad)
        return hidden_grad, weight_grad

    return call


_NO_TORCH_LOSS = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} lacks it"

CONTENDERS = {
    contender.key: contender
    for contender in (
        Contender(
            "ours",
            "ours, gradient in the logits' storage, with entropy",
            "logits",
            lambda x: _ours(x, True),
        ),
        Contender(
            "ours-new",
            "ours, gradient in new memory, with entropy",
            "logits",
            lambda x: _ours(x, False),
        ),
        Contender(
            "log-softmax",
            "log_softmax().gather()",
            "logits",
            lambda x: _log_softmax(x, False),
        ),
        Contender(
            "log-softmax-entropy",
            "log_softmax().gather(), with entropy",
            "logits",
            lambda x: _log_softmax(x, True),
        ),
        Contender("megatron", "Megatron's vocab_parallel_cross_entropy", "logits", _megatron),
        # A copy reads and writes; the least possible is to read, then to read and write.
        Contender(
            "copy",
            "bound: reading twice and writing once, at copy speed",
            "logits",
            _copy,
            scale=1.5,
            bound=True,
        ),
        Contender("fused", "ours fused, with entropy", "hidden", _fused),
        Contender("plain", "matmul, then ours, with entropy", "hidden", _ours_plain),
        Contender(
            "megatron-plain",
            "matmul, then Megatron's vocab_parallel_cross_entropy",
            "hidden",
            _megatron_plain,
        ),
        Contender(
            "torch",
            "torch's linear_cross_entropy",
            "hidden",
            lambda x: _torch_loss(x, False),
            shards=False,
            missing=_NO_TORCH_LOSS,
        ),
        Contender(
            "torch-chunked",
            f"torch's linear_cross_entropy, {_TORCH_CHUNK} tokens at a time",
            "hidden",
            lambda x: _torch_loss(x, True),
            shards=False,
            missing=_NO_TORCH_LOSS,
        ),
        Contender("scores", "ours, scores without gradient", "hidden", _scores),
        Contender("gemms", "bound: the three GEMMs alone", "hidden", _gemms, bound=True),
    )
}
