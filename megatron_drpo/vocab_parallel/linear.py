"""The output layer with what follows it, in chunks of tokens: nothing of size [T, V/tp] exists.

A per-token objective needs log-probs and entropy of its own token only. So as soon as a chunk's
logits are known, its losses are, and with them the gradient of its logits: the gradients of hidden
states and weight are computed in the forward sweep, by three GEMMs and no recomputation, and the
chunk is forgotten. What an objective needs of other tokens (the ratio of a whole sequence) comes
from a sweep without gradient before (`linear_scores`).

Generation, scoring and training all take their logits from `gemm.project`, with bits that do not
depend on which tokens share a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_drpo.types import KeptIds
from megatron_drpo.vocab_parallel.divergence import Kind, divergence
from megatron_drpo.vocab_parallel.gemm import (
    MIN_ROWS,
    add_weight_gradient,
    gradient_dtype,
    hidden_gradient,
    is_mixed,
    project,
)
from megatron_drpo.vocab_parallel.kept import keep_only, select_kept
from megatron_drpo.vocab_parallel.logprobs import (
    Merged,
    TokenScores,
    local_ids,
    merge,
    row_temperature,
)
from megatron_drpo.vocab_parallel.shard import Shard, check_ids, gather_ranks, parts, shard_of
from megatron_drpo.vocab_parallel.sweep import sweep_for


@dataclass(frozen=True)
class Budget:
    """What a chunk of logits and their gradient may take by default."""

    most_bytes: int
    least_rows: int
    """Fewer rows than this would make a GEMM cost less than reading the weight for it."""


BUDGET, BUDGET_MIXED = Budget(24 << 20, 32), Budget(512 << 20, 1024)
"""The latter where 16-bit GEMMs are fast, and give fp32 results."""
_SHARE = 25
"""A chunk is this part of all logits at most, as far as the least rows and `_SMALL` allow."""
_SMALL = 1 << 20
"""Bytes that are not worth a second chunk."""


class Scores(NamedTuple):
    """What a token's loss may depend on; of some tokens, in fp32 (fp64 where the weights are)."""

    logprobs: Tensor
    """[t] or [t, K], as the ids."""
    entropy: Tensor
    """[t], nats."""
    divergences: tuple[Tensor, ...]
    """[t] each, in the order of `others`."""


@dataclass(frozen=True, eq=False)
class Other:
    """A fixed distribution q per token, as an output layer over its hidden states."""

    hidden: Tensor
    """[T, H]."""
    weight: Tensor
    """[V/tp, H]."""
    kind: Kind
    """Which divergence of the policy from it is wanted."""


class LinearObjective(NamedTuple):
    """The loss, and what it was computed from."""

    loss: Tensor
    """0-dim: the sum of all token losses; its gradients are known already."""
    scores: Scores
    """Of all T tokens, detached."""


TokenLosses = Callable[[slice, Scores], Tensor]
"""(which tokens, their scores) -> losses [t], weighted as they are to be summed; differentiable in
the scores, and dependent on nothing else that needs a gradient."""


def fused_linear_objective(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    token_losses: TokenLosses,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    kept: KeptIds | None = None,
    others: Sequence[Other] = (),
    weight_grad: Tensor | None = None,
    sequence_parallel: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
) -> LinearObjective:
    """The sum of `token_losses` over all tokens, with gradients for `hidden` and `weight`.

    Args:
        hidden: [S, H], or this rank's [S/tp, H] with `sequence_parallel`; the same on all ranks of
            `group` otherwise.
        weight: [V/tp, H] of the output layer, this rank's rows; may be the embedding's.
        ids: int64 [T] or [T, K], global ids whose log-probs are wanted.
        token_losses: called once per chunk, in order.
        temperature: of the softmax, above 0; a number, or fp32 [T].
        vocab_size: number of real ids; None: all rows of `weight` are real.
        rows: int64 [T], the token of S that each row of `ids` is about; None: T is S.
        kept: of T tokens: the law, and every other distribution, is renormalised over these ids;
            the log-prob of another one is -inf.
        others: fixed distributions whose divergences the losses depend on.
        weight_grad: fp32 [V/tp, H] that the weight's gradient is added to, during this call;
            `weight.grad` then stays as it is, and the loss must be the root of the backward pass.
            None: autograd receives it, from a buffer that lives until then.
        sequence_parallel: gather `hidden` over `group`, and reduce-scatter its gradient.
        group: the tensor-parallel group, None for one rank.
        chunk_bytes: of logits and their gradient held at a time; None: a 25th of all within limits
            (`Budget`), which depend on the weight's type and device.

    Raises:
        ValueError: an id outside [0, vocab_size).
    """
    call = _Call(
        ids=ids,
        temperature=temperature,
        shard=shard_of(weight.size(0), vocab_size, group),
        rows=rows,
        kept=kept,
        sequence_parallel=sequence_parallel,
        group=group,
        chunk_bytes=chunk_bytes,
        num_others=len(others),
    )
    with_grad = torch.is_grad_enabled()
    out = _Fused.apply(hidden, weight, call, token_losses, others, weight_grad, with_grad)
    loss, logprobs, entropy, *divergences = out
    return LinearObjective(loss, Scores(logprobs, entropy, tuple(divergences)))


@torch.no_grad()
def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    kept: KeptIds | None = None,
    sequence_parallel: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
) -> TokenScores:
    """Log-probs and entropy alone, without gradient: see `fused_linear_objective`."""
    call = _Call(
        ids=ids,
        temperature=temperature,
        shard=shard_of(weight.size(0), vocab_size, group),
        rows=rows,
        kept=kept,
        sequence_parallel=sequence_parallel,
        group=group,
        chunk_bytes=chunk_bytes,
    )
    results = call.each_chunk(
        call.select(hidden), weight, lambda chunk: (chunk.merged.logprobs, chunk.merged.entropy)
    )
    return TokenScores(*results)


class _Chunk(NamedTuple):
    """Some tokens on their way through the output layer."""

    tokens: slice
    logits: Tensor
    """[t, V/tp]; overwritten by their gradient in the end."""
    inputs: tuple[Tensor, Tensor, int, None]
    """What both kernels of the sweep take after the logits."""
    merged: Merged


class _Call(NamedTuple):
    """What both sweeps share: which ids at which tokens, and how hidden states reach them."""

    ids: Tensor
    temperature: float | Tensor
    shard: Shard
    rows: Tensor | None
    kept: KeptIds | None
    sequence_parallel: bool
    group: dist.ProcessGroup | None
    chunk_bytes: int | None
    num_others: int = 0

    def select(self, hidden: Tensor) -> Tensor:
        """[T, H]: the hidden state of each row of `ids`."""
        if self.sequence_parallel:
            hidden = gather_ranks(hidden, self.group).flatten(0, 1)
        return hidden if self.rows is None else hidden[self.rows]

    def scatter(self, grad: Tensor, tokens: int) -> Tensor:
        """From [T, H] partial gradients of the ranks to the gradient of `hidden`.

        Each rank's logits are a part of the vocabulary, so a hidden state's gradient is their sum.
        """
        size = 1 if self.group is None else self.group.size()
        if self.rows is not None:
            whole = tokens * size if self.sequence_parallel else tokens
            grad = grad.new_zeros((whole, grad.size(1))).index_add_(0, self.rows, grad)
        if size > 1 and self.sequence_parallel:
            part = grad.new_empty((tokens, grad.size(1)))
            dist.reduce_scatter_tensor(part, grad.contiguous(), group=self.group)
            return part
        if size > 1:
            dist.all_reduce(grad, group=self.group)
        return grad

    def each_chunk(
        self, hidden: Tensor, weight: Tensor, visit: Callable[[_Chunk], Sequence[Tensor]]
    ) -> list[Tensor]:
        """What `visit` returns of each chunk, joined; one chunk's logits exist at a time."""
        check_ids(self.ids, self.shard.vocab_size)
        step = self.rows_per_chunk(weight)
        # At least one chunk, if an empty one: it tells the shapes and types of the results.
        chunks = [slice(0, 0)] if not len(self.ids) else parts(len(self.ids), step)
        results = [visit(self._chunk(tokens, hidden, weight)) for tokens in chunks]
        return [torch.cat(pieces) for pieces in zip(*results, strict=True)]

    def rows_per_chunk(self, weight: Tensor) -> int:
        """As many as the budget has room for, in eights where they are many."""
        dtype, size = gradient_dtype(weight), max(weight.element_size(), 4)
        # Another distribution costs its logits, a copy of the policy's, and fp64 parts of both.
        per_row = size + (dtype.itemsize if dtype.itemsize != size else 0)
        per_row *= weight.size(0) * (1 + 4 * self.num_others)
        if self.chunk_bytes is not None:
            rows = self.chunk_bytes // per_row
        else:
            budget = BUDGET_MIXED if is_mixed(weight) else BUDGET
            share = max(len(self.ids) // _SHARE, budget.least_rows, _SMALL // per_row)
            rows = min(share, budget.most_bytes // per_row)
        return max(rows - rows % 8 if rows > 8 else rows, MIN_ROWS)

    def temperature_of(self, tokens: slice) -> float | Tensor:
        t = self.temperature
        return t[tokens] if isinstance(t, Tensor) and t.dim() else t

    def logits(self, tokens: slice, hidden: Tensor, weight: Tensor) -> Tensor:
        """[t, V/tp]: of the hidden states [t, H] of `tokens`, -inf where an id was cut."""
        logits = project(hidden, weight)
        if self.kept is not None:
            keep_only(logits, select_kept(self.kept, tokens), self.shard)
        return logits

    def _chunk(self, tokens: slice, hidden: Tensor, weight: Tensor) -> _Chunk:
        ids = self.ids[tokens]
        logits = self.logits(tokens, hidden[tokens], weight)
        inputs = (
            local_ids(ids if ids.dim() == 2 else ids[:, None], self.shard),
            row_temperature(self.temperature_of(tokens), logits),
            self.shard.real,
            None,
        )
        merged = merge(sweep_for(logits).partials(logits, *inputs), None, self.group)
        return _Chunk(
            tokens, logits, inputs, merged._replace(logprobs=merged.logprobs.reshape(ids.shape))
        )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, call, token_losses, others, weight_grad, with_grad):
        selected = call.select(hidden)
        wants_hidden = with_grad and ctx.needs_input_grad[0]
        wants_weight = with_grad and ctx.needs_input_grad[1]
        acc = torch.promote_types(weight.dtype, torch.float32)
        loss = weight.new_zeros((), dtype=acc)
        hidden_grad = torch.empty_like(selected) if wants_hidden else None
        ctx.added = weight_grad is not None
        if wants_weight and weight_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=acc)

        def visit(chunk: _Chunk) -> Sequence[Tensor]:
            distances = _Distances(call, others, chunk)
            with torch.enable_grad():
                merged = chunk.merged
                leaves = [
                    value.detach().requires_grad_()
                    for value in (merged.logprobs, merged.entropy, *distances.values)
                ]
                scores = Scores(leaves[0], leaves[1], tuple(leaves[2:]))
                total = token_losses(chunk.tokens, scores).sum()
            loss.add_(total.detach())
            if wants_hidden or wants_weight:
                slopes = torch.autograd.grad(total, leaves, allow_unused=True)
                grad = _logits_gradient(chunk, slopes, distances, gradient_dtype(weight))
                if hidden_grad is not None:
                    hidden_grad[chunk.tokens] = hidden_gradient(grad, weight)
                if wants_weight:
                    add_weight_gradient(weight_grad, grad, selected[chunk.tokens])
            return [leaf.detach() for leaf in leaves]

        results = call.each_chunk(selected, weight, visit)
        ctx.call, ctx.num_tokens, ctx.dtype = call, hidden.size(0), weight.dtype
        keep = weight_grad if wants_weight and not ctx.added else None
        ctx.save_for_backward(hidden_grad, keep)
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale, *_):
        hidden_grad, weight_grad = ctx.saved_tensors
        if ctx.added:
            # The weight's gradient is where it belongs already; a scaled loss would need another.
            message = "weight_grad: the loss must not be scaled"
            torch._assert_async(scale == 1, message)  # type: ignore[reportPrivateImportUsage]
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
            hidden_grad = ctx.call.scatter(hidden_grad, ctx.num_tokens)
        if weight_grad is not None:
            weight_grad = (weight_grad * scale).to(ctx.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


def _logits_gradient(
    chunk: _Chunk, slopes: Sequence[Tensor | None], distances: _Distances, dtype: torch.dtype
) -> Tensor:
    """[t, V/tp]: the gradient of a chunk's logits, in their own storage if `dtype` is theirs."""
    extra = distances.gradient(slopes[2:])
    logits, merged = chunk.logits, chunk.merged
    slope = torch.zeros_like(merged.logprobs) if slopes[0] is None else slopes[0]
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    sweep_for(logits).gradient(
        logits,
        *chunk.inputs,
        merged.top,
        merged.log_total,
        merged.entropy,
        slope.reshape(chunk.inputs[0].shape),
        slopes[1],
        out,
    )
    return out if extra is None else out.add_(extra)


class _Distances:
    """The divergences of a chunk from other distributions, and their gradient by its logits."""

    def __init__(self, call: _Call, others: Sequence[Other], chunk: _Chunk) -> None:
        self.values: list[Tensor] = []
        if not others:
            return
        with torch.enable_grad():
            # A copy: the gradient of the objective is going to overwrite these logits.
            self._logits = chunk.logits.detach().clone().requires_grad_()
            self.values = [
                divergence(
                    self._logits,
                    call.logits(chunk.tokens, other.hidden[chunk.tokens], other.weight),
                    other.kind,
                    temperature=call.temperature_of(chunk.tokens),
                    vocab_size=call.shard.vocab_size,
                    group=call.group,
                )
                for other in others
            ]

    def gradient(self, slopes: Sequence[Tensor | None]) -> Tensor | None:
        """[t, V/tp]: what `slopes`, one [t] per divergence, send back to the logits."""
        pairs = zip(self.values, slopes, strict=True)
        used = [(value, slope) for value, slope in pairs if slope is not None]
        if not used:
            return None
        values, given = zip(*used, strict=True)
        return torch.autograd.grad(values, self._logits, given)[0]
