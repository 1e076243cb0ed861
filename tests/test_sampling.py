"""The sampler: its randomness, the law it draws from, and the log-probs it reports."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.types import KeptIds
from megatron_drpo.vocab_parallel import (
    counter_uniforms,
    linear_scores,
    project,
    sample,
    sampling,
)

COLUMNS, VOCAB = 24, 21
POISON = 3e4
"""Logit of padding columns: it would win every draw."""
LAWS = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "top-k-top-p": {"temperature": 0.8, "top_k": 8, "top_p": 0.7},
    "top-k-beyond-vocabulary": {"temperature": 1.0, "top_k": 1000},
    "greedy": {"temperature": 0.0},
}
DRAWN = [name for name in LAWS if name != "greedy"]


def some_logits(rows: int, seed: int = 2) -> Tensor:
    logits = 2 * torch.randn((rows, COLUMNS), generator=torch.Generator().manual_seed(seed))
    logits[:, VOCAB:] = POISON
    return logits


def lists(kept: KeptIds | None) -> list[list[int]]:
    """The ids kept of each token."""
    assert kept is not None and kept.ids.dtype == torch.int32
    return [part.tolist() for part in kept.ids.split(kept.counts.tolist())]


def uniforms_of(rows: int, seed: int = 9) -> Tensor:
    return counter_uniforms(seed, torch.arange(rows), torch.zeros(rows, dtype=torch.long))


def law(row: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """Probability of each id, in fp64 by loops: temperature, top-k, top-p, renormalise."""
    if temperature == 0:
        best = max(range(VOCAB), key=lambda i: (float(row[i]), -i))
        return [float(i == best) for i in range(VOCAB)]
    z = [float(x) / temperature for x in row[:VOCAB]]
    mass = [math.exp(x - max(z)) for x in z]
    kept = sorted(range(VOCAB), key=lambda i: (-z[i], i))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        total, so_far, nucleus = sum(mass[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            so_far += mass[i] / total
            if so_far >= top_p:
                break
        kept = nucleus
    total = sum(mass[i] for i in kept)
    return [mass[i] / total if i in kept else 0.0 for i in range(VOCAB)]


def laws(logits: Tensor, options: dict) -> Tensor:
    """fp64 [rows, VOCAB]."""
    return torch.tensor([law(row, **options) for row in logits], dtype=torch.float64)


def below_limit(chi_square: float, freedom: int) -> bool:
    """Five standard deviations above the mean, at fixed seeds."""
    return chi_square < freedom + 5 * math.sqrt(2 * freedom)


# Random numbers.


def grid(seed: int, streams: int, positions: int) -> Tensor:
    """[streams, positions]"""
    stream, position = torch.meshgrid(torch.arange(streams), torch.arange(positions), indexing="ij")
    return counter_uniforms(seed, stream.flatten(), position.flatten()).view(streams, positions)


def test_mixing_is_splitmix64() -> None:
    """First outputs for the states 0 and 1234567, as published with the generator."""
    mixed = sampling._splitmix64(torch.tensor([0, 1234567]))
    assert [int(x) % 2**64 for x in mixed] == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_uniform_depends_on_seed_stream_and_position_alone() -> None:
    u = grid(7, 50, 40)
    pick = torch.tensor([3, 49, 0, 3])
    again = counter_uniforms(7, pick, torch.tensor([5, 39, 0, 5]))
    assert u.dtype == torch.float64 and torch.equal(again, u[pick, [5, 39, 0, 5]])
    assert not torch.equal(grid(8, 50, 40), u)
    assert grid(7, 300, 300).unique().numel() == 90_000


def test_uniforms_are_uniform() -> None:
    """Seeds as the trainer makes them: the run's, plus the step in the high bits."""
    for seed in (0, 1234, 1234 + (57 << 32)):
        u = grid(seed, 400, 250).flatten()
        n = u.numel()
        counts = torch.histc(u, 256, 0, 1)
        assert below_limit(float(((counts - n / 256).square() / (n / 256)).sum()), 255)
        steps = torch.arange(1, n + 1, dtype=torch.float64) / n
        kolmogorov_smirnov = (u.sort().values - steps).abs().max() * math.sqrt(n)
        assert kolmogorov_smirnov < 1.95  # exceeded by chance once in 1,000


@pytest.mark.parametrize("between", ["streams", "positions", "seeds", "steps"])
def test_neighbours_are_independent(between: str) -> None:
    u = grid(1234, 400, 250)
    a, b = {
        "streams": (u[1:], u[:-1]),
        "positions": (u[:, 1:], u[:, :-1]),
        "seeds": (u, grid(1235, 400, 250)),
        "steps": (u, grid(1234 + (1 << 32), 400, 250)),
    }[between]
    a, b = a.flatten(), b.flatten()
    n = a.numel()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)
    cells = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256)
    assert below_limit(float(((cells - n / 256).square() / (n / 256)).sum()), 255)


@pytest.mark.parametrize("bits", [0, -1])
def test_uniforms_exclude_zero_and_one(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(sampling, "_splitmix64", lambda x: torch.full_like(x, bits))
    (u,) = counter_uniforms(0, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert 0 < u < 1


# Draws.


@pytest.mark.parametrize("name", DRAWN)
def test_frequencies_follow_the_law(name: str) -> None:
    check_frequencies(name, None)


def check_frequencies(name: str, group: dist.ProcessGroup | None) -> None:
    """Chi-square of 20,000 draws, on each rank of `group`."""
    options, draws = LAWS[name], 20_000
    logits = some_logits(1)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    shard = logits.chunk(size, -1)[rank].expand(draws, -1)
    ids, _, _ = sample(shard, uniforms_of(draws), vocab_size=VOCAB, group=group, **options)
    expected = laws(logits, options)[0] * draws
    counts = torch.bincount(ids, minlength=VOCAB)
    assert len(counts) == VOCAB and not counts[expected == 0].any()
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]).square() / expected[kept]).sum()
    assert below_limit(float(chi_square), int(kept.sum()) - 1)


@pytest.mark.parametrize("name", LAWS)
def test_each_draw_inverts_the_cdf_and_reports_its_log_prob(name: str) -> None:
    """Row by row, for rows that all differ: the id whose share of [0, 1] holds the uniform."""
    options, rows = LAWS[name], 600
    logits, u = some_logits(rows), uniforms_of(rows)
    before = logits.clone()
    ids, logprobs, kept = sample(logits, u, vocab_size=VOCAB, **options)
    assert torch.equal(logits, before), "the input was changed"
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    expected = laws(logits, options)
    edges = expected.cumsum(-1)
    on_an_edge = ((edges - u[:, None]).abs() < 1e-6).any(-1)
    assert on_an_edge.sum() <= 2
    held = torch.searchsorted(edges, u[:, None], right=True)[:, 0]
    assert torch.equal(ids[~on_an_edge], held[~on_an_edge])
    drawn = expected.gather(-1, ids[:, None])[:, 0].log()
    torch.testing.assert_close(logprobs.double(), drawn, rtol=2e-6, atol=2e-6)
    if not {"top_p", "top_k"} & options.keys():
        assert kept is None
        return
    for row, ids_kept in zip(expected, lists(kept), strict=True):
        by_mass = sorted(row.nonzero()[:, 0].tolist(), key=lambda i, row=row: (-float(row[i]), i))
        assert ids_kept == (by_mass if len(by_mass) < VOCAB else [])


@pytest.mark.parametrize(("candidates", "growth"), [(1, 2), (3, 2), (20, 64)])
def test_growing_the_candidates_changes_nothing(monkeypatch, candidates: int, growth: int) -> None:
    """Rows of one to all ids in the nucleus, so that some need more candidates and some do not."""
    logits, u = some_logits(200), uniforms_of(200)
    logits[:, :VOCAB] *= torch.logspace(-2, 1, 200)[:, None]
    logits[7], logits[8, 3:VOCAB] = 1.0, -torch.inf
    options = {"temperature": 0.9, "top_p": 0.85, "vocab_size": VOCAB}
    whole = sample(logits, u, **options)
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)
    monkeypatch.setattr(sampling, "_GROWTH", growth)
    assert whole.kept is not None
    assert whole.kept.counts.min() == 1 and whole.kept.counts.max() > 15
    again = sample(logits, u, **options)
    assert torch.equal(again.ids, whole.ids) and torch.equal(again.logprobs, whole.logprobs)
    assert lists(again.kept) == lists(whole.kept)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_large_vocabulary(scale: float) -> None:
    """More ids than the first candidates; the nucleus as sorting and adding up in fp64 gives it."""
    logits = scale * torch.randn((20, 6000), generator=torch.Generator().manual_seed(3))
    drawn = sample(logits, uniforms_of(20), temperature=1.0, top_p=0.9, vocab_size=6000)
    p, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    sizes = (p.cumsum(-1) < 0.9 - 1e-12).sum(-1) + 1
    for row, kept in enumerate(lists(drawn.kept)):
        n = int(sizes[row])
        assert kept == order[row, :n].tolist()
        place = int((order[row] == drawn.ids[row]).nonzero())
        expected = (p[row, place] / p[row, :n].sum()).log()
        torch.testing.assert_close(drawn.logprobs[row].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_law_is_an_error(options: dict, value: float) -> None:
    logits = some_logits(4)
    logits[2, slice(VOCAB) if value < 0 else 6] = value
    with pytest.raises(ValueError, match="row 2: nothing to draw from"):
        sample(logits, uniforms_of(4), vocab_size=VOCAB, **{"temperature": 1.0, **options})


@pytest.mark.parametrize("name", DRAWN)
def test_log_prob_is_the_trainers_to_the_bit(name: str) -> None:
    """The trainer computes logits a chunk of rows at a time."""
    options, generator = LAWS[name], torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 8, generator=generator)
    weight = 2 * torch.randn(COLUMNS, 8, generator=generator)
    logits = project(hidden, weight)
    ids, logprobs, kept = sample(logits, uniforms_of(64), vocab_size=VOCAB, **options)
    scored = linear_scores(
        hidden,
        weight,
        ids,
        temperature=options["temperature"],
        vocab_size=VOCAB,
        kept=kept,
        chunk_bytes=4 * COLUMNS * 9,
    )
    assert torch.equal(logprobs, scored.logprobs)


def test_greedy_takes_the_likeliest_and_of_equals_the_smaller_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0, 9.0]])
    ids, logprobs, _ = sample(
        logits, torch.tensor([0.9, 0.9]).double(), temperature=0, vocab_size=4
    )
    assert ids.tolist() == [1, 0] and logprobs.tolist() == [0, 0]


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.75}])
def test_of_equals_the_smaller_ids_are_kept(options: dict) -> None:
    """Five equal ids (0 has less): each of the options keeps 1, 2 and 3."""
    logits = torch.tensor([[-1e9, 1.5, 1.5, 1.5, 1.5, 1.5]]).expand(300, -1)
    u = torch.linspace(0.001, 0.999, 300).double()
    ids, logprobs, _ = sample(logits, u, temperature=1.0, vocab_size=6, **options)
    assert torch.bincount(ids, minlength=6).tolist() == [0, 100, 100, 100, 0, 0]
    torch.testing.assert_close(logprobs, torch.full((300,), -math.log(3)))


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.999999}])
@pytest.mark.parametrize("u", [2.0**-1074, 2.0**-53, 1 - 2.0**-53])
def test_extreme_uniforms_stay_on_ids_with_mass(options: dict, u: float) -> None:
    logits = some_logits(50)
    logits[:, :3] = logits[:, VOCAB - 2 : VOCAB] = -torch.inf
    ids, logprobs, _ = sample(
        logits,
        torch.full((50,), u, dtype=torch.float64),
        temperature=1.0,
        vocab_size=VOCAB,
        **options,
    )
    assert logprobs.isfinite().all()
    if not options:
        assert (ids == (3 if u < 0.5 else VOCAB - 3)).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.5}])
@pytest.mark.parametrize("place", [0, 10, VOCAB - 1])
def test_one_hot_law_has_one_outcome(options: dict, place: int) -> None:
    logits = torch.zeros((100, COLUMNS))
    logits[:, place] = 1e4
    ids, logprobs, _ = sample(
        logits, uniforms_of(100), temperature=1.0, vocab_size=VOCAB, **options
    )
    assert (ids == place).all() and (logprobs == 0).all()


def test_bf16_logits() -> None:
    logits = some_logits(400).bfloat16()
    for options in LAWS.values():
        ids, logprobs, _ = sample(logits, uniforms_of(400), vocab_size=VOCAB, **options)
        drawn = laws(logits, options).gather(-1, ids[:, None])[:, 0].log()
        torch.testing.assert_close(logprobs.double(), drawn, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", LAWS)
def test_no_rows(name: str) -> None:
    drawn = sample(some_logits(0), uniforms_of(0), vocab_size=VOCAB, **LAWS[name])
    assert drawn.ids.shape == drawn.logprobs.shape == (0,)


def check_sharded_draws(group: dist.ProcessGroup) -> None:
    """On each rank of `group`: what one rank draws, with the same log-prob bits on all ranks.

    Called by test_divergence, which has the processes.
    """
    size, rows = group.size(), 400
    logits, u = some_logits(rows), uniforms_of(rows)
    logits[:20, :12] = -torch.inf  # shards without mass
    logits[20:40, 6:VOCAB] = -torch.inf
    u[::7], u[1::7] = 2.0**-53, 1 - 2.0**-53
    shard = logits.chunk(size, -1)[group.rank()].contiguous()
    for name, options in LAWS.items():
        with pytest.MonkeyPatch.context() as patch:
            if size > 1:  # so few that rows differ in how often they ask for more
                patch.setattr(sampling, "_CANDIDATES", 1)
                patch.setattr(sampling, "_GROWTH", 2)
            ids, logprobs, kept = sample(shard, u, vocab_size=VOCAB, group=group, **options)
        alone, alone_logprobs, alone_kept = sample(logits, u, vocab_size=VOCAB, **options)
        assert torch.equal(ids, alone), f"{name}, TP {size}"
        assert kept is alone_kept or lists(kept) == lists(alone_kept), f"{name}, TP {size}"
        torch.testing.assert_close(logprobs, alone_logprobs, rtol=2e-6, atol=2e-6)
        bits = torch.stack([ids, logprobs.view(torch.int32).long()])
        ranks = [torch.empty_like(bits) for _ in range(size)]
        dist.all_gather(ranks, bits, group=group)
        assert all(torch.equal(bits, other) for other in ranks), f"{name}: ranks differ"
        if size == 2 and name in DRAWN:
            check_frequencies(name, group)
