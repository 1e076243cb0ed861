"""Log-probs of chosen ids and the entropy, from vocab-parallel logits, with their gradients.

Forward: one sweep over the local shard for the partials (`sweep.Sweep.partials`), then one
all-gather of 3 + K numbers per token merges the ranks. Backward: no collective; one sweep, with
d log p_y / dz = onehot(y) - p and dH / dz = -p (log p + H), over the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_drpo.vocab_parallel.shard import Shard, add_ranks, check_ids, gather_ranks, shard_of
from megatron_drpo.vocab_parallel.sweep import sweep_for


class TokenScores(NamedTuple):
    """What the policy says of each token; fp32 (fp64 where the logits are)."""

    logprobs: Tensor
    """[T] or [T, K], as the ids: log-probs of the ids."""
    entropy: Tensor
    """[T], nats, of the whole distribution."""


class Merged(NamedTuple):
    """`TokenScores` for K ids, and what the backward sweep needs besides."""

    logprobs: Tensor
    """[T, K]."""
    entropy: Tensor
    """[T]."""
    top: Tensor
    """[T]: maximum over the vocabulary of z = logits / temperature."""
    log_total: Tensor
    """[T]: log of the sum over the vocabulary of exp(z - top)."""


def logprobs_and_entropy(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    overwrite_logits: bool = False,
) -> TokenScores:
    """`log_softmax(logits / temperature)` at `ids` and the entropy, over all ranks of `group`.

    Args:
        logits: [T, V/tp], any float type; rank i of `group` holds ids i*V/tp to (i+1)*V/tp - 1.
        ids: int64 [T] or [T, K], global.
        temperature: of the softmax, above 0; a number, or fp32 [T].
        vocab_size: number of real ids; later columns are padding, outside the softmax. None: all
            columns are real.
        mask: bool [T]; a row that is False is skipped: log-probs, entropy and gradient are 0
            whatever its logits and ids hold.
        group: the tensor-parallel group, None for one rank.
        overwrite_logits: let the backward pass write the gradient into the storage of `logits`,
            which then hold no logits any more; backward can run once.

    Returns:
        Log-probs and entropies, equal to the last bit on every rank; both differentiable. The
        log-prob of an id whose logit is -inf is -inf.

    Raises:
        ValueError: an id that is not masked lies outside [0, vocab_size).
    """
    shard = shard_of(logits.size(-1), vocab_size, group)
    check_ids(ids, shard.vocab_size, mask)
    wide = ids if ids.dim() == 2 else ids[:, None]
    logprobs, entropy = _Scores.apply(
        logits, local_ids(wide, shard), row_temperature(temperature, logits), shard.real, mask,
        group, overwrite_logits,
    )  # fmt: skip
    return TokenScores(logprobs if ids.dim() == 2 else logprobs[:, 0], entropy)


def local_ids(ids: Tensor, shard: Shard) -> Tensor:
    """int64, as `ids`: the column of each id on this rank, -1 where another rank holds it."""
    local = ids - shard.start
    return local.where((local >= 0) & (local < shard.real), -1)


def row_temperature(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """[T] in the accumulation type, from a number or one number per row."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        return temperature.to(device=logits.device, dtype=acc).expand(logits.size(0)).contiguous()
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return logits.new_full((logits.size(0),), temperature, dtype=acc)


def merge(partials: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None) -> Merged:
    """One collective: every rank merges the same numbers in the same order, bit-equal results.

    Args:
        partials: [3 + K, T], this rank's.
        mask: bool [T]; rows that are False give 0.
        group: the tensor-parallel group, None for one rank.
    """
    ranks = gather_ranks(partials, group)
    tops, sums, weighted, picked = ranks[:, 0], ranks[:, 1], ranks[:, 2], ranks[:, 3:]
    top = tops.max(0).values
    scale = (tops - top).exp()
    total = add_ranks(sums * scale)
    log_total = total.log()
    entropy = log_total - add_ranks((weighted + (tops - top) * sums) * scale) / total
    # In this order: the difference to the maximum is exact where the logits are large.
    logprobs = (add_ranks(picked) - top - log_total).T
    if mask is not None:
        logprobs = logprobs.where(mask[:, None], 0)
        entropy, log_total = entropy.where(mask, 0), log_total.where(mask, 0)
    return Merged(logprobs, entropy, top, log_total)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, temperature, real, mask, group, overwrite):
        if logits.size(1) > 1 and (logits.stride(1) != 1 or logits.stride(0) < logits.size(1)):
            logits = logits.contiguous()  # transposed, or rows that share their storage
        sweep = sweep_for(logits)
        merged = merge(sweep.partials(logits, ids, temperature, real, mask), mask, group)
        ctx.save_for_backward(
            logits, ids, temperature, mask, merged.top, merged.log_total, merged.entropy
        )
        ctx.sweep, ctx.real, ctx.overwrite, ctx.used = sweep, real, overwrite, False
        ctx.set_materialize_grads(False)
        return merged.logprobs, merged.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        if ctx.used:
            raise RuntimeError("overwrite_logits: the logits are gone, backward can run only once")
        logits, ids, temperature, mask, top, log_total, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = temperature.new_zeros(ids.shape)
        ctx.used = ctx.overwrite
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        ctx.sweep.gradient(
            logits.detach(), ids, temperature, ctx.real, mask, top, log_total, entropy,
            grad_logprobs, grad_entropy, out,
        )  # fmt: skip
        return out, None, None, None, None, None, None
