"""Attention of packed rows, of their context-parallel parts, and of the cache: one function's bits.

The reference is one matrix over all tokens of the row, in fp64. Sequences are longer than what one
GEMM sums over, heads share keys in groups, and windows are as long as a sequence, shorter, and 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_drpo import mcore  # noqa: F401  # gives megatron-core its CPU meaning
from megatron_drpo.context_parallel import sequence_bounds, share_index
from megatron_drpo.mcore import attention
from megatron_drpo.mcore.attention import (
    DecodeLayout,
    KVCache,
    Piece,
    attend_layout,
    prefill_layout,
    row_layout,
)
from megatron_drpo.vocab_parallel.gemm import KEY_BLOCK, round_up

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.4
LENGTHS = (40, 8, 176, 16, 304)
TOKENS = sum(LENGTHS) + 16
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
WINDOWS = [None, 1, 5, 64, 150, 1000]


class Row(NamedTuple):
    """Each [S, 1, heads or groups, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def random_row() -> Row:
    generator = torch.Generator().manual_seed(4)

    def draw(heads: int) -> Tensor:
        return torch.randn(TOKENS, 1, heads, DIM, generator=generator).requires_grad_()

    return Row(draw(HEADS), draw(GROUPS), draw(GROUPS))


def oracle(row: Row, window: int | None) -> Tensor:
    """[real tokens, heads * D] in fp64."""
    query, key, value = (part.double().squeeze(1).transpose(0, 1) for part in row)
    key, value = (part.repeat_interleave(HEADS // GROUPS, 0) for part in (key, value))
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start, end in pairwise(CU_SEQLENS.tolist()):
        for token in range(start, end):
            first = start if window is None else max(start, token - window + 1)
            seen[token, first : token + 1] = True
    real = int(CU_SEQLENS[-1])
    scores = SCALE * query[:, :real] @ key.transpose(1, 2)
    probs = scores.masked_fill(~seen[:real], -torch.inf).softmax(-1)
    return (probs @ value).transpose(0, 1).flatten(1)


def slopes() -> Tensor:
    """What the sum of all outputs is weighted with, so that each one has a gradient of its own."""
    real = int(CU_SEQLENS[-1])
    return torch.randn(real, HEADS * DIM, generator=torch.Generator().manual_seed(5))


class FakeGroup(NamedTuple):
    """One of the ranks that share a row out."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_is_that_of_the_oracle(window: int | None) -> None:
    row = random_row()
    expected = oracle(row, window)
    wanted = torch.autograd.grad((expected * slopes()).sum(), row)
    out = attend_layout(*row, row_layout(CU_SEQLENS, TOKENS), 1, SCALE, window)[: len(expected), 0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((out * slopes()).sum(), row)
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_parts_have_the_bits_of_the_row(
    monkeypatch: pytest.MonkeyPatch, size: int, window: int | None
) -> None:
    """Forward the same bits; backward the row's gradients, over all ranks together."""
    row = random_row()
    whole = attend_layout(*row, row_layout(CU_SEQLENS, TOKENS), 1, SCALE, window)
    wanted = torch.autograd.grad((whole[: len(slopes()), 0] * slopes()).sum(), row)
    bounds = sequence_bounds(CU_SEQLENS, TOKENS)
    indices = [share_index(bounds, rank, size) for rank in range(size)]
    everyone = torch.cat([torch.stack([row.key, row.value], 1).squeeze(2)[i] for i in indices])
    monkeypatch.setattr(
        attention, "gather_from_sequence_parallel_region", lambda part, group: everyone
    )
    total = torch.zeros(())
    for rank, index in enumerate(indices):
        group = FakeGroup(rank, size)
        layout = row_layout(CU_SEQLENS, index.numel(), group)  # type: ignore[arg-type]
        out = attend_layout(*(part[index] for part in row), layout, 1, SCALE, window)
        real = index < len(slopes())
        assert torch.equal(out[real], whole[index[real]])
        total = total + (out[real, 0] * slopes()[index[real]]).sum()
    found = torch.autograd.grad(total, row)
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_and_decode_have_the_bits_of_the_row(window: int | None) -> None:
    """Prompts of three quarters of each sequence in two passes, and the rest token by token."""
    row = random_row()
    whole = attend_layout(*row, row_layout(CU_SEQLENS, TOKENS), 1, SCALE, window)
    starts = CU_SEQLENS[:-1].long()
    prompts = [3 * length // 4 for length in LENGTHS]
    cache = KVCache(len(LENGTHS), round_up(max(LENGTHS), KEY_BLOCK))

    def run(index: Tensor, layout: attention.RowLayout | DecodeLayout) -> None:
        out = attend_layout(*(part[index] for part in row), layout, 1, SCALE, window)
        assert torch.equal(out, whole[index])

    with torch.no_grad():
        cuts = [[0, prompt // 3, prompt] for prompt in prompts]
        for turn in range(2):
            pieces = [
                Piece(slot, cut[turn], cut[turn + 1] - cut[turn]) for slot, cut in enumerate(cuts)
            ]
            index = torch.cat(
                [starts[p.slot] + torch.arange(p.start, p.start + p.length) for p in pieces]
            )
            device = torch.device("cpu")
            run(index, prefill_layout(pieces, index.numel(), cache, device))
        positions = torch.tensor(prompts)
        for step in range(min(LENGTHS) // 4):
            place = positions + step
            length = round_up(int(place.max()) + 1, KEY_BLOCK)
            hidden = torch.arange(length) > place[:, None]
            run(
                starts + place,
                DecodeLayout(
                    cache=cache,
                    slots=torch.arange(len(LENGTHS)),
                    positions=place,
                    hidden=hidden[:, None, None, None],
                ),
            )
