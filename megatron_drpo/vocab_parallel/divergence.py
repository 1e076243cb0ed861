"""Divergences between two vocab-parallel distributions, per token, differentiable in the first.

Each is a sum over the vocabulary of terms f(p, q) that are never negative, so that nothing cancels
where p is close to q. With w = p df/dp, and z = logits / temperature,

    d f(p, q) / d log p = w            d (sum_v f) / d z_j = w_j - p_j sum_v w_v.

    kind     f(p, q)                                           w
    tv       |p - q| / 2                                       p sign(p - q) / 2
    kl_pq    p log(p/q) - p + q                                p log(p/q)
    kl_qp    q log(q/p) - q + p                                p - q
    js       (p log(p/m) + q log(q/m)) / 2, m = (p + q) / 2    p log(p/m) / 2
    l2       (p - q)^2                                         2 p (p - q)

As sums over a distribution, where -p + q adds up to 0, these are the total variation, KL(p || q),
KL(q || p), the Jensen-Shannon divergence (in nats) and the squared Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_drpo.vocab_parallel.logprobs import local_ids, row_temperature
from megatron_drpo.vocab_parallel.shard import (
    add_ranks,
    check_ids,
    gather_ranks,
    merge_sums,
    shard_of,
)
from megatron_drpo.vocab_parallel.topk import candidates, check_k, gather_together

Kind = Literal["tv", "kl_pq", "kl_qp", "js", "l2"]

_CHUNK_ELEMENTS = 1 << 20
"""Logits of each distribution that are held in fp64 at a time, a few times over."""
LOWEST = torch.finfo(torch.float64).min
"""Stands for a maximum of -inf: differences to it stay numbers."""
_TINY = torch.finfo(torch.float64).tiny


class Normalizer(NamedTuple):
    """What turns logits into log-probs: log p = (logits / temperature - top) - log_total."""

    top: Tensor
    """[T]: the maximum of logits / temperature over the vocabulary."""
    log_total: Tensor
    """[T]: log of the sum over the vocabulary of exp(logits / temperature - top)."""


def divergence(
    logits_p: Tensor,
    logits_q: Tensor,
    kind: Kind,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    top_k: int | None = None,
    sampled: Tensor | None = None,
    normalizers: tuple[Normalizer, Normalizer] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[T]: how far the policy p is from the fixed distribution q, over all ranks of `group`.

    Two collectives of a few numbers per token: one for the normalizers of both, one for the sums.
    One alone would not do: |p - q| and p log(p/q) need the normalizers before they can be summed.
    No collective in the backward pass. The arithmetic is fp64, a chunk of rows at a time, for p
    close to q: values down to 1e-12 are right to a per cent (of tv with `normalizers` in fp32, down
    to 1e-5).

    With `top_k` the divergence of coarser distributions: q's `top_k` likeliest ids, the sampled id
    if it is not among them, and one bucket for all other ids. At most that of the whole ones,
    except l2. Two collectives as well, of `top_k` numbers per token.

    Args:
        logits_p: [T, V/tp], any float type; rank i of `group` holds ids i*V/tp to (i+1)*V/tp - 1.
        logits_q: [T, V/tp], any float type; receives no gradient.
        kind: see the table above.
        temperature: of both, above 0; a number, or fp32 [T].
        vocab_size: number of real ids; later columns are padding, outside both. None: all are real.
        top_k: at most `vocab_size`; None: the whole vocabulary.
        sampled: int64 [T], global ids; only with `top_k`.
        normalizers: of p and of q, from `normalizers_of`; None: computed here. Not with `top_k`.
        group: the tensor-parallel group, None for one rank.

    Returns:
        fp32 (fp64 where `logits_p` are), equal to the last bit on every rank. Where q = 0 < p,
        kl_pq is inf and its gradient is not finite; where p = 0 < q, kl_qp is inf. Everything else
        is finite. A logit of -inf, padding, and a row whose incoming gradient is 0, whatever it
        holds, get the gradient 0.

    Raises:
        ValueError: an unknown kind, shapes that differ, or arguments that do not go together.
    """
    if kind not in _TERMS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(_TERMS)}")
    if logits_p.shape != logits_q.shape:
        raise ValueError(f"logits_p {[*logits_p.shape]} and logits_q {[*logits_q.shape]} differ")
    logits_q, shard = logits_q.detach(), shard_of(logits_p.size(-1), vocab_size, group)
    rows = row_temperature(temperature, logits_p)
    if top_k is not None:
        if normalizers is not None:
            raise ValueError("normalizers are of the whole vocabulary: leave them out with top_k")
        check_k(top_k, shard)
        ids = candidates(logits_q, top_k, shard, group).ids[:, :top_k]
        if sampled is not None:
            check_ids(sampled, shard.vocab_size)
            again = (ids == sampled[:, None]).any(-1)
            ids = torch.cat([ids, sampled.masked_fill(again, -1)[:, None]], -1)
        return _Coarse.apply(logits_p, logits_q, kind, rows, ids, shard, group)
    if sampled is not None:
        raise ValueError("sampled is an id beside q's likeliest: give top_k, or leave it out")
    p, q = normalizers or normalizers_of(
        logits_p, logits_q, temperature=temperature, vocab_size=vocab_size, group=group
    )
    return _Divergence.apply(logits_p, logits_q, kind, rows, shard.real, group, *p, *q)


@torch.no_grad()
def normalizers_of(
    *logits: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Normalizer]:
    """The normalizer of each of `logits`, in fp64; one collective for all of them.

    Args:
        logits: [T, V/tp] each.
        temperature: above 0; a number, or fp32 [T].
        vocab_size: number of real ids; None: all columns are real.
        group: the tensor-parallel group, None for one rank.
    """
    partials = []
    for each in logits:
        rows, shard = row_temperature(temperature, each), shard_of(each.size(-1), vocab_size, group)
        nothing = torch.empty((each.size(0), 0), dtype=torch.long, device=each.device)
        partials.append(_partials(each, rows, nothing, shard.real))
    top, log_total = _merge(gather_ranks(torch.stack(partials), group))
    return [Normalizer(*pair) for pair in zip(top, log_total, strict=True)]


def _partials(logits: Tensor, temperature: Tensor, without: Tensor, real: int) -> Tensor:
    """fp64 [2, T]: of z = logits / temperature over this rank's columns except those in `without`
    (int64 [T, K], -1 for none) the maximum m (LOWEST where there is none) and sum exp(z - m)."""
    out = torch.zeros((2, logits.size(0)), dtype=torch.float64, device=logits.device)
    out[0] = LOWEST
    if real:
        chunks = _chunks(logits[:, :real], temperature.double(), without, out.T)
        for part, rows, columns, into in chunks:
            z = _remove(part.double() / rows[:, None], columns)
            into[:, 0] = z.max(-1).values.clamp_(min=LOWEST)
            into[:, 1] = z.sub_(into[:, :1]).exp_().sum(-1)
    return out


def _merge(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, T] each: top and log_total, from [ranks, n, 2, T] partials."""
    top, total = merge_sums(*ranks.unbind(2))
    return top, total.log()


def _remove(z: Tensor, columns: Tensor) -> Tensor:
    """-inf in `columns` (int64 [T, K], -1 for none) of each row, in place."""
    lowered = torch.full_like(columns, -torch.inf, dtype=z.dtype).where(columns >= 0, torch.inf)
    return z.scatter_reduce_(-1, columns.clamp(min=0), lowered, "amin")


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching runs of rows of all, sized by the width of the first."""
    step = max(_CHUNK_ELEMENTS // max(logits.size(-1), 1), 1)
    return zip(*(each.split(step) for each in (logits, *others)), strict=True)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_p, logits_q, kind, temperature, real, group, *normalizers):
        norms = torch.stack([temperature.double(), *(n.double() for n in normalizers)], 1)
        sums = norms.new_zeros((2, logits_p.size(0)))
        for part_p, part_q, norm, into in _chunks(
            logits_p[:, :real], logits_q[:, :real], norms, sums.T
        ):
            value, weight = _TERMS[kind](*_log_probs(part_p, part_q, norm))
            into[:, 0], into[:, 1] = value.sum(-1), weight.sum(-1)
        value, total_weight = add_ranks(gather_ranks(sums, group))
        ctx.save_for_backward(logits_p, logits_q, norms, total_weight)
        ctx.kind, ctx.real = kind, real
        return value.to(temperature.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits_p, logits_q, norms, total_weight = ctx.saved_tensors
        real = ctx.real
        out = torch.empty_like(logits_p)
        out[:, real:] = 0
        for part_p, part_q, norm, total, g, into in _chunks(
            logits_p[:, :real], logits_q[:, :real], norms, total_weight, grad.double(), out
        ):
            log_p, log_q = _log_probs(part_p, part_q, norm)
            _, slope = _TERMS[ctx.kind](log_p, log_q)
            slope -= log_p.exp() * total[:, None]
            slope *= (g / norm[:, 0])[:, None]
            # Rows that nobody asks about are inert whatever they hold.
            into[:, :real] = slope.masked_fill_((g == 0)[:, None] | log_p.isneginf(), 0)
        return out, *[None] * 9


def _log_probs(logits_p: Tensor, logits_q: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """fp64; norm: [T, 5], the temperature, then top and log_total of p and of q."""
    temperature, top_p, log_total_p, top_q, log_total_q = norm.T[..., None]
    log_p = (logits_p.double() / temperature).sub_(top_p).sub_(log_total_p)
    log_q = (logits_q.double() / temperature).sub_(top_q).sub_(log_total_q)
    return log_p, log_q


class _Coarse(torch.autograd.Function):
    """With `top_k`: ids [T, K] have a bucket each, -1 an empty one, and the rest the last.

    A bucket's logit z is the logsumexp of those of its ids, so the log-probs of the buckets are
    their log_softmax, and d z_bucket / d z_j = exp(z_j - z_bucket).
    """

    @staticmethod
    def forward(ctx, logits_p, logits_q, kind, temperature, ids, shard, group):
        columns = local_ids(ids, shard)
        picked = [
            each.gather(-1, columns.clamp(min=0)).double().where(columns >= 0, 0)
            for each in (logits_p, logits_q)
        ]
        rests = [_partials(each, temperature, columns, shard.real) for each in (logits_p, logits_q)]
        picked, rests = gather_together(group, torch.stack(picked), torch.stack(rests))
        z = (add_ranks(picked) / temperature.double()[:, None]).masked_fill_(ids < 0, -torch.inf)
        top, log_total = _merge(rests)
        rest = top + log_total
        log_p, log_q = torch.cat([z, rest[..., None]], -1).log_softmax(-1)
        value, weight = _TERMS[kind](log_p, log_q)
        slopes = weight - log_p.exp() * weight.sum(-1, keepdim=True)
        ctx.save_for_backward(logits_p, columns, temperature.double(), rest[0], slopes)
        ctx.real = shard.real
        return value.sum(-1).to(temperature.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits_p, *others = ctx.saved_tensors
        out = torch.empty_like(logits_p)
        out[:, ctx.real :] = 0
        if not ctx.real:
            return out, *[None] * 6
        chunks = _chunks(logits_p[:, : ctx.real], *others, grad.double(), out)
        for part, columns, temperature, rest, slopes, g, into in chunks:
            z = part.double() / temperature[:, None]
            impossible = z.isneginf()
            slope = _remove(z, columns).sub_(rest.clamp(min=LOWEST)[:, None]).exp_()
            slope *= slopes[:, -1:]
            slope.scatter_add_(-1, columns.clamp(min=0), slopes[:, :-1].where(columns >= 0, 0))
            slope *= (g / temperature)[:, None]
            into[:, : ctx.real] = slope.masked_fill_((g == 0)[:, None] | impossible, 0)
        return out, *[None] * 6


# (f, w) of the table above, from log-probs in fp64. A probability of 0 times a logarithm is 0.


def _tv(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    difference = p - log_q.exp()
    return difference.abs() / 2, p * difference.sign() / 2


def _kl_pq(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    weight = (p * (log_p - log_q)).masked_fill_(p == 0, 0)
    return weight - p + log_q.exp(), weight


def _kl_qp(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    weight = log_p.exp() - q
    return (q * (log_q - log_p)).masked_fill_(q == 0, 0) + weight, weight


def _js(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).clamp_(min=_TINY)
    weight = torch.xlogy(p, p / middle) / 2
    return weight + torch.xlogy(q, q / middle) / 2, weight


def _l2(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    difference = p - log_q.exp()
    return difference.square(), 2 * p * difference


_TERMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "tv": _tv,
    "kl_pq": _kl_pq,
    "kl_qp": _kl_qp,
    "js": _js,
    "l2": _l2,
}
