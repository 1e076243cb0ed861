"""Vocab-parallel log-probs and entropy against an fp64 oracle: value, gradient, shards, edges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.vocab_parallel import TokenLogprobs, logprobs, vocab_parallel_logprobs
from tests.distributed import run_distributed
from tests.test_sampling import check_sharded_draws

COLUMNS = 24
"""Columns of all shards together; divisible by every TP size here."""
POISON = 3e4
"""Logit of padding columns: any mass that they receive shows."""
TIGHT = {"rtol": 2e-6, "atol": 2e-6}
BF16 = {"rtol": 2**-8, "atol": 2e-6}


@dataclass(frozen=True, eq=False)
class Case:
    logits: Tensor
    targets: Tensor
    vocab_size: int = COLUMNS
    temperature: float = 1.0

    @property
    def valid(self) -> Tensor:
        return (self.targets >= 0) & (self.targets < self.vocab_size)

    @property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """Random gradients of (log-prob, entropy), 0 where there is no log-prob."""
        generator = torch.Generator().manual_seed(5)
        g, h = 3 * torch.randn((2, len(self.targets)), generator=generator)
        return g.where(self.valid, 0), h


def case(name: str) -> Case:
    generator = torch.Generator().manual_seed(11)
    rows = 40
    logits = 4 * torch.randn((rows, COLUMNS), generator=generator)
    targets = torch.arange(rows) % COLUMNS
    match name:
        case "fp32":
            return Case(logits, targets)
        case "bf16":
            return Case(logits.bfloat16(), targets)
        case "temperature":
            return Case(logits, targets, temperature=0.6)
        case "padding":  # at TP 4, one shard with a single real id and one without any
            logits[20:] -= 1e4
            logits[:, 13:] = POISON
            # A power of two: dividing 1e4 by any other temperature rounds by 5e-4.
            return Case(logits, targets % 13, vocab_size=13, temperature=2.0)
        case "padding-bf16":
            logits[:, 13:] = POISON
            return Case(logits.bfloat16(), targets % 13, vocab_size=13)
        case "targets-out-of-range":
            logits[:, 13:] = POISON
            targets %= 13
            targets[1:6] = torch.tensor([-1, -100, 13, COLUMNS, 1 << 40])
            return Case(logits, targets, vocab_size=13)
        case "minus-inf":
            logits[torch.rand(logits.shape, generator=generator) < 0.4] = -torch.inf
            logits[:6, :12] = -torch.inf  # whole shards without mass, at TP 2 and TP 4
            logits[6:12, 6:] = -torch.inf
            logits[12] = -torch.inf  # one id holds everything
            # The target of every row has some mass: the log-prob of any other is -inf.
            logits[torch.arange(rows), targets] = 1.5
            return Case(logits, targets)
        case "extreme":
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1
            logits[:20] += 1e4 * signs[:20]
            logits[20:30] += 1e4
            logits[30:] -= 1e4
            return Case(logits, targets)
        case "one-row":
            return Case(logits[:1], targets[5:6])
        case "no-rows":
            return Case(logits[:0], targets[:0])
    raise AssertionError(name)


CASES = (
    *("fp32", "bf16", "temperature", "padding", "padding-bf16", "targets-out-of-range"),
    *("minus-inf", "extreme", "one-row", "no-rows"),
)


def oracle(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy in fp64 by torch's own softmax; differentiable in fp64 `logits`."""
    # exp(-1e9) is an exact 0 in fp64, and unlike -inf leaves autograd without 0 * inf.
    z = logits[:, : case.vocab_size].clamp(min=-1e9) / case.temperature
    law = z.log_softmax(-1)
    entropy = -(law.exp() * law).sum(-1)
    picked = law.gather(-1, case.targets.where(case.valid, 0)[:, None])[:, 0]
    return picked.where(case.valid, torch.nan), entropy


def oracle_with_gradient(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    z = case.logits.double().requires_grad_()
    value, entropy = oracle(z, case)
    g, h = case.upstream
    objective = (g.double() * value.where(case.valid, 0)).sum() + (h.double() * entropy).sum()
    (gradient,) = torch.autograd.grad(objective, z)
    return value.detach(), entropy.detach(), gradient


def computed(
    case: Case, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None
) -> tuple[TokenLogprobs, Tensor]:
    """Result and gradient of the shard that `rank` of `size` holds."""
    shard = case.logits.chunk(size, -1)[rank].clone().requires_grad_()
    result = vocab_parallel_logprobs(
        shard,
        case.targets,
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        group=group,
    )
    (gradient,) = torch.autograd.grad(result, shard, case.upstream)
    assert torch.equal(shard, case.logits.chunk(size, -1)[rank]), "the input was changed"
    return result, gradient


def check_against_oracle(case: Case, result: TokenLogprobs, gradient: Tensor, columns: slice):
    value, entropy, expected = oracle_with_gradient(case)
    assert result.logprobs.dtype == result.entropy.dtype == torch.float32
    assert gradient.dtype == case.logits.dtype
    torch.testing.assert_close(result.logprobs.double(), value, equal_nan=True, **TIGHT)
    torch.testing.assert_close(result.entropy.double(), entropy, **TIGHT)
    limit = BF16 if case.logits.dtype == torch.bfloat16 else TIGHT
    torch.testing.assert_close(gradient.double(), expected[:, columns], **limit)
    real = max(min(case.vocab_size, columns.stop) - columns.start, 0)
    assert not gradient[:, real:].any(), "padding received a gradient"


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_fp64_oracle(name: str) -> None:
    made = case(name)
    check_against_oracle(made, *computed(made), slice(0, COLUMNS))


def test_gradient_equals_central_differences_of_the_oracle() -> None:
    """Independent of autograd, on both sides."""
    base = case("temperature")
    made = Case(base.logits[:5], base.targets[:5], temperature=base.temperature)
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
        torch.testing.assert_close(gradient[:, column].double(), slope, rtol=1e-5, atol=2e-6)


def test_targets_outside_the_vocabulary_give_nan_and_no_others() -> None:
    made = case("targets-out-of-range")
    result, gradient = computed(made)
    assert result.logprobs.isnan().sum() == 5 and torch.equal(result.logprobs.isnan(), ~made.valid)
    assert result.entropy.isfinite().all() and gradient.isfinite().all()


def test_target_without_mass_has_log_prob_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    result = vocab_parallel_logprobs(logits, torch.tensor([1]), vocab_size=3)
    assert result.logprobs.item() == -torch.inf
    assert result.entropy.item() == pytest.approx(0.6931472)


def test_entropy_gradient_is_finite_for_large_upstream_and_rows_with_minus_inf() -> None:
    made = case("minus-inf")
    logits = made.logits.clone().requires_grad_()
    entropy = vocab_parallel_logprobs(logits, made.targets, vocab_size=COLUMNS).entropy
    (gradient,) = torch.autograd.grad(entropy, logits, torch.full_like(entropy, 1e6))
    assert gradient.isfinite().all() and not gradient[made.logits == -torch.inf].any()


def test_gradient_of_one_output_alone() -> None:
    made = case("padding")
    logits = made.logits.clone().requires_grad_()
    result = vocab_parallel_logprobs(
        logits, made.targets, temperature=made.temperature, vocab_size=made.vocab_size
    )
    z = made.logits.double().requires_grad_()
    for ours, theirs in zip(result, oracle(z, made), strict=True):
        (gradient,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs.sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, **TIGHT)


@pytest.mark.parametrize("rows_per_chunk", [0.5, 1, 3, 39, 40])
def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, rows_per_chunk: float) -> None:
    for name in ("fp32", "padding-bf16"):
        made = case(name)
        whole, whole_gradient = computed(made)
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", int(rows_per_chunk * COLUMNS))
        parts, parts_gradient = computed(made)
        monkeypatch.undo()
        assert torch.equal(whole.logprobs, parts.logprobs)
        assert torch.equal(whole.entropy, parts.entropy)
        assert torch.equal(whole_gradient, parts_gradient)


def test_logits_that_are_not_contiguous() -> None:
    made = case("fp32")
    wide = torch.stack([made.logits, made.logits.flip(0)], -1)[..., 0]
    assert not wide.is_contiguous()
    expected, _ = computed(made)
    result = vocab_parallel_logprobs(wide, made.targets, vocab_size=COLUMNS)
    assert torch.equal(result.logprobs, expected.logprobs)


def _sharded(rank: int, world_size: int) -> None:
    """All cases at TP 2 (two groups, so group and global ranks differ) and TP 4, and the sampler's
    with them: starting processes is what costs time."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (pairs[rank // 2], dist.group.WORLD):
        size, here = group.size(), group.rank()
        width = COLUMNS // size
        columns = slice(here * width, (here + 1) * width)
        for name in CASES:
            made = case(name)
            result, gradient = computed(made, here, size, group)
            check_against_oracle(made, result, gradient, columns)
            alone, alone_gradient = computed(made)
            torch.testing.assert_close(result.logprobs, alone.logprobs, equal_nan=True, **TIGHT)
            torch.testing.assert_close(result.entropy, alone.entropy, **TIGHT)
            limit = BF16 if made.logits.dtype == torch.bfloat16 else TIGHT
            torch.testing.assert_close(gradient, alone_gradient[:, columns], **limit)
            bits = torch.stack(result).contiguous().view(torch.int32)
            ranks = [torch.empty_like(bits) for _ in range(size)]
            dist.all_gather(ranks, bits, group=group)
            assert all(torch.equal(bits, other) for other in ranks), f"{name}: ranks differ"
        check_sharded_draws(group)


@pytest.mark.distributed
def test_shards_equal_one_rank_and_each_other() -> None:
    run_distributed(_sharded, 4)
