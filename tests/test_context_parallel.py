"""Sharing a row out: the parts are the row, and each of them is what Transformer Engine expects."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.context_parallel import BY_LOSS_TOKEN, BY_TOKEN, share_row
from megatron_drpo.packing import pack
from megatron_drpo.types import KeptIds, Prompt, Rollout, Row, Trajectory

VOCAB, TOPK = 50, 3


def trajectories(lengths: list[tuple[int, int]], seed: int) -> list[Trajectory]:
    """Random ones, of (prompt, response) tokens; every third loss token is masked."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(VOCAB, shape, generator=generator)

    out = []
    for number, (prompt, response) in enumerate(lengths):
        tokens, counts = ids(response), ids(response) % 3
        kept = torch.cat(
            [torch.arange(token, token + n) for token, n in zip(tokens, counts, strict=True)]
        )
        rollout = Rollout(
            prompt=Prompt(f"p{number}", "", ids(prompt), None),
            sample=0,
            response_ids=tokens,
            behaviour_logprobs=-torch.rand(response, generator=generator),
            finish_reason="length",
            policy_version=number,
            response_text="",
            topk_ids=ids(response, TOPK),
            topk_logprobs=-torch.rand(response, TOPK, generator=generator),
            kept_ids=KeptIds(kept.int(), counts),
            loss_mask=torch.arange(response) % 3 != 1,
        )
        out.append(Trajectory(rollout, 0.0, float(number)))
    return out


def rows_of(lengths: list[tuple[int, int]], size: int, seed: int = 0) -> list[Row]:
    """Packed for context parallelism of this size, with what scoring adds."""
    [rows] = pack(
        trajectories(lengths, seed),
        max_tokens=80,
        num_replicas=1,
        rows_multiple=2,  # so that there are rows without any sequence
        aggregation="token-mean",
        horizon=1,
        sequence_multiple=2 * size,
        pad_multiple=16 * size,
    )
    generator = torch.Generator().manual_seed(seed)

    def scored(row: Row) -> Row:
        count = row.targets.numel()
        extra = {
            name: torch.rand(count, *shape, generator=generator)
            for name, shape in {
                "old_logprobs": (),
                "reference_logprobs": (),
                "behaviour_hidden": (4,),
                "reference_hidden": (4,),
            }.items()
        }
        experts = torch.randint(8, (row.tokens.numel(), 2, 2), generator=generator)
        return replace(row, experts=experts, **extra)

    return [scored(row) for row in rows]


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=9)


@given(lengths=LENGTHS, size=st.sampled_from([1, 2, 3, 4]), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_parts_are_the_row(lengths, size: int, seed: int) -> None:
    """Each token is on one rank, with the same neighbours in time and everything known of it."""
    for row in rows_of(lengths, size, seed):
        parts = [share_row(row, rank, size) for rank in range(size)]
        assert sum(part.num_items for part in parts) == row.num_items
        if size == 1:
            assert parts[0].share is None
            continue
        tokens, places = [], []
        for part in parts:
            share = part.share
            assert share is not None
            tokens += share.index.tolist()
            places += share.loss_places.tolist()
            assert part.tokens.numel() == row.tokens.numel() // size
            assert torch.equal(share.index[part.loss_index], row.loss_index[share.loss_places])
            assert part.loss_index.tolist() == sorted(part.loss_index.tolist())
            for name in BY_TOKEN:
                assert torch.equal(getattr(part, name), getattr(row, name)[share.index])
            for name in BY_LOSS_TOKEN:
                assert torch.equal(getattr(part, name), getattr(row, name)[share.loss_places])
            assert torch.equal(share.whole_sequence, row.sequence)
            assert kept(part) == [kept(row)[place] for place in share.loss_places.tolist()]
            assert (part.cu_seqlens is row.cu_seqlens) and part.names == row.names
        assert sorted(tokens) == list(range(row.tokens.numel()))
        assert sorted(places) == list(range(row.targets.numel()))


def kept(row: Row) -> list[list[int]]:
    if row.kept_ids is None:  # a row without any sequence
        return []
    return [part.tolist() for part in row.kept_ids.ids.split(row.kept_ids.counts.tolist())]


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_has_the_tokens_that_transformer_engine_gives_it(size: int) -> None:
    """`thd_get_partitioned_indices`, written out; it takes the row's padding for a sequence."""
    for row in rows_of([(3, 5), (20, 13), (1, 1), (9, 20), (7, 20), (20, 20)], size):
        ends = row.cu_seqlens.tolist()
        if ends[-1] != row.tokens.numel():
            ends.append(row.tokens.numel())
        for rank in range(size):
            expected = []
            for start, end in zip(ends, ends[1:], strict=False):
                half = (end - start) // size // 2
                for place in range(2 * half):
                    chunk = rank if place < half else 2 * (size - 1) - rank
                    expected.append(start + place + half * chunk)
            share = share_row(row, rank, size).share
            assert share is not None and share.index.tolist() == expected


@pytest.mark.parametrize("size", [2, 3, 4])
def test_attention_costs_every_rank_the_same(size: int) -> None:
    for row in rows_of([(3, 5), (20, 13), (1, 1), (9, 20), (7, 20), (20, 20)], size):
        parts = [share_row(row, rank, size) for rank in range(size)]
        scores = [int((part.positions + 1)[part.positions > 0].sum()) for part in parts]
        firsts = [int((part.positions == 0).sum()) for part in parts]
        whole = row.cu_seqlens[-1] // size
        pairs = [s + f for s, f in zip(scores, firsts, strict=True)]
        # Padding of the row has position 0 throughout, and as many tokens on every rank.
        assert len(set(pairs)) == 1 and all(part.tokens.numel() >= whole for part in parts)


def test_a_row_whose_sequences_cannot_be_cut_is_refused() -> None:
    [row, _] = rows_of([(3, 5), (2, 2)], 2)
    with pytest.raises(ValueError, match="cannot be shared out over 4 ranks"):
        share_row(replace(row, cu_seqlens=torch.tensor([0, 8, 12], dtype=torch.int32)), 0, 4)


def test_every_field_of_a_row_is_shared_out_or_the_same_for_all_ranks() -> None:
    """A new field has to be given its place here, and one of the lists if it is of tokens."""
    others = {"cu_seqlens", "loss_index", "num_items", "names", "kept_ids", "share"}
    assert {f.name for f in fields(Row)} == {*BY_TOKEN, *BY_LOSS_TOKEN, *others}
