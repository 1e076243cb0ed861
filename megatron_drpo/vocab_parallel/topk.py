"""The likeliest ids of vocab-parallel logits, without gathering the vocabulary.

Each rank sends its own likeliest ids and every rank merges the same lists in the same way. The
order is that of the logits themselves, exact at any temperature, and of equal logits the smaller id
comes first: a strict order, so that lists do not depend on how the vocabulary is sharded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_drpo.vocab_parallel.logprobs import row_temperature
from megatron_drpo.vocab_parallel.shard import Shard, gather_ranks, merge_sums, shard_of
from megatron_drpo.vocab_parallel.sweep import sweep_for

_TIE_ELEMENTS = 1 << 22
"""Logits that are compared at a time where equal ones meet the end of a list."""


class TopK(NamedTuple):
    """The K likeliest ids per token, the likeliest first."""

    ids: Tensor
    """int64 [T, K]; of equal logits the smaller id first."""
    logprobs: Tensor
    """[T, K], fp32 (fp64 where the logits are): under the whole softmax, not only these K."""


class Candidates(NamedTuple):
    """The merged lists of all ranks, the likeliest first, equal on every rank."""

    logits: Tensor
    """[T, n], fp32 (fp64 where the logits are); -inf at padding, which comes last."""
    ids: Tensor
    """int64 [T, n]; at padding an id that is not below the vocabulary's size."""
    complete: Tensor
    """int64 [T]: so many of the first are the likeliest ids of the whole vocabulary. An id behind
    the last one of some rank's list may be less likely than one that this rank did not send."""


def vocab_parallel_topk(
    logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> TopK:
    """The `k` likeliest ids over all ranks of `group` and their log-probs; one collective.

    Args:
        logits: [T, V/tp], any float type; rank i of `group` holds ids i*V/tp to (i+1)*V/tp - 1.
        k: at most `vocab_size`.
        temperature: of the softmax, above 0; a number, or fp32 [T].
        vocab_size: number of real ids; later columns are padding. None: all columns are real.
        group: the tensor-parallel group, None for one rank.

    Returns:
        Equal to the last bit on every rank, and the log-probs to those of `logprobs_and_entropy`.
        Not differentiable.

    Raises:
        ValueError: `k` is not between 1 and the size of the vocabulary.
    """
    logits = logits.detach()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()  # for the sweep
    shard = shard_of(logits.size(-1), vocab_size, group)
    check_k(k, shard)
    logit, column = _local(logits, min(k, logits.size(-1)), shard.real)
    partials = sweep_for(logits).partials(
        logits,
        column.where(column < shard.real, -1),
        row_temperature(temperature, logits),
        shard.real,
        None,
    )
    tops, sums, *lists = gather_together(
        group, partials[0], partials[1], logit, column + shard.start, partials[3:].T
    )
    logit, ids, z = (_side_by_side(part) for part in lists)
    order = logit.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    top, total = merge_sums(tops, sums)
    # The order of operations of `logprobs.merge`, to the same bits.
    logprobs = z.gather(-1, order) - top[:, None] - total.log()[:, None]
    return TopK(ids.gather(-1, order), logprobs)


def check_k(k: int, shard: Shard) -> None:
    """Raise ValueError if there are no `k` likeliest ids."""
    if not 0 < k <= shard.vocab_size:
        raise ValueError(f"k = {k}: the vocabulary has {shard.vocab_size} ids, and 1 is the least")


def candidates(
    logits: Tensor, count: int, shard: Shard, group: dist.ProcessGroup | None
) -> Candidates:
    """The `count` likeliest ids of each rank, merged; one collective.

    Args:
        logits: [T, V/tp].
        count: at least 1; as many as V/tp at most are taken.
        shard: of this rank.
        group: the tensor-parallel group, None for one rank.
    """
    columns = logits.size(-1)
    count = min(count, columns)
    logit, column = _local(logits.detach(), count, shard.real)
    lists = gather_together(group, logit, column + shard.start)
    logit, ids = (_side_by_side(part) for part in lists)
    # Ranks side by side hold ascending ids, so a stable sort keeps the smaller of equals first.
    logit, order = logit.sort(dim=-1, descending=True, stable=True)
    complete = order.new_full((logits.size(0),), min(order.size(-1), shard.vocab_size))
    for rank in range(order.size(-1) // count):
        if min(shard.vocab_size - rank * columns, columns) > count:
            # It holds more than it sent: nothing behind the last that it sent is certain.
            last = (order == (rank + 1) * count - 1).int().argmax(-1)
            complete = torch.minimum(complete, last + 1)
    return Candidates(logit, ids.gather(-1, order), complete)


def _local(logits: Tensor, count: int, real: int) -> tuple[Tensor, Tensor]:
    """[T, count] the largest logits and their columns, in an order that a stable sort of all ranks
    completes; padding follows as -inf."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    if count == logits.size(-1):  # the merge will order them
        columns = torch.arange(count, device=logits.device).expand_as(logits)
        return logits.to(acc).masked_fill(columns >= real, -torch.inf), columns
    values, columns = _ordered(logits[:, :real], min(count, real))
    missing = count - values.size(-1)
    values = F.pad(values.to(acc), (0, missing), value=-torch.inf)
    padding = torch.arange(real, real + missing, device=logits.device)
    return values, torch.cat([columns, padding.expand(logits.size(0), -1)], -1)


def _ordered(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, descending, of equals the smaller column first.

    torch.topk is free in the order of equals, and in which of them end the list.
    """
    if count == logits.size(-1):
        return logits.sort(dim=-1, descending=True, stable=True)
    values, columns = logits.topk(count + 1)
    last, beyond = values[:, count - 1], values[:, count]
    tied = (last == beyond).nonzero()[:, 0]
    for rows in tied.split(max(_TIE_ELEMENTS // logits.size(-1), 1)):
        row, column = (logits[rows] == last[rows, None]).nonzero(as_tuple=True)
        wanted = (values[rows, :count] == last[rows, None]).sum(-1)
        first = torch.searchsorted(row, torch.arange(len(rows), device=row.device))
        nth = torch.arange(len(row), device=row.device) - first[row]
        taken = nth < wanted[row]
        row, column, nth = row[taken], column[taken], nth[taken]
        columns[rows[row], count - wanted[row] + nth] = column
    columns, order = columns[:, :count].sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)


def gather_together(group: dist.ProcessGroup | None, *values: Tensor) -> list[Tensor]:
    """[ranks, ...] of each of `values`, which travel as bytes in one message."""
    messages = [_flat_copy(value).view(torch.uint8) for value in values]
    ranks = gather_ranks(torch.cat(messages), group)
    parts = ranks.split([message.numel() for message in messages], 1)
    return [
        _flat_copy(part).view(value.dtype).view(len(ranks), *value.shape)
        for part, value in zip(parts, values, strict=True)
    ]


def _flat_copy(value: Tensor) -> Tensor:
    """Seeing numbers as bytes, or bytes as numbers, needs plain strides and an aligned start."""
    return value.clone(memory_format=torch.contiguous_format).flatten()


def _side_by_side(ranks: Tensor) -> Tensor:
    """[T, ranks * n] of [ranks, T, n]."""
    return ranks.movedim(0, 1).flatten(1)
