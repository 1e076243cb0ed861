"""Context parallelism: which tokens of a row each of the ranks that share it out computes.

In: a row whose sequences, and itself, take up multiples of 2 * cp_size (`packing.pack`). Out: one
rank's part of it. Attention is causal, so the end of a sequence costs more than its beginning: a
rank takes a piece from either side, as Megatron and Transformer Engine do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_drpo.types import Row, RowShare
from megatron_drpo.vocab_parallel.kept import select_kept

BY_TOKEN = ("tokens", "positions", "experts")
"""Fields of `Row` with one entry per token."""
BY_LOSS_TOKEN = (
    "targets",
    "behaviour_logprobs",
    "advantages",
    "weights",
    "sequence",
    "policy_versions",
    "topk_ids",
    "behaviour_topk_logprobs",
    "old_logprobs",
    "reference_logprobs",
    "behaviour_hidden",
    "reference_hidden",
)
"""Fields of `Row` with one entry per loss token, if any."""


def share_row(row: Row, rank: int, size: int) -> Row:
    """The part of a row that context-parallel rank `rank` of `size` computes; see `RowShare`.

    What follows the last sequence is shared out like one.

    Raises:
        ValueError: a sequence, or the row, is not a multiple of 2 * size long.
    """
    if size == 1:
        return row
    num_tokens = row.tokens.numel()
    bounds = sequence_bounds(row.cu_seqlens, num_tokens)
    if any(bound % (2 * size) for bound in bounds):
        raise ValueError(f"a row with bounds {bounds} cannot be shared out over {size} ranks")
    index = share_index(bounds, rank, size)
    local = torch.full((num_tokens,), -1)
    local[index] = torch.arange(index.numel())
    loss_index = local[row.loss_index]
    places = (loss_index >= 0).nonzero().flatten()

    def at(name: str, where: Tensor) -> Tensor | None:
        value = getattr(row, name)
        return None if value is None else value[where]

    return replace(
        row,
        **{name: at(name, index) for name in BY_TOKEN},
        **{name: at(name, places) for name in BY_LOSS_TOKEN},
        kept_ids=None if row.kept_ids is None else select_kept(row.kept_ids, places),
        loss_index=loss_index[places],
        num_items=row.num_items if rank == 0 else 0,
        share=RowShare(index, places, row.sequence),
    )


def sequence_bounds(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Where the sequences of a row begin and end, its padding being the last one."""
    bounds = cu_seqlens.tolist()
    return bounds if bounds[-1] == num_tokens else [*bounds, num_tokens]


def share_index(bounds: list[int], rank: int, size: int) -> Tensor:
    """int64 [S / size], ascending: where rank `rank` has its tokens in the row.

    Args:
        bounds: as `sequence_bounds`, multiples of 2 * size.
    """
    parts = [
        torch.arange(start + first, start + first + count)
        for start, end in zip(bounds, bounds[1:], strict=False)
        for first, count in pieces(end - start, rank, size)
    ]
    return torch.cat(parts)


def pieces(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """(start, length) of what rank `rank` computes of a sequence of `length` tokens, in order."""
    if size == 1:
        return [(0, length)]
    piece = length // (2 * size)
    return [(number * piece, piece) for number in (rank, 2 * size - 1 - rank)]
