"""Divergences on vocab-parallel logits against fp64 and high-precision oracles; and, since the
processes are here, the sharded top-k and sampler with them."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_drpo.vocab_parallel import Normalizer, divergence, normalizers_of
from tests.distributed import run_distributed
from tests.test_sampling import check_sharded_draws
from tests.test_topk import check_sharded_topk

KINDS = ["tv", "kl_pq", "kl_qp", "js", "l2"]
COLUMNS, VOCAB, ROWS = 24, 21, 30
POISON = 3e4
"""Logit of padding columns: any mass that they receive shows."""
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
}


def two_logits(
    dtype: torch.dtype = torch.float64, seed: int = 3, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """[rows, COLUMNS] of p and q, with padding, and with ids that neither can draw."""
    generator = torch.Generator().manual_seed(seed)
    p, q = 2 * torch.randn((2, rows, COLUMNS), generator=generator)
    q[::2] = p[::2] + 0.1 * q[::2]
    for each in (p, q):
        each[:5, :8] = each[5:10, 15:] = -torch.inf
        each[:, VOCAB:] = POISON
    return p.to(dtype), q.to(dtype)


def formula(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """By the books, from probabilities [..., V]."""
    m = (p + q) / 2
    match kind:
        case "tv":
            return (p - q).abs().sum(-1) / 2
        case "kl_pq":
            return (p.xlogy(p) - p.xlogy(q)).sum(-1)
        case "kl_qp":
            return (q.xlogy(q) - q.xlogy(p)).sum(-1)
        case "js":
            return (p.xlogy(p) + q.xlogy(q)).sum(-1) / 2 - m.xlogy(m).sum(-1)
        case _:
            return (p - q).square().sum(-1)


def oracle(
    logits_p: Tensor, logits_q: Tensor, kind: str, temperature: Any, top: list | None = None
) -> tuple[Tensor, Tensor]:
    """Value and gradient of `upstream` times it, by fp64 autograd over ids with mass.

    top: the ids that have a bucket of their own, per row.
    """
    values, gradient = [], torch.zeros_like(logits_p, dtype=torch.float64)
    temperature = torch.as_tensor(temperature).double().expand(len(logits_p))
    for row in range(len(logits_p)):
        z = logits_p[row].double().requires_grad_()
        mass = [
            (each[:VOCAB][z[:VOCAB].isfinite()] / temperature[row]).softmax(-1)
            for each in (z, logits_q[row].double())
        ]
        if top is not None:
            ids = z[:VOCAB].isfinite().nonzero()[:, 0].tolist()
            own = [place for place, i in enumerate(ids) if i in top[row]]
            rest = [place for place, i in enumerate(ids) if i not in top[row]]
            mass = [torch.cat([each[own], each[rest].sum()[None]]) for each in mass]
        value = formula(*mass, kind)
        values.append(value.detach())
        (slope,) = torch.autograd.grad(value, z)
        gradient[row] = slope
    return torch.stack(values), gradient * upstream(len(logits_p))[:, None]


def upstream(rows: int) -> Tensor:
    g = torch.linspace(-2, 3, rows, dtype=torch.float64)
    return g.where(torch.arange(rows) % 7 != 3, 0)


def computed(
    logits_p: Tensor, logits_q: Tensor, kind: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of `upstream` times it."""
    leaf = logits_p.detach().clone().requires_grad_()
    value = divergence(leaf, logits_q, kind, vocab_size=VOCAB, **options)
    (value.double() * upstream(len(leaf))).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    return value.detach(), leaf.grad


def check(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype) -> None:
    value_dtype = torch.promote_types(dtype, torch.float32)
    assert result[0].dtype == value_dtype
    torch.testing.assert_close(result[0].double(), expected[0], **TOLERANCE[value_dtype])
    torch.testing.assert_close(result[1].double(), expected[1], **TOLERANCE[dtype])


TEMPERATURES = {"one": 1.0, "number": 0.5, "per-row": torch.linspace(0.5, 2, ROWS)}


# The whole vocabulary.


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_oracles(kind: str, temperature: Any, dtype) -> None:
    p, q = two_logits(dtype)
    result = computed(p, q, kind, temperature=temperature)
    check(result, oracle(p, q, kind, temperature), dtype)
    inert = p.isinf() | (torch.arange(COLUMNS) >= VOCAB) | (upstream(ROWS) == 0)[:, None]
    assert not result[1][inert].any()


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_finite_differences(kind: str, top_k: int | None) -> None:
    p, q = two_logits(rows=4, seed=8)
    p, q = p[:, 8:15].clone().requires_grad_(), q[:, 8:15]
    assert torch.autograd.gradcheck(lambda p: divergence(p, q, kind, top_k=top_k), p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_p_close_to_q_keeps_its_digits(kind: str, size: float) -> None:
    """Against 50 digits, for logits around 20 in fp32: what the rounded logits really differ by."""
    generator = torch.Generator().manual_seed(1)
    q = 20 + 3 * torch.randn((3, 12), generator=generator)
    p = q + size * torch.randn((3, 12), generator=generator)
    p[2], p[2, 4] = q[2], q[2, 4] + 20 * size  # all but one equal
    value = divergence(p, q, kind)
    for row in range(3):
        expected = _in_50_digits(p[row], q[row], kind)
        assert float(value[row]) == pytest.approx(expected, rel=1e-2, abs=1e-14)
        if size == 1e-4 and kind.startswith("kl"):
            assert 1e-10 < expected < 1e-6
    parts = normalizers_of(p, q)
    rounded = tuple(Normalizer(*(each.float() for each in part)) for part in parts)
    again = divergence(p, q, kind, normalizers=rounded)  # type: ignore[reportArgumentType]
    slack = 1e-6 if kind == "tv" else 1e-12
    torch.testing.assert_close(again, value, rtol=2e-2, atol=slack)


def _in_50_digits(p: Tensor, q: Tensor, kind: str) -> float:
    with mpmath.workdps(50):
        mass = []
        for row in (p, q):
            e = [mpmath.exp(mpmath.mpf(x)) for x in row.tolist()]
            mass.append([x / sum(e) for x in e])
        pairs = list(zip(*mass, strict=True))

        def log(a: Any, b: Any) -> Any:
            return a * mpmath.log(a / b)

        match kind:
            case "tv":
                return float(sum(abs(a - b) for a, b in pairs) / 2)
            case "kl_pq":
                return float(sum(log(a, b) for a, b in pairs))
            case "kl_qp":
                return float(sum(log(b, a) for a, b in pairs))
            case "js":
                return float(sum(log(a, (a + b) / 2) + log(b, (a + b) / 2) for a, b in pairs) / 2)
            case _:
                return float(sum((a - b) ** 2 for a, b in pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_are_at_no_distance_and_at_rest(dtype) -> None:
    p, _ = two_logits(dtype)
    for kind in KINDS:
        value, gradient = computed(p, p.clone(), kind)
        assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_that_only_one_can_draw(dtype) -> None:
    """p = (1/2, 1/2, 0), q = (0, 1/2, 1/2), closed forms; and the rows beside them are as ever."""
    p, q = (each[:2].clone() for each in two_logits(dtype, seed=5))
    p[0] = q[0] = -torch.inf
    p[0, 9] = p[0, 10] = q[0, 10] = q[0, 11] = 1.0
    g = torch.tensor([1.0, 1.0])
    expected = {
        "tv": 0.5, "kl_pq": math.inf, "kl_qp": math.inf, "js": math.log(2) / 2, "l2": 0.5,
    }  # fmt: skip
    for kind, number in expected.items():
        for options in ({}, {"top_k": 2}):  # q's two, and the rest: the same numbers
            leaf = p.clone().requires_grad_()
            value = divergence(leaf, q, kind, vocab_size=VOCAB, **options)
            assert float(value[0].detach()) == pytest.approx(number)
            (gradient,) = torch.autograd.grad(value, leaf, g)
            assert gradient[1].isfinite().all() and gradient[1].any()
            assert gradient[0].isfinite().all() or kind == "kl_pq"
            assert not gradient[0][p[0].isneginf()].any()
            alone = divergence(p[1:], q[1:], kind, vocab_size=VOCAB, **options)
            assert torch.equal(value[1:].detach(), alone)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_incoming_gradient_is_inert_whatever_it_holds(kind: str, options) -> None:
    p, q = two_logits(torch.float32)
    p[0], q[1], p[2, 12] = torch.nan, torch.nan, torch.inf
    leaf = p.clone().requires_grad_()
    value = divergence(leaf, q, kind, vocab_size=VOCAB, **options)
    value[3:].sum().backward()
    assert leaf.grad is not None and not leaf.grad[:3].any() and leaf.grad.isfinite().all()


def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of this name is the function.
    module = importlib.import_module("megatron_drpo.vocab_parallel.divergence")
    p, q = two_logits(torch.float32)
    whole = {kind: computed(p, q, kind) for kind in KINDS}
    for rows in (0.5, 1, 7):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", int(rows * VOCAB))
        for kind in KINDS:
            assert all(map(torch.equal, computed(p, q, kind), whole[kind]))


class Largest(TorchDispatchMode):
    """Elements and names of the tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in inputs:
                size = each.untyped_storage().nbytes()
                self.made[str(func)] = max(self.made[str(func)], size)
        return result


def test_nothing_of_the_size_of_the_logits_but_the_gradient(monkeypatch) -> None:
    module = importlib.import_module("megatron_drpo.vocab_parallel.divergence")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2048)
    p, q = torch.randn((2, 64, 1024), dtype=torch.float32).bfloat16()
    p.requires_grad_()
    for kind in KINDS:
        with Largest() as forward:
            value = divergence(p, q, kind).sum()
        with Largest() as backward:
            value.backward()
        assert max(forward.made.values()) <= 2048 * 8
        big = [name for name, size in backward.made.items() if size > 2048 * 8]
        assert big == ["aten.empty_like.default"]
        assert backward.made["aten.empty_like.default"] == p.numel() * 2


@pytest.mark.parametrize("kind", KINDS)
def test_normalizers_given_are_the_ones_computed(kind: str) -> None:
    p, q = two_logits(torch.float32)
    given_ = normalizers_of(p, q, temperature=0.7, vocab_size=VOCAB)
    log_p = (p[:, :VOCAB].double() / torch.tensor(0.7).double()).log_softmax(-1)
    z = p[:, :VOCAB].double() / torch.tensor(0.7).double()
    own = z - given_[0].top[:, None] - given_[0].log_total[:, None]
    torch.testing.assert_close(own, log_p, rtol=1e-12, atol=1e-12)
    again = computed(p, q, kind, temperature=0.7, normalizers=tuple(given_))
    assert all(map(torch.equal, again, computed(p, q, kind, temperature=0.7)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind 'kl': one of tv, kl_pq, kl_qp, js, l2"),
        ({"sampled": torch.zeros(3, dtype=torch.long)}, "give top_k"),
        ({"top_k": 2, "normalizers": ()}, "leave them out with top_k"),
        ({"top_k": 25}, "k = 25: the vocabulary has 21 ids"),
        ({"top_k": 2, "sampled": torch.tensor([0, 21, 0])}, "id 21 at .* vocabulary of 21 ids"),
        ({"q": torch.zeros((3, 20))}, r"\[3, 24\] and logits_q \[3, 20\] differ"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_does_not_go_together_is_an_error(options: dict, message: str) -> None:
    arguments = {"kind": "tv", "vocab_size": VOCAB, "q": torch.zeros((3, COLUMNS)), **options}
    q, kind = arguments.pop("q"), arguments.pop("kind")
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros((3, COLUMNS)), q, kind, **arguments)


def test_no_rows() -> None:
    p, q = two_logits(torch.float32, rows=0)
    for options in ({}, {"top_k": 3}):
        assert divergence(p, q, "tv", vocab_size=VOCAB, **options).shape == (0,)


# The likeliest ids, the sampled one, and a bucket for the rest.


def likeliest(q: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(VOCAB), key=lambda i: (-float(row[i]), i))[:k] for row in q]  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_sampled", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 20, 21])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_the_oracles(kind: str, top_k: int, with_sampled: bool, dtype) -> None:
    p, q = two_logits(dtype)
    sampled = 8 + torch.arange(ROWS) % 7 if with_sampled else None
    buckets = likeliest(q, top_k)
    if sampled is not None:
        inside = [int(i) in ids for i, ids in zip(sampled, buckets, strict=True)]
        assert any(inside) and (top_k >= 20 or not all(inside))
        buckets = [[*ids, int(i)] for i, ids in zip(sampled, buckets, strict=True)]
    result = computed(p, q, kind, temperature=0.75, top_k=top_k, sampled=sampled)
    expected = oracle(p, q, kind, 0.75, buckets)
    check(result, expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_when_the_rest_has_next_to_no_mass(kind: str) -> None:
    """e^-60 of the mass, in p, in q, or in both: what is left of it still counts in full."""
    p, q = torch.zeros((2, 4, VOCAB))
    p[0, 3] = q[0, 3] = p[1, 3] = q[2, 3] = 60.0
    p[3, 3], q[3, 3] = 40.0, 38.0
    result = computed(p, q, kind, top_k=2)
    ids = [[3, 0], [0, 1], [3, 0], [3, 0]]
    check(result, oracle(p, q, kind, 1.0, ids), torch.float32)


# Properties.

LOGITS = st.lists(
    st.tuples(*[st.floats(-8, 8, width=32) | st.just(-20.0)] * 2), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(pairs=LOGITS, data=st.data())
def test_bounds_symmetry_and_permutations(pairs: list, data: st.DataObject) -> None:
    p, q = torch.tensor(pairs, dtype=torch.float32).T[:, None]
    order = torch.tensor(data.draw(st.permutations(range(len(pairs)))))
    k = data.draw(st.integers(1, len(pairs)))
    upper = {"tv": 1, "js": math.log(2), "l2": 2, "kl_pq": math.inf, "kl_qp": math.inf}
    swapped = {"kl_pq": "kl_qp", "kl_qp": "kl_pq"}
    close: dict[str, float] = {"rtol": 1e-5, "atol": 1e-12}
    values = {kind: divergence(p, q, kind) for kind in KINDS}
    for kind, value in values.items():
        assert 0 <= float(value) <= upper[kind] * (1 + 1e-6)
        torch.testing.assert_close(divergence(p[:, order], q[:, order], kind), value, **close)
        torch.testing.assert_close(divergence(q, p, swapped.get(kind, kind)), value, **close)
        whole = divergence(p, q, kind, top_k=len(pairs))
        torch.testing.assert_close(whole, value, **close)
        if kind != "l2":  # merging ids into a bucket cannot tell p from q any better
            assert float(divergence(p, q, kind, top_k=k)) <= float(value) * (1 + 1e-6) + 1e-12
    assert float(values["tv"]) ** 2 <= float(values["kl_pq"]) / 2 + 1e-7  # Pinsker


# Shards.


class Collectives:
    """Counts what goes through torch.distributed, and the largest message in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.largest = 0
        for name in ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast"):
            monkeypatch.setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            sent = args[1] if name.startswith("all_gather") else args[0]
            self.largest = max(self.largest, sent.numel() * sent.element_size())
            return function(*args, **kwargs)

        return wrapped


def check_sharded_divergences(group: dist.ProcessGroup) -> None:
    """What one rank computes, the same bits on all ranks, by the collectives that are promised."""
    size, width = group.size(), COLUMNS // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    sampled = 8 + torch.arange(ROWS) % 7
    for dtype in TOLERANCE:
        p, q = two_logits(dtype)
        given_ = normalizers_of(
            p[:, columns], q[:, columns], temperature=0.5, vocab_size=VOCAB, group=group
        )
        cases = [
            ({}, 2),
            ({"normalizers": tuple(given_)}, 1),
            ({"top_k": 4}, 2),
            ({"top_k": 4, "sampled": sampled}, 2),
            ({"top_k": VOCAB, "sampled": sampled}, 2),
        ]
        for kind in KINDS:
            for options, messages in cases if dtype == torch.float32 else cases[::3]:
                options = {"temperature": 0.5, **options}
                alone = computed(p, q, kind, **options)
                leaf = p[:, columns].clone().requires_grad_()
                with pytest.MonkeyPatch.context() as patch:
                    counted = Collectives(patch)
                    value = divergence(
                        leaf, q[:, columns], kind, vocab_size=VOCAB, group=group, **options
                    )
                    assert len(counted.names) == messages
                    assert counted.largest <= ROWS * 8 * (20 if "top_k" not in options else 100)
                    (value.double() * upstream(ROWS)).sum().backward()
                    assert len(counted.names) == messages, "a collective in the backward pass"
                assert leaf.grad is not None
                acc = torch.promote_types(dtype, torch.float32)
                torch.testing.assert_close(value.detach(), alone[0], **TOLERANCE[acc])
                torch.testing.assert_close(leaf.grad, alone[1][:, columns], **TOLERANCE[dtype])
                ranks = [torch.empty_like(alone[0]) for _ in range(size)]
                dist.all_gather(ranks, value.detach(), group=group)
                assert all(torch.equal(value, other) for other in ranks)


def check_any_split(group: dist.ProcessGroup) -> None:
    """Random rows and vocabulary sizes; each rank draws the same examples."""

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=_ONCE)
    @given(
        width=st.integers(1, 5),
        missing=st.integers(0, 5),
        seed=st.integers(0, 1 << 30),
        scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    )
    def examples(width: int, missing: int, seed: int, scale: float) -> None:
        total = width * group.size()
        vocab_size = max(total - missing, 1)
        p, q = scale * torch.randn((2, 3, total), generator=torch.Generator().manual_seed(seed))
        columns = slice(group.rank() * width, (group.rank() + 1) * width)
        for kind in KINDS:
            whole = divergence(p, q, kind, vocab_size=vocab_size)
            parts = divergence(
                p[:, columns], q[:, columns], kind, vocab_size=vocab_size, group=group
            )
            torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-13)

    examples()


_ONCE = [Phase.generate]
"""No shrinking: ranks that disagree on a failure would wait for each other."""


def _sharded(rank: int, world_size: int) -> None:
    """Everything at TP 2 (two groups, so group and global ranks differ) and TP 4 at once: starting
    processes is what costs time."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (pairs[rank // 2], dist.group.WORLD):
        assert group is not None
        check_sharded_divergences(group)
        check_any_split(group)
        check_sharded_topk(group)
        check_sharded_draws(group)


@pytest.mark.distributed
def test_shards_equal_one_rank_and_each_other() -> None:
    run_distributed(_sharded, 4)
