"""The likeliest ids of vocab-parallel logits: their order, also among equals, and log-probs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.vocab_parallel import logprobs_and_entropy, topk, vocab_parallel_topk
from megatron_drpo.vocab_parallel.shard import shard_of

COLUMNS, VOCAB = 24, 21
POISON = 3e4
"""Logit of padding columns: it would come first."""
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def tied_logits(rows: int, dtype: torch.dtype = torch.float32, seed: int = 4) -> Tensor:
    """Few distinct values, so that most lists end among equals; some of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (rows, COLUMNS), generator=generator).to(dtype)
    logits[logits == -3] = -torch.inf
    logits[:, 5] = 0.5  # every row has mass
    logits[1::3] += torch.randn(logits[1::3].shape, generator=generator).to(dtype)
    logits[:, VOCAB:] = POISON
    return logits


def order(row: Tensor, vocab_size: int = VOCAB) -> list[int]:
    return sorted(range(vocab_size), key=lambda i: (-float(row[i]), i))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", range(1, VOCAB + 1))
def test_ids_are_in_order_and_log_probs_the_trainers_to_the_bit(k: int, dtype) -> None:
    logits = tied_logits(60, dtype)
    temperature = torch.linspace(0.5, 2, 60)
    options = {"temperature": temperature, "vocab_size": VOCAB}
    result = vocab_parallel_topk(logits, k, **options)
    assert result.ids.tolist() == [order(row)[:k] for row in logits]
    assert torch.equal(result.logprobs, logprobs_and_entropy(logits, result.ids, **options)[0])
    expected = (logits[:, :VOCAB].double() / temperature[:, None]).log_softmax(-1)
    expected = expected.gather(-1, result.ids).to(result.logprobs.dtype)
    torch.testing.assert_close(result.logprobs, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 3.0, float("-inf")]), min_size=1, max_size=40),
    data=st.data(),
)
def test_any_ties(row: list[float], data: st.DataObject) -> None:
    logits, k = torch.tensor([row, row[::-1]]), data.draw(st.integers(1, len(row)))
    expected = [order(each, len(row))[:k] for each in logits]
    assert vocab_parallel_topk(logits, k).ids.tolist() == expected


def test_ties_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = tied_logits(50)
    whole = vocab_parallel_topk(logits, 9, vocab_size=VOCAB)
    monkeypatch.setattr(topk, "_TIE_ELEMENTS", 2 * COLUMNS + 1)
    assert torch.equal(vocab_parallel_topk(logits, 9, vocab_size=VOCAB).ids, whole.ids)


@pytest.mark.parametrize("k", [-1, 0, VOCAB + 1])
def test_k_outside_the_vocabulary_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}: the vocabulary has {VOCAB} ids"):
        vocab_parallel_topk(tied_logits(2), k, vocab_size=VOCAB)


def test_no_rows() -> None:
    result = vocab_parallel_topk(tied_logits(0), 3, vocab_size=VOCAB)
    assert result.ids.shape == result.logprobs.shape == (0, 3)


def check_sharded_topk(group: dist.ProcessGroup) -> None:
    """On each rank of `group`: what one rank finds, to the same bits on all ranks, in one message.

    Called by test_divergence, which has the processes.
    """
    size, width = group.size(), COLUMNS // group.size()
    for vocab_size in (VOCAB, COLUMNS, 5):  # 5: at TP 4, two shards of padding
        for dtype in DTYPES:
            logits = tied_logits(31, dtype)
            logits[:, vocab_size:] = POISON
            logits[:7, :5], logits[:7, 4] = -torch.inf, 1.0
            shard = logits[:, group.rank() * width :][:, :width]
            orders = [order(row, vocab_size) for row in logits]
            options = {"temperature": 0.7, "vocab_size": vocab_size}
            for k in {1, 2, 5, 6, 7, 13, vocab_size - 1, vocab_size} & {*range(vocab_size + 1)}:
                result = vocab_parallel_topk(shard, k, **options, group=group)
                assert result.ids.tolist() == [each[:k] for each in orders]
                scored = logprobs_and_entropy(shard, result.ids, **options, group=group)
                assert torch.equal(result.logprobs, scored.logprobs)
                alone = vocab_parallel_topk(logits, k, **options).logprobs
                torch.testing.assert_close(result.logprobs, alone, rtol=1e-6, atol=1e-6)
                ranks = [torch.empty_like(alone) for _ in range(size)]
                dist.all_gather(ranks, result.logprobs, group=group)
                assert all(torch.equal(result.logprobs, other) for other in ranks)
        _check_complete(orders, shard, vocab_size, group)


def _check_complete(orders: list[list[int]], shard: Tensor, vocab_size: int, group) -> None:
    """What candidates call complete is, and it ends only where a rank's list ends."""
    here = shard_of(shard.size(-1), vocab_size, group)
    for count in (1, 2, 5, 6, 11, 12):
        found = topk.candidates(shard, count, here, group)
        for expected, ids, size in zip(
            orders, found.ids.tolist(), found.complete.tolist(), strict=True
        ):
            assert ids[:size] == expected[:size]
            sent = Counter(each // shard.size(-1) for each in ids[:size])
            assert size == vocab_size or min(count, shard.size(-1)) in sent.values()
