"""Sampling from vocab-parallel logits: the same token on every rank, and at every TP size.

Randomness is a counter, not a state: the uniform of a token depends on (seed, stream, position)
alone, so neither batching, nor the layout, nor a resume changes what is drawn.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.vocab_parallel.logprobs import vocab_parallel_logprobs

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


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


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw an id per row by inverse CDF in the order of ids, with its log-prob.

    Truncation follows the usual order: temperature, top-k (ties go to the smaller id), then top-p
    (the smallest set whose mass reaches top_p), then renormalisation over the kept ids.

    Args:
        logits: [B, V/tp], the shard of this rank.
        uniforms: fp64 [B] in (0, 1), the same on every rank.
        temperature: above 0; 0 takes the likeliest id, whose log-prob is then 0.
        top_p: 1 is off.
        top_k: 0 is off.
        vocab_size: number of real ids.
        group: the tensor-parallel group, None for one rank.

    Returns:
        ids int64 [B] and log-probs fp32 [B] under the distribution that was drawn from. Without
        truncation the log-prob comes from `vocab_parallel_logprobs`, as in training.
    """
    if temperature > 0 and top_p >= 1 and not top_k:
        ids = _inverse_cdf(logits, uniforms, temperature, vocab_size, group)
        scores = vocab_parallel_logprobs(
            logits, ids, temperature=temperature, vocab_size=vocab_size, group=group
        )
        return ids, scores.logprobs
    logits = _gather(logits, group)[:, :vocab_size].float()
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, torch.zeros_like(ids, dtype=torch.float32)
    # A stable sort keeps the smaller id first among equals.
    ordered, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1:
        mass = ordered.softmax(-1).double().cumsum(-1)
        beyond = mass.roll(1, -1)
        beyond[:, 0] = 0
        ordered = ordered.masked_fill(beyond >= top_p, -torch.inf)
    kept = torch.full_like(ordered, -torch.inf).scatter(-1, order, ordered)
    ids = _inverse_cdf(kept, uniforms, 1.0, vocab_size, None)
    return ids, kept.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _gather(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, -1)


def _inverse_cdf(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """int64 [B]: the first id whose cumulative mass exceeds the uniform share of the total."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    start = logits.size(-1) * rank
    z = logits.float() / temperature
    z[:, max(vocab_size - start, 0) :] = -torch.inf
    top = z.max(-1).values
    if size > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    cumulative = (z - top[:, None]).exp_().double().cumsum(-1)
    mass = cumulative[:, -1].contiguous()
    masses = [mass]
    if size > 1:
        masses = [torch.empty_like(mass) for _ in range(size)]
        dist.all_gather(masses, mass, group=group)
    # The rank between whose edges the goal lies owns the draw. All ranks have the same edges, and a
    # uniform below 1 stays below the last one, so exactly one rank does, and it has mass.
    edges = torch.stack(masses).cumsum(0)
    goal = uniforms * edges[-1]
    owner = (edges <= goal).sum(0)
    before = edges[rank - 1] if rank else 0.0
    local = torch.searchsorted(cumulative, (goal - before)[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, mass[:, None])[:, 0]  # with mass, against rounding
    ids = (torch.minimum(local, last) + start).where(owner == rank, 0)
    if size > 1:
        dist.all_reduce(ids, group=group)
    return ids
