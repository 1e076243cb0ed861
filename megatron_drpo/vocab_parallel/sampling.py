"""Sampling from vocab-parallel logits: the same token on every rank, and at every TP size.

Randomness is a counter, not a state: the uniform of a token depends on (seed, stream, position)
alone, so neither batching, nor the layout, nor a resume changes what is drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_drpo.types import KeptIds
from megatron_drpo.vocab_parallel.kept import keep_only, kept_from_padded
from megatron_drpo.vocab_parallel.logprobs import logprobs_and_entropy
from megatron_drpo.vocab_parallel.shard import Shard, add_ranks, gather_ranks, shard_of
from megatron_drpo.vocab_parallel.topk import candidates

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

_CANDIDATES, _GROWTH = 64, 64
"""Ids per rank that the search for a nucleus starts with, and the factor when it needs more."""
_CHUNK_ELEMENTS = 1 << 20
"""Logits that are held in fp64 at a time."""


def _splitmix64(x: Tensor) -> Tensor:
    """Steele et al. 2014's finaliser on int64, whose arithmetic wraps as uint64's does."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def counter_uniforms(seed: int, streams: Tensor, positions: Tensor) -> Tensor:
    """fp64 [B] in (0, 1): the uniform of each (seed, stream, position).

    Args:
        seed: of the run and step.
        streams: int64 [B], a number per response.
        positions: int64 [B], the token's number within its response.
    """
    bits = _splitmix64(_splitmix64(_splitmix64(streams + seed * 2) + positions) + seed)
    # With 52 bits the half still fits into fp64's 53: neither 0 nor 1 can come out.
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


class Sample(NamedTuple):
    """One id per row, and the law that it was drawn from."""

    ids: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """fp32 [B], under the law that was drawn from."""
    kept: KeptIds | None
    """Of B tokens: the ids that truncation left. None with neither top-p nor top-k, and at
    temperature 0."""


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> Sample:
    """Draw an id per row by inverse CDF in the order of ids, without gathering the vocabulary.

    Truncation follows the usual order: temperature, top-k, then top-p (the smallest set whose mass
    reaches top_p of what top-k left), then renormalisation over the kept ids. Of equally likely ids
    the smaller is kept first. Ids of no mass (logit -inf) are never kept. Where a nucleus holds
    thousands of ids per rank, top-p costs a sort of the vocabulary of that row.

    What is kept, and so the law, is decided in integers and cannot depend on the order of sums, so
    all TP sizes decide alike if the machine's exp gives the same bits for the same number wherever
    it stands; a deviation of one fp64 ulp could matter only where a set's mass is within 1e-12 of
    top_p. The draw itself compares sums in fp64: TP sizes can differ where the uniform is within
    1e-13 of an edge between two ids.

    Args:
        logits: [B, V/tp], the shard of this rank.
        uniforms: fp64 [B] in (0, 1), the same on every rank.
        temperature: above 0; 0 takes the likeliest id, whose log-prob is then 0.
        top_p: above 0; 1 is off.
        top_k: 0 is off.
        vocab_size: number of real ids.
        group: the tensor-parallel group, None for one rank.

    Returns:
        The same on every rank. The log-prob comes from `logprobs_and_entropy`, as in training: on
        equal logits the two have the same bits.
    """
    shard = shard_of(logits.size(-1), vocab_size, group)
    if temperature == 0:
        best = candidates(logits, 1, shard, group)
        _check(best.logits[:, 0])
        ids = best.ids[:, 0]
        return Sample(ids, torch.zeros_like(ids, dtype=torch.float32), None)
    if top_p >= 1 and not top_k:
        ids, kept = _inverse_cdf(logits, uniforms, temperature, vocab_size, group), None
    else:
        ids, kept = _truncated(logits, uniforms, temperature, top_p, top_k, shard, group)
        logits = keep_only(logits.clone(), kept, shard)
    scores = logprobs_and_entropy(
        logits, ids, temperature=temperature, vocab_size=vocab_size, group=group
    )
    return Sample(ids, scores.logprobs, kept)


def _truncated(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    shard: Shard,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, KeptIds]:
    """The ids drawn, int64 [B], and those they were drawn from."""
    if top_k:
        parts = [_top_k(logits, temperature, top_p, min(top_k, shard.vocab_size), shard, group)]
    else:
        parts = _top_p(logits, temperature, top_p, shard, group)
    draws = [_draw(z, ids, uniforms[rows]) for rows, z, ids in parts]
    back = torch.cat([rows for rows, _, _ in parts]).argsort()
    ids, kept = zip(*draws, strict=True)
    width = max(part.size(-1) for part in kept)
    kept = [F.pad(part, (0, width - part.size(-1)), value=-1) for part in kept]
    return torch.cat(ids)[back], kept_from_padded(torch.cat(kept)[back], shard.vocab_size)


def _draw(z: Tensor, ids: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, and the kept ids with -1 behind them, from z and ids as in a `_Part`."""
    kept = ids.where(z > -torch.inf, -1)
    width = int((kept >= 0).sum(-1).max()) if len(kept) else 1
    z, kept = z[:, :width], kept[:, :width]
    by_id, order = kept.sort(-1)
    place = _inverse_cdf(z.gather(-1, order), uniforms, 1.0, width, None)[:, None]
    return by_id.gather(-1, place)[:, 0], kept


def _check(numbers: Tensor) -> None:
    """Raise where a row has no law to draw from; all ranks see the same numbers."""
    if not numbers.isfinite().all():
        row = int((~numbers.isfinite()).nonzero()[0])
        raise ValueError(f"row {row}: nothing to draw from, its logits are NaN, +inf or all -inf")


_Part = tuple[Tensor, Tensor, Tensor]
"""Rows int64 [n]; their z = logits / temperature, fp64 [n, w], descending, -inf where truncated;
and their ids [n, w]."""


def _top_k(
    logits: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    shard: Shard,
    group: dist.ProcessGroup | None,
) -> _Part:
    found = candidates(logits, top_k, shard, group)
    _check(found.logits[:, 0])
    z, ids = found.logits[:, :top_k].double() / temperature, found.ids[:, :top_k]
    if top_p < 1:
        mass = _mass(z, z[:, 0], shard)
        z = _cut(z, _nucleus_size(mass, mass.sum(-1), top_p))
    return torch.arange(logits.size(0), device=logits.device), z, ids


def _top_p(
    logits: Tensor,
    temperature: float,
    top_p: float,
    shard: Shard,
    group: dist.ProcessGroup | None,
) -> list[_Part]:
    """Rows whose nucleus the candidates do not cover ask for more of them, at most for all ids."""
    count = _CANDIDATES
    found = candidates(logits, count, shard, group)
    _check(found.logits[:, 0])
    rows = torch.arange(logits.size(0), device=logits.device)
    top = found.logits[:, 0].double() / temperature
    total = _total_mass(logits, temperature, top, shard, group)
    parts: list[_Part] = []
    while True:
        z = found.logits.double() / temperature
        size = _nucleus_size(_mass(z, top[rows], shard), total[rows], top_p)
        # Of all ids there are no more to ask for, should exp have rounded differently in the total.
        covered = (size <= found.complete) | (count >= logits.size(-1))
        width = int(size[covered].max()) if covered.any() else 1
        z = _cut(z[covered, :width], size[covered])
        parts.append((rows[covered], z, found.ids[covered, :width]))
        rows = rows[~covered]
        if not rows.numel():
            return parts
        count *= _GROWTH
        found = candidates(logits[rows], count, shard, group)


def _mass(z: Tensor, top: Tensor, shard: Shard) -> Tensor:
    """int64, as z: exp(z - top) in units that the sum over any vocabulary of this size can hold.

    Integers add up to the same total in any order; for 151,936 ids the unit is 2^-44 of the top.
    """
    return ((z - top[:, None]).exp_() * 2.0 ** (62 - shard.vocab_size.bit_length())).round_().long()


def _total_mass(
    logits: Tensor, temperature: float, top: Tensor, shard: Shard, group: dist.ProcessGroup | None
) -> Tensor:
    """int64 [B], over all ranks."""
    step = max(_CHUNK_ELEMENTS // logits.size(-1), 1)
    sums = [
        _mass(part.double() / temperature, part_top, shard).sum(-1)
        for part, part_top in zip(logits[:, : shard.real].split(step), top.split(step), strict=True)
    ]
    return add_ranks(gather_ranks(torch.cat(sums), group))


def _nucleus_size(mass: Tensor, total: Tensor, top_p: float) -> Tensor:
    """int64 [B]: how many of the first reach `top_p` of the total; one more than there are where
    they do not. All of a vocabulary always does: rounding to fp64 is monotone."""
    return (mass.cumsum(-1).double() < (top_p * total.double())[:, None]).sum(-1) + 1


def _cut(z: Tensor, size: Tensor) -> Tensor:
    """-inf from place `size` of each row on."""
    return z.masked_fill(torch.arange(z.size(-1), device=z.device) >= size[:, None], -torch.inf)


def _inverse_cdf(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """int64 [B]: the first id whose cumulative mass exceeds the uniform share of the total."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    shard = shard_of(logits.size(-1), vocab_size, group)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    z[:, shard.real :] = -torch.inf
    top = z.max(-1).values
    if size > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    cumulative = (z - top[:, None]).exp_().double().cumsum(-1)
    mass = cumulative[:, -1].contiguous()
    # The rank between whose edges the goal lies owns the draw. All ranks have the same edges, and a
    # uniform below 1 stays below the last one, so exactly one rank does, and it has mass.
    edges = gather_ranks(mass, group).cumsum(0)
    _check(edges[-1])
    goal = uniforms * edges[-1]
    owner = (edges <= goal).sum(0)
    before = edges[rank - 1] if rank else 0.0
    local = torch.searchsorted(cumulative, (goal - before)[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, mass[:, None])[:, 0]  # with mass, against rounding
    ids = (torch.minimum(local, last) + shard.start).where(owner == rank, 0)
    if size > 1:
        dist.all_reduce(ids, group=group)
    return ids
