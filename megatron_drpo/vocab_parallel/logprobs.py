"""Log-probs of chosen ids and the entropy, from vocab-parallel logits, with their gradients.

Forward: one pass over the local shard for the partials (max, sum of exp, sum of x*exp, picked
logit; all relative to the max), then one all-gather of four numbers per token merges the ranks.
Backward: no collective; on the shard, d log pi_y = onehot - softmax and
dH = -softmax * (log softmax + H), over the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 22
"""Logits that are held in fp32 at a time."""

_LOWEST = torch.finfo(torch.float32).min
"""Stands for a maximum of -inf: differences to it stay numbers, and their exp is still 0."""


class TokenLogprobs(NamedTuple):
    """fp32 [T] each: log pi of the target id, and the entropy of the whole distribution (nats)."""

    logprobs: Tensor
    entropy: Tensor


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> TokenLogprobs:
    """`log_softmax(logits / temperature)[target]` and the entropy, over all ranks of `group`.

    Args:
        logits: [T, V/tp], any float type; rank i of `group` holds ids i*V/tp to (i+1)*V/tp - 1.
        targets: int64 [T], global ids; an id outside [0, vocab_size) gives NaN.
        temperature: of the softmax, above 0.
        vocab_size: number of real ids; later columns are padding, outside the softmax.
        group: the tensor-parallel group, None for one rank.

    Returns:
        fp32 log-probs and entropies, equal to the last bit on every rank; both differentiable.
    """
    return TokenLogprobs(*_Logprobs.apply(logits, targets, temperature, vocab_size, group))


def _shard(columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(first global id, number of real ids) of this rank's shard."""
    start = 0 if group is None else columns * group.rank()
    return start, min(max(vocab_size - start, 0), columns)


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(_CHUNK_ELEMENTS // max(columns, 1), 1)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, vocab_size, group):
        rows, columns = logits.shape
        start, real = _shard(columns, vocab_size, group)
        local = targets - start
        owned = (local >= 0) & (local < real)
        local = local.clamp(0, max(columns - 1, 0))
        # Per token: max, sum of exp(x), sum of x * exp(x), the target's z if owned; x = z - max.
        # Sums of differences to the max keep their precision however large the logits are.
        partials = logits.new_zeros((4, rows), dtype=torch.float32)
        if real == 0:
            partials[0] = _LOWEST
        else:
            for rows_ in _chunks(rows, columns):
                z = logits[rows_, :real].float() / temperature
                top = z.max(-1).values.clamp(min=_LOWEST)
                picked = z.gather(-1, local[rows_, None].clamp(max=real - 1))[:, 0]
                partials[0, rows_] = top
                partials[3, rows_] = picked.where(owned[rows_], 0)
                z.sub_(top[:, None])
                exp = z.exp()
                partials[1, rows_] = exp.sum(-1)
                # A column at -inf has p = 0 and adds nothing, though 0 * -inf is NaN.
                partials[2, rows_] = exp.mul_(z).nan_to_num_(nan=0.0).sum(-1)
        # Every rank merges the same numbers in the same order: bit-equal results everywhere.
        merged = [partials]
        if group is not None and group.size() > 1:
            merged = [torch.empty_like(partials) for _ in range(group.size())]
            dist.all_gather(merged, partials, group=group)
        tops, sums, weighted, picked = torch.stack(merged).unbind(1)
        top = tops.max(0).values
        scale = (tops - top).exp()
        total = (sums * scale).sum(0)
        log_total = total.log()
        entropy = log_total - ((weighted + (tops - top) * sums) * scale).sum(0) / total
        logprobs = picked.sum(0) - top - log_total
        logprobs = logprobs.where((targets >= 0) & (targets < vocab_size), torch.nan)
        ctx.save_for_backward(logits, local, owned, top, log_total, entropy)
        ctx.temperature, ctx.real = temperature, real
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, local, owned, top, log_total, entropy = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        if ctx.real == 0:
            return grad, None, None, None, None
        for rows_ in _chunks(*logits.shape):
            log_p = logits[rows_, : ctx.real].float() / ctx.temperature
            log_p.sub_(top[rows_, None]).sub_(log_total[rows_, None])
            p = log_p.exp()
            # d/dz = -g p - h p (log p + H), then +g at the target. Where p = 0 the bracket only
            # has to be finite: fp32's smallest p is about exp(-103).
            log_p.clamp_(min=-1e3)
            log_p.add_(entropy[rows_, None]).mul_(grad_entropy[rows_, None])
            log_p.add_(grad_logprobs[rows_, None]).mul_(p).neg_()
            picked = grad_logprobs[rows_].where(owned[rows_], 0)
            log_p.scatter_add_(-1, local[rows_, None].clamp(max=ctx.real - 1), picked[:, None])
            grad[rows_, : ctx.real] = log_p.div_(ctx.temperature).to(grad.dtype)
        return grad, None, None, None, None
