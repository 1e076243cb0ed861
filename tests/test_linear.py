"""The fused output layer against plain autograd in fp64: values, gradients, layouts, memory.

With `cut`, most tokens have kept ids: the reference then is a softmax over these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_drpo.types import KeptIds
from megatron_drpo.vocab_parallel import (
    Other,
    Scores,
    fused_linear_objective,
    linear_scores,
    logprobs_and_entropy,
    project,
    select_kept,
)
from tests.distributed import run_distributed

TOKENS, POSITIONS, HIDDEN, TOPK = 29, 40, 12, 3
CHUNK = 7


@dataclass(frozen=True)
class Case:
    """A batch over the whole vocabulary, in fp64."""

    vocab: int
    padded: int
    hidden: Tensor
    """[S, H]."""
    weight: Tensor
    """[padded, H]."""
    ids: Tensor
    """[T, K]."""
    rows: Tensor
    temperature: Tensor
    """[T]."""
    advantages: Tensor
    """[T, K]."""
    others: tuple[tuple[Tensor, Tensor, Any], ...]
    """hidden [T, H], weight [padded, H] and kind."""
    kept: KeptIds | None = None

    @property
    def cut(self) -> Tensor:
        """bool [T, vocab]: the ids that each token could not be drawn as."""
        cut = torch.zeros(TOKENS, self.vocab, dtype=torch.bool)
        if self.kept is not None:
            for token, ids in enumerate(self.kept.ids.split(self.kept.counts.tolist())):
                if len(ids):
                    cut[token] = True
                    cut[token, ids.long()] = False
        return cut


def some_kept(ids: Tensor, vocab: int) -> KeptIds:
    """From only the wanted ids to nearly all; every fifth token is not cut at all."""
    parts = []
    for token, wanted in enumerate(ids):
        generator = torch.Generator().manual_seed(token)
        others = torch.randperm(vocab, generator=generator)[: (0, 2, 9, vocab - 4)[token % 4]]
        parts.append(torch.cat([wanted, others]).unique() if token % 5 else wanted[:0])
    return KeptIds(torch.cat(parts).int(), torch.tensor([len(part) for part in parts]))


def make(vocab: int, padded: int, cut: bool = False) -> Case:
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = randn(POSITIONS, HIDDEN), randn(padded, HIDDEN)
    ids = torch.randint(0, vocab, (TOKENS, TOPK), generator=generator)
    return Case(
        vocab=vocab,
        padded=padded,
        hidden=hidden,
        weight=weight,
        ids=ids,
        rows=torch.randperm(POSITIONS, generator=generator)[:TOKENS].sort().values,
        temperature=0.5 + torch.rand(TOKENS, generator=generator, dtype=torch.float64),
        advantages=randn(TOKENS, TOPK),
        others=(
            (randn(TOKENS, HIDDEN), randn(padded, HIDDEN), "l2"),
            (randn(TOKENS, HIDDEN), randn(padded, HIDDEN), "kl_pq"),
        ),
        kept=some_kept(ids, vocab) if cut else None,
    )


def token_losses(case: Case, part: slice, scores: Scores) -> Tensor:
    """Something smooth of everything that a loss may depend on."""
    advantages = case.advantages[part].to(scores.entropy.dtype)
    loss = -(advantages * scores.logprobs.exp()).sum(-1) - 0.3 * scores.entropy.square()
    for weight, distance in zip((0.7, 0.2), scores.divergences, strict=False):
        loss = loss + weight * distance
    return loss


def oracle(case: Case) -> tuple[Tensor, Scores, Tensor, Tensor]:
    """(loss, scores, gradient of hidden, gradient of weight), by autograd on all logits at once."""
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T)[:, : case.vocab] / case.temperature[:, None]
        return torch.log_softmax(logits.masked_fill(case.cut, -torch.inf), -1)

    def expectation(log_p: Tensor, value: Tensor) -> Tensor:
        """Without the ids that cannot occur: 0 times the logarithm of 0 is NaN."""
        return (log_p.exp() * value.masked_fill(case.cut, 0)).sum(-1)

    log_p = log_softmax(hidden[case.rows], weight)
    distances = []
    for other_hidden, other_weight, kind in case.others:
        log_q = log_softmax(other_hidden, other_weight)
        distances.append(
            (log_p.exp() - log_q.exp()).square().sum(-1)
            if kind == "l2"
            else expectation(log_p, log_p.masked_fill(case.cut, 0) - log_q)
        )
    entropy = -expectation(log_p, log_p)
    scores = Scores(log_p.gather(-1, case.ids), entropy, tuple(distances))
    loss = token_losses(case, slice(None), scores).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), scores, *gradients


def fused(
    case: Case,
    *,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_rows: int = CHUNK,
    own_buffer: bool = False,
) -> tuple[Tensor, Scores, Tensor, Tensor]:
    """The same from `fused_linear_objective` on this rank's shard."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    columns, positions = case.padded // size, POSITIONS // size
    mine = slice(rank * columns, (rank + 1) * columns)
    hidden = case.hidden.to(dtype)
    if sequence_parallel:
        hidden = hidden[rank * positions : (rank + 1) * positions]
    hidden = hidden.clone().requires_grad_()
    weight = case.weight[mine].to(dtype).clone().requires_grad_()
    acc = torch.promote_types(dtype, torch.float32)
    buffer = torch.ones(weight.shape, dtype=acc) if own_buffer else None
    result = fused_linear_objective(
        hidden,
        weight,
        case.ids,
        lambda part, scores: token_losses(case, part, scores),
        temperature=case.temperature,
        vocab_size=case.vocab,
        rows=case.rows,
        kept=case.kept,
        others=[Other(h.to(dtype), w[mine].to(dtype), kind) for h, w, kind in case.others],
        weight_grad=buffer,
        sequence_parallel=sequence_parallel,
        group=group,
        chunk_bytes=chunk_rows * columns * acc.itemsize,
    )
    result.loss.backward()
    assert hidden.grad is not None
    if own_buffer:
        assert weight.grad is None and buffer is not None
        weight_grad = buffer - 1
    else:
        assert weight.grad is not None
        weight_grad = weight.grad
    return result.loss.detach(), result.scores, hidden.grad, weight_grad


def check(found: Sequence[Any], wanted: Sequence[Any], columns: slice, rows: slice, **limit):
    (loss, scores, hidden, weight), (loss_, scores_, hidden_, weight_) = found, wanted
    torch.testing.assert_close(loss.double(), loss_, **limit)
    torch.testing.assert_close(scores.logprobs.double(), scores_.logprobs, **limit)
    torch.testing.assert_close(scores.entropy.double(), scores_.entropy, **limit)
    for value, value_ in zip(scores.divergences, scores_.divergences, strict=True):
        torch.testing.assert_close(value.double(), value_, **limit)
    torch.testing.assert_close(hidden.double(), hidden_[rows], **limit)
    torch.testing.assert_close(weight.double(), weight_[columns], **limit)


EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("own_buffer", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize(("vocab", "padded"), [(50, 50), (45, 48)])
@pytest.mark.parametrize("cut", [False, True])
def test_one_rank_equals_autograd(cut, vocab, padded, dtype, limit, own_buffer) -> None:
    case = make(vocab, padded, cut)
    found = fused(case, dtype=dtype, own_buffer=own_buffer)
    check(found, oracle(case), slice(None), slice(None), **limit)
    assert not any(x.requires_grad for x in (found[1].logprobs, found[1].entropy))


def test_bf16_weights_have_fp32_scores_and_an_fp32_weight_gradient() -> None:
    """Against fp64 on the rounded inputs: what is left is the rounding of hidden's gradient."""
    case = make(45, 48)
    rounded = Case(
        **{
            **vars(case),
            "hidden": case.hidden.bfloat16().double(),
            "weight": case.weight.bfloat16().double(),
            "others": tuple(
                (h.bfloat16().double(), w.bfloat16().double(), k) for h, w, k in case.others
            ),
        }
    )
    loss, scores, hidden, weight = fused(case, dtype=torch.bfloat16, own_buffer=True)
    loss_, scores_, hidden_, weight_ = oracle(rounded)
    assert scores.logprobs.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss_, **SINGLE)
    torch.testing.assert_close(scores.logprobs.double(), scores_.logprobs, **SINGLE)
    torch.testing.assert_close(weight.double(), weight_, **SINGLE)
    torch.testing.assert_close(hidden.double(), hidden_, rtol=2**-7, atol=2e-3)


def _ranks(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    # The last rank of four has 5 of its 12 ids.
    for vocab, padded, cut in ((48, 48, False), (41, 48, True), (41, 48, False)):
        case = make(vocab, padded, cut)
        wanted = oracle(case)
        columns = padded // world_size
        mine = slice(rank * columns, (rank + 1) * columns)
        part = POSITIONS // world_size
        for dtype, limit in ((torch.float64, EXACT), (torch.float32, SINGLE)):
            for own_buffer in (False, True):
                found = fused(case, dtype=dtype, group=group, own_buffer=own_buffer)
                check(found, wanted, mine, slice(None), **limit)
            found = fused(case, dtype=dtype, group=group, sequence_parallel=True)
            check(found, wanted, mine, slice(rank * part, (rank + 1) * part), **limit)
    # Forward: one collective per chunk. Backward: one, for the gradient of the hidden states.
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counted(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    plain = Case(**{**vars(case), "others": ()})
    for name in originals:
        setattr(dist, name, counted(name))
    fused(plain, dtype=torch.float32, group=group)
    for name, original in originals.items():
        setattr(dist, name, original)
    assert calls == ["all_gather"] * -(-TOKENS // CHUNK) + ["all_reduce"]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_autograd(size: int) -> None:
    run_distributed(_ranks, size)


@settings(max_examples=25, deadline=None)
@given(chunk_rows=st.integers(4, 40), seed=st.integers(0, 1000), cut=st.booleans())
def test_chunks_and_order_of_tokens_change_nothing(chunk_rows: int, seed: int, cut: bool) -> None:
    case = make(45, 48, cut)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    shuffled = Case(
        **{
            **vars(case),
            "ids": case.ids[order],
            "rows": case.rows[order],
            "temperature": case.temperature[order],
            "advantages": case.advantages[order],
            "others": tuple((h[order], w, k) for h, w, k in case.others),
            "kept": None if case.kept is None else select_kept(case.kept, order),
        }
    )
    loss, scores, hidden, weight = fused(shuffled, dtype=torch.float32, chunk_rows=chunk_rows)
    loss_, scores_, hidden_, weight_ = fused(case, dtype=torch.float32, chunk_rows=100)
    # A token's own numbers have the same bits in any company; sums are sums in another order.
    assert torch.equal(scores.logprobs, scores_.logprobs[order])
    assert torch.equal(scores.entropy, scores_.entropy[order])
    torch.testing.assert_close(loss, loss_, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, hidden_, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight, weight_, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_scoring_and_training_see_the_same_bits(dtype: torch.dtype) -> None:
    """What makes the ratio of a fresh token exactly 1: logits by `project`, of any few rows."""
    case = make(45, 48)
    hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
    ids = case.ids[:, 0]
    _, trained, _, _ = fused(case, dtype=dtype)
    scored = linear_scores(
        hidden, weight, ids, temperature=case.temperature, vocab_size=45, rows=case.rows
    )
    assert torch.equal(trained.logprobs[:, 0], scored.logprobs)
    assert torch.equal(trained.entropy, scored.entropy)
    for count in (1, 2, 3, 5):
        rows = case.rows[:count]
        generated = logprobs_and_entropy(
            project(hidden[rows], weight),
            ids[:count],
            temperature=case.temperature[:count],
            vocab_size=45,
        )
        assert torch.equal(generated.logprobs, scored.logprobs[:count])


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, views apart."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, Tensor)]
        for value in out if isinstance(out, (tuple, list)) else [out]:
            fresh = isinstance(value, Tensor) and all(
                value.untyped_storage().data_ptr() != a.untyped_storage().data_ptr() for a in inputs
            )
            if fresh:
                self.elements = max(self.elements, value.numel())
        return out


def test_nothing_of_the_size_of_the_logits_is_ever_made() -> None:
    tokens, hidden_size, vocab, chunk_rows = 640, 8, 512, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    ids = torch.randint(0, vocab, (tokens,))
    with _Largest() as seen:
        result = fused_linear_objective(
            hidden,
            weight,
            ids,
            lambda _, scores: -scores.logprobs - scores.entropy,
            chunk_bytes=chunk_rows * vocab * 4,
            weight_grad=torch.zeros(vocab, hidden_size),
        )
        result.loss.backward()
        linear_scores(hidden, weight, ids, chunk_bytes=chunk_rows * vocab * 4)
    assert seen.elements == chunk_rows * vocab  # that is one chunk, and not 640 * 512


def test_a_tied_weight_receives_both_gradients() -> None:
    case = make(50, 50)
    tokens = torch.randint(0, 50, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    gradients = []
    for fuse in (True, False):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.tanh(weight[tokens])
        if fuse:
            loss = fused_linear_objective(
                hidden, weight, case.ids[:, 0], lambda _, s: -s.logprobs, rows=case.rows
            ).loss
        else:
            logits = hidden[case.rows] @ weight.T
            loss = torch.nn.functional.cross_entropy(logits, case.ids[:, 0], reduction="sum")
        loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_scaled_loss_scales_the_gradients_or_is_refused() -> None:
    case = make(50, 50)

    def run(**kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        result = fused_linear_objective(
            hidden, weight, case.ids, lambda _, s: -s.logprobs.sum(-1), rows=case.rows, **kwargs
        )
        return result.loss, hidden, weight

    loss, hidden, weight = run()
    loss.backward()
    loss, hidden3, weight3 = run()
    (3 * loss).backward()
    torch.testing.assert_close(hidden3.grad, 3 * hidden.grad)
    torch.testing.assert_close(weight3.grad, 3 * weight.grad)
    loss, _, _ = run(weight_grad=torch.zeros_like(case.weight))
    with pytest.raises(RuntimeError, match="must not be scaled"):
        (3 * loss).backward()


def test_without_tokens_there_is_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(5, HIDDEN, requires_grad=True)
    weight = torch.randn(20, HIDDEN, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    result = fused_linear_objective(hidden, weight, none, lambda _, s: -s.logprobs, rows=none)
    result.loss.backward()
    assert result.loss == 0 and result.scores.logprobs.shape == (0,)
    assert hidden.grad is not None and not hidden.grad.any() and not weight.grad.any()


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    hidden, weight = torch.randn(5, HIDDEN), torch.randn(20, HIDDEN)
    with pytest.raises(ValueError, match="id 18 at .* vocabulary of 18"):
        linear_scores(hidden, weight, torch.tensor([0, 1, 18, 3, 4]), vocab_size=18)
