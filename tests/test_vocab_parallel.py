"""`logprobs_and_entropy` as its users rely on it: an fp64 oracle, shards, edges, storage, bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_drpo.vocab_parallel import TokenScores, logprobs, logprobs_and_entropy, sweep
from tests.distributed import run_distributed

COLUMNS = 24
"""Columns of all shards together; divisible by every TP size here."""
POISON = 3e4
"""Logit of padding columns: any mass that they receive shows."""
TIGHT = {"rtol": 2e-6, "atol": 2e-6}
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: TIGHT,
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 2e-6},
}
"""Of gradients, by the type of the logits: half a unit in the last place where they are narrow."""


@dataclass(frozen=True, eq=False)
class Case:
    logits: Tensor
    ids: Tensor
    vocab_size: int = COLUMNS
    temperature: float | Tensor = 1.0
    mask: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        return torch.ones(len(self.ids), dtype=torch.bool) if self.mask is None else self.mask

    @property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """Random gradients of (log-probs, entropy), also in rows that the mask skips."""
        generator = torch.Generator().manual_seed(5)
        acc = torch.promote_types(self.logits.dtype, torch.float32)
        g = 3 * torch.randn(self.ids.shape, generator=generator)
        return g.to(acc), 3 * torch.randn(len(self.ids), generator=generator).to(acc)

    def __getitem__(self, rows: Tensor | slice) -> Case:
        t = self.temperature
        return replace(
            self,
            logits=self.logits[rows],
            ids=self.ids[rows],
            temperature=t[rows] if isinstance(t, Tensor) else t,
            mask=None if self.mask is None else self.mask[rows],
        )


def case(name: str) -> Case:
    generator = torch.Generator().manual_seed(11)
    rows = 40
    logits = 4 * torch.randn((rows, COLUMNS), generator=generator)
    ids = torch.arange(rows) % COLUMNS
    match name:
        case "fp32":
            return Case(logits, ids)
        case "fp64":
            return Case(logits.double(), ids)
        case "bf16":
            return Case(logits.bfloat16(), ids)
        case "fp16":
            return Case(logits.half(), ids)
        case "temperature":
            return Case(logits, ids, temperature=0.6)
        case "row-temperature":
            return Case(logits, ids, temperature=0.3 + torch.rand(rows, generator=generator))
        case "padding":  # at TP 4, one shard with a single real id and one without any
            logits[20:] -= 1e4
            logits[:, 13:] = POISON
            # A power of two: dividing 1e4 by any other temperature rounds by 5e-4.
            return Case(logits, ids % 13, vocab_size=13, temperature=2.0)
        case "padding-bf16":
            logits[:, 13:] = POISON
            return Case(logits.bfloat16(), ids % 13, vocab_size=13)
        case "padding-nan":
            logits[:, 23:] = torch.nan
            return Case(logits, ids % 23, vocab_size=23)
        case "several-ids":  # of all shards, some of them twice in a row
            several = torch.randint(COLUMNS, (rows, 5), generator=generator)
            several[::2, 3] = several[::2, 0]
            return Case(logits, several, temperature=1.5)
        case "mask":  # a skipped row may hold anything
            mask = torch.arange(rows) % 3 != 1
            logits[1], logits[4], logits[7] = torch.nan, torch.inf, -torch.inf
            ids[~mask] = torch.tensor([-1, -100, COLUMNS, 1 << 40, 3, 0, 13]).repeat(2)[:13]
            return Case(logits, ids, mask=mask)
        case "mask-several-ids":
            several = torch.randint(13, (rows, 3), generator=generator)
            mask = torch.arange(rows) % 4 != 2
            several[~mask] = 13
            logits[:, 13:] = POISON
            temperature = 0.5 + torch.rand(rows, generator=generator)
            return Case(logits.bfloat16(), several, 13, temperature, mask)
        case "minus-inf":
            logits[torch.rand(logits.shape, generator=generator) < 0.4] = -torch.inf
            logits[:6, :12] = -torch.inf  # whole shards without mass, at TP 2 and TP 4
            logits[6:12, 6:] = -torch.inf
            logits[12] = -torch.inf  # one id holds everything
            # The id of every row has some mass: the log-prob of any other is -inf.
            logits[torch.arange(rows), ids] = 1.5
            return Case(logits, ids)
        case "extreme":
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1
            logits[:20] += 1e4 * signs[:20]
            logits[20:30] += 1e4
            logits[30:] -= 1e4
            return Case(logits, ids)
        case "one-row":
            return Case(logits[:1], ids[5:6])
        case "no-rows":
            return Case(logits[:0], ids[:0])
    raise AssertionError(name)


CASES = (
    *("fp32", "fp64", "bf16", "fp16", "temperature", "row-temperature", "padding", "padding-bf16"),
    *("padding-nan", "several-ids", "mask", "mask-several-ids", "minus-inf", "extreme"),
    *("one-row", "no-rows"),
)


def oracle(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy in fp64 by torch's own softmax; differentiable in fp64 `logits`."""
    kept = case.kept
    logits = logits[:, : case.vocab_size].where(kept[:, None], 0)
    temperature = torch.as_tensor(case.temperature, dtype=torch.float32).double()
    # exp(-1e9) is an exact 0 in fp64, and unlike -inf leaves autograd without 0 * inf.
    z = logits.clamp(min=-1e9) / temperature.expand(len(logits))[:, None]
    law = z.log_softmax(-1)
    entropy = -(law.exp() * law).sum(-1)
    ids = case.ids.where(kept if case.ids.dim() == 1 else kept[:, None], 0)
    picked = law.gather(-1, ids if ids.dim() == 2 else ids[:, None]).where(kept[:, None], 0)
    return picked.view(ids.shape), entropy.where(kept, 0)


def oracle_with_gradient(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    z = case.logits.double().requires_grad_()
    value, entropy = oracle(z, case)
    g, h = case.upstream
    objective = (g.double() * value).sum() + (h.double() * entropy).sum()
    (gradient,) = torch.autograd.grad(objective, z)
    return value.detach(), entropy.detach(), gradient


def scores(shard: Tensor, case: Case, group: dist.ProcessGroup | None = None, **options):
    return logprobs_and_entropy(
        shard,
        case.ids,
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        mask=case.mask,
        group=group,
        **options,
    )


def computed(
    case: Case, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
) -> tuple[TokenScores, Tensor]:
    """Result and gradient of the shard that `rank` of `size` holds."""
    given_shard = case.logits.chunk(size, -1)[rank]
    shard = given_shard.clone().requires_grad_()
    result = scores(shard, case, group)
    (gradient,) = torch.autograd.grad(result, shard, case.upstream)
    assert torch.equal(shard.nan_to_num(), given_shard.nan_to_num()), "the input was changed"
    return result, gradient


def check_against_oracle(case: Case, result: TokenScores, gradient: Tensor, columns: slice) -> None:
    value, entropy, expected = oracle_with_gradient(case)
    acc = torch.promote_types(case.logits.dtype, torch.float32)
    assert result.logprobs.dtype == result.entropy.dtype == acc
    assert result.logprobs.shape == case.ids.shape
    assert gradient.dtype == case.logits.dtype
    torch.testing.assert_close(result.logprobs.double(), value, **TOLERANCE[acc])
    torch.testing.assert_close(result.entropy.double(), entropy, **TOLERANCE[acc])
    limit = TOLERANCE[case.logits.dtype]
    torch.testing.assert_close(gradient.double(), expected[:, columns], **limit)
    real = max(min(case.vocab_size, columns.stop) - columns.start, 0)
    assert not gradient[:, real:].any(), "padding received a gradient"
    assert not gradient[~case.kept].any(), "a skipped row received a gradient"


# One rank.


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_fp64_oracle(name: str) -> None:
    made = case(name)
    check_against_oracle(made, *computed(made), slice(0, COLUMNS))


@pytest.mark.parametrize("name", CASES)
def test_plain_and_fastest_sweep_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(name)
    result, gradient = computed(made)
    monkeypatch.setattr(logprobs, "sweep_for", lambda logits: sweep.PLAIN)
    plain, plain_gradient = computed(made)
    torch.testing.assert_close(result, plain, **TIGHT)
    limit = dict(TOLERANCE[made.logits.dtype])
    limit["rtol"] *= 2  # both round
    torch.testing.assert_close(gradient, plain_gradient, **limit)


def test_gradient_equals_central_differences_of_the_oracle() -> None:
    """Independent of autograd, on both sides."""
    made = case("row-temperature")[:5]
    g, h = (x.double() for x in made.upstream)
    _, gradient = computed(made)
    step = 1e-5
    for column in range(COLUMNS):
        shift = torch.zeros(COLUMNS, dtype=torch.float64)
        shift[column] = step
        (up, up_h), (down, down_h) = (
            oracle(made.logits.double() + sign * shift, made) for sign in (1, -1)
        )
        slope = (g * (up - down) + h * (up_h - down_h)) / (2 * step)
        torch.testing.assert_close(gradient[:, column].double(), slope, rtol=1e-5, atol=4e-6)


def test_a_realistic_vocabulary() -> None:
    generator = torch.Generator().manual_seed(3)
    columns, vocab_size = 152064, 151936
    logits = 5 * torch.randn((3, columns), generator=generator)
    logits[:, vocab_size:] = POISON
    made = Case(logits, torch.tensor([0, 75000, vocab_size - 1]), vocab_size)
    check_against_oracle(made, *computed(made), slice(0, columns))


@pytest.mark.parametrize("bad", [-1, 13, COLUMNS, 1 << 40])
@pytest.mark.parametrize("several", [False, True])
def test_id_outside_the_vocabulary_is_an_error(bad: int, several: bool) -> None:
    made = case("padding")
    ids = made.ids[:, None].repeat(1, 2) if several else made.ids.clone()
    ids[(5, 1) if several else 5] = bad
    place = r"\[5, 1\]" if several else r"\[5\]"
    with pytest.raises(ValueError, match=rf"id {bad} at {place}: .* vocabulary of 13 ids"):
        scores(made.logits, replace(made, ids=ids))


@pytest.mark.parametrize("size", [0, -3, COLUMNS + 1])
def test_vocabulary_that_the_columns_cannot_hold_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size {size}: 1 rank\(s\) hold {COLUMNS} columns"):
        scores(case("fp32").logits, replace(case("fp32"), vocab_size=size))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        scores(case("fp32").logits, replace(case("fp32"), temperature=temperature))


def test_id_without_mass_has_log_prob_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    result = logprobs_and_entropy(logits, torch.tensor([[1, 0]]))
    assert result.logprobs[0, 0].item() == -torch.inf
    assert result.logprobs[0, 1].item() == pytest.approx(-0.6931472)
    assert result.entropy.item() == pytest.approx(0.6931472)
    (gradient,) = torch.autograd.grad(result.entropy, logits)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_show_and_stay_in_their_row(bad: float) -> None:
    made = case("fp32")
    made.logits[3, 7] = bad
    result, gradient = computed(made)
    others = torch.arange(40) != 3
    for x in (result.logprobs, result.entropy, gradient):
        assert x[3].isnan().all() and x[others].isfinite().all()


def test_entropy_gradient_is_finite_for_large_upstream_and_rows_with_minus_inf() -> None:
    made = case("minus-inf")
    logits = made.logits.clone().requires_grad_()
    entropy = scores(logits, made).entropy
    (gradient,) = torch.autograd.grad(entropy, logits, torch.full_like(entropy, 1e6))
    assert gradient.isfinite().all() and not gradient[made.logits == -torch.inf].any()


@pytest.mark.parametrize("name", ["padding", "several-ids", "mask"])
def test_gradient_of_one_output_alone(name: str) -> None:
    made = case(name)
    logits = made.logits.clone().requires_grad_()
    result = scores(logits, made)
    z = made.logits.double().requires_grad_()
    for ours, theirs in zip(result, oracle(z, made), strict=True):
        (gradient,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs.sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, **TIGHT)


# Storage.


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16", "mask", "several-ids"])
def test_gradient_may_take_the_storage_of_the_logits(name: str) -> None:
    made = case(name)
    _, expected = computed(made)
    leaf = made.logits.clone().requires_grad_()
    logits = leaf.view(leaf.shape)  # as the output layer hands them over
    given_gradients = []
    logits.register_hook(given_gradients.append)
    result = scores(logits, made, overwrite_logits=True)
    assert torch.equal(leaf.nan_to_num(), made.logits.nan_to_num()), "changed before backward"
    torch.autograd.backward(result, made.upstream, retain_graph=True)
    (gradient,) = given_gradients
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="overwrite_logits"):
        torch.autograd.backward(result, made.upstream)


def test_without_permission_the_logits_survive_two_backward_passes() -> None:
    made = case("bf16")
    logits = made.logits.clone().requires_grad_()
    result = scores(logits, made)
    gradients = [
        torch.autograd.grad(result, logits, made.upstream, retain_graph=True)[0] for _ in range(2)
    ]
    assert torch.equal(*gradients) and torch.equal(logits, made.logits)


def test_another_user_of_overwritten_logits_is_told() -> None:
    """Autograd sees the write, though a library may have done it through a pointer."""
    made = case("fp32")
    leaf = made.logits.clone().requires_grad_()
    logits = leaf * 1.0
    squares = logits.square().sum()
    result = scores(logits, made, overwrite_logits=True)
    torch.autograd.backward(result, made.upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout", ["every second column", "transposed", "shared", "cut"])
def test_logits_of_any_layout(name: str, overwrite: bool, layout: str) -> None:
    made = case(name)
    logits = made.logits.clone()
    match layout:
        case "every second column":
            logits = torch.stack([logits, logits.flip(0)], -1)[..., 0]
        case "transposed":
            logits = logits.T.contiguous().T
        case "shared":
            made = replace(made, logits=made.logits[:1].expand(40, -1))
            logits = logits[:1].expand(40, -1)
        case "cut":
            logits = torch.cat([logits[:, :1], logits, logits[:, :2]], -1)[:, 1:-2]
    assert not logits.is_contiguous()
    expected, expected_gradient = computed(replace(made, logits=made.logits.contiguous()))
    logits = logits.detach().requires_grad_()
    result = scores(logits, made, overwrite_logits=overwrite)
    (gradient,) = torch.autograd.grad(result, logits, made.upstream)
    assert torch.equal(result.logprobs, expected.logprobs)
    assert torch.equal(result.entropy, expected.entropy)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["fp32", "bf16", "several-ids", "mask"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_of_the_logits_size_is_saved_or_made(name: str, overwrite: bool) -> None:
    """Besides the logits, and the gradient where it may not take their place."""
    made = case(name)
    leaf = made.logits.repeat(1, 50).requires_grad_()
    logits = leaf.view(leaf.shape)
    made = replace(made, vocab_size=leaf.size(1))
    saved: list[Tensor] = []
    with (
        _Made() as made_tensors,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        result = scores(logits, made, overwrite_logits=overwrite)
        torch.autograd.backward(result, made.upstream)
    large = [x for x in saved if x.nbytes > leaf.nbytes // 10]
    assert {x.data_ptr() for x in large} == {logits.data_ptr()}
    if sweep.sweep_for(leaf) is not sweep.PLAIN:
        assert made_tensors.largest(logits) == (0 if overwrite else leaf.nbytes)


class _Made(TorchDispatchMode):
    """Storages that operations return, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.sizes[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result

    def largest(self, other_than: Tensor) -> int:
        """Bytes, of those of at least a tenth of `other_than`; 0 where there are none."""
        whole = other_than.untyped_storage()
        sizes = [n for at, n in self.sizes.items() if at != whole.data_ptr()]
        return max((n for n in sizes if n > whole.nbytes() // 10), default=0)


# Equal bits.


@given(order=st.permutations(range(40)), count=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", ["row-temperature", "padding-bf16", "mask-several-ids"])
def test_a_row_has_the_same_bits_anywhere(name: str, order: list[int], count: int) -> None:
    """Generation scores a few rows and training many: the first ratio is 1 only if bits agree."""
    made = case(name)
    whole = scores(made.logits, made)
    rows = torch.tensor(order[:count])
    part = scores(made[rows].logits, made[rows])
    assert torch.equal(part.logprobs, whole.logprobs[rows])
    assert torch.equal(part.entropy, whole.entropy[rows])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_merging_ranks_gives_a_row_the_same_bits_anywhere(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "gather_ranks", lambda value, group: value)
    partials = torch.rand((ranks, 4, 67), generator=torch.Generator().manual_seed(2)) + 0.5
    partials[:, 2] *= -1
    whole = logprobs.merge(partials, None, None)
    for count in (1, 2, 7, 16, 33, 66):
        part = logprobs.merge(partials[..., :count].contiguous(), None, None)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[:count])


# Several ranks.


class Collectives(TorchDispatchMode):
    """Names and bytes of what is sent, whichever function of torch.distributed sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.sent.append((func.name(), sum(x.nbytes for x in _tensors(args[1]))))
        return func(*args, **(kwargs or {}))


def _tensors(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in x for y in _tensors(part)] if isinstance(x, list | tuple) else []


def _check_case(name: str, group: dist.ProcessGroup) -> None:
    size, here = group.size(), group.rank()
    width = COLUMNS // size
    columns = slice(here * width, (here + 1) * width)
    made = case(name)
    result, gradient = computed(made, here, size, group)
    check_against_oracle(made, result, gradient, columns)
    alone, alone_gradient = computed(made)
    torch.testing.assert_close(result, alone, **TIGHT)
    limit = dict(TOLERANCE[made.logits.dtype])
    limit["rtol"] *= 2
    torch.testing.assert_close(gradient, alone_gradient[:, columns], **limit)
    own = torch.cat([x.double().flatten() for x in result])
    ranks = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(ranks, own, group=group)
    assert all(torch.equal(own, other) for other in ranks), f"{name}: ranks differ"


def _check_traffic(name: str, group: dist.ProcessGroup) -> None:
    """One message of 3 + K numbers per token forward, none backward, with and without storage."""
    made = case(name)
    shard = made.logits.chunk(group.size(), -1)[group.rank()].clone()
    for overwrite in (False, True):
        leaf = shard.clone().requires_grad_()
        with Collectives() as forward:
            result = scores(leaf.view(leaf.shape), made, group, overwrite_logits=overwrite)
        numbers = len(made.ids) * (3 + made.ids[:1].numel())
        assert [n for _, n in forward.sent] == [numbers * 4], forward.sent
        assert forward.sent[0][0].startswith("c10d::allgather")
        with Collectives() as backward:
            torch.autograd.backward(result, made.upstream)
        assert not backward.sent


def _check_bits_of_rows(group: dist.ProcessGroup) -> None:
    made = case("mask-several-ids")
    shard = made.logits.chunk(group.size(), -1)[group.rank()]
    whole = scores(shard, made, group)
    for rows in (slice(0, 1), slice(3, 4), slice(7, 20)):
        part = scores(shard[rows], made[rows], group)
        assert torch.equal(part.logprobs, whole.logprobs[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def _check_any_split(group: dist.ProcessGroup) -> None:
    """Random shapes; every rank draws the same examples, and none is retried on one rank only."""

    @settings(
        max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
    )
    @given(
        width=st.integers(1, 9),
        missing=st.integers(0, 12),
        num_ids=st.integers(1, 3),
        seed=st.integers(0, 1 << 30),
        spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    )
    def examples(width: int, missing: int, num_ids: int, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = width * group.size()
        vocab_size = max(total - missing, 1)
        logits = spread * torch.randn((3, total), generator=generator)
        logits[:, vocab_size:] = POISON
        ids = torch.randint(vocab_size, (3, num_ids), generator=generator)
        made = Case(logits, ids, vocab_size, 0.5 + torch.rand(3, generator=generator))
        columns = slice(group.rank() * width, (group.rank() + 1) * width)
        result, gradient = computed(made, group.rank(), group.size(), group)
        whole, whole_gradient = computed(made)
        for ours, theirs in zip(result, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(gradient, whole_gradient[:, columns], rtol=1e-5, atol=2e-5)

    examples()


def _sharded(rank: int, world_size: int) -> None:
    """All cases at TP 2 (two groups, so group and global ranks differ) and TP 4, and the sampler's
    with them: starting processes is what costs time."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (pairs[rank // 2], dist.group.WORLD):
        for name in CASES:
            _check_case(name, group)
        for name in ("fp32", "bf16", "several-ids", "mask", "padding"):
            _check_traffic(name, group)
        _check_bits_of_rows(group)
        _check_any_split(group)
        made = case("padding")
        with pytest.raises(ValueError, match="id 13 at"):
            ids = made.ids.clone().index_fill_(0, torch.tensor([9]), 13)
            scores(made.logits.chunk(group.size(), -1)[group.rank()], replace(made, ids=ids), group)


@pytest.mark.distributed
def test_shards_equal_one_rank_and_each_other() -> None:
    run_distributed(_sharded, 4)
