"""Which ids a rank holds, and how the ranks' partial results come together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """The ids of this rank's columns: column c is id `start + c`; from `real` on it is padding."""

    start: int
    real: int
    vocab_size: int


def shard_of(columns: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> Shard:
    """The shard of this rank.

    Args:
        columns: of the local logits, equally many on each rank of `group`.
        vocab_size: number of real ids; None: all columns of all ranks are.
        group: the tensor-parallel group, None for one rank.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    vocab_size = columns * size if vocab_size is None else vocab_size
    if not 0 < vocab_size <= columns * size:
        raise ValueError(f"vocab_size {vocab_size}: {size} rank(s) hold {columns * size} columns")
    start = columns * rank
    return Shard(start, min(max(vocab_size - start, 0), columns), vocab_size)


def check_ids(ids: Tensor, vocab_size: int, mask: Tensor | None = None) -> None:
    """Raise ValueError if an id that is not masked lies outside [0, vocab_size)."""
    outside = (ids < 0) | (ids >= vocab_size)
    if mask is not None:
        outside &= mask if ids.dim() == 1 else mask[:, None]
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"id {int(ids[place])} at {list(place)}: outside the vocabulary of {vocab_size} ids"
        )


def gather_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ...]: the `value` of every rank, in their order; the same bits on every rank."""
    if group is None or group.size() == 1:
        return value[None]
    parts = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.stack(parts)


def merge_sums(tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """From each rank's maximum m and sum of exp(z - m), [ranks, ...], those of all ranks, [...]."""
    top = tops.max(0).values
    return top, add_ranks(sums * (tops - top).exp())


def add_ranks(values: Tensor) -> Tensor:
    """[...]: the sum of [ranks, ...] in the ranks' order, to the same bits in any batch.

    `torch.sum` adds in an order that depends on the other dimensions: from 5 ranks on, a row would
    have other bits alone than beside others.
    """
    return reduce(torch.add, values.unbind(0))


def parts(count: int, size: int) -> Iterator[slice]:
    """0 to `count`, cut into slices of `size`."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
