"""One sweep over a shard of logits, forward and backward: the two kernels below everything.

`partials` reads each logit once; `gradient` reads each logit once and writes its gradient, into
the logits' own storage if told. Both treat rows independently, so that a row's numbers depend
neither on the rows beside it nor on the size of the chunk. Three implementations: plain torch
(any device, any float type, the reference), C on the CPU (`sweep_c`), Triton on GPUs
(`sweep_triton`). Which one serves a tensor is decided in `sweep_for`, once per process and device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_drpo.vocab_parallel import sweep_c
from megatron_drpo.vocab_parallel.shard import parts

logger = logging.getLogger(__name__)

LOWEST = torch.finfo(torch.float32).min
"""Stands for a maximum of -inf: differences to it stay numbers, and their exp is still 0."""

_CHUNK_ELEMENTS = 1 << 20
"""Logits that the plain sweep holds in fp32 at a time, a few times over."""


@dataclass(frozen=True)
class Sweep:
    """An implementation of the two kernels. Types: `acc` is fp64 for fp64 logits, else fp32."""

    name: str
    partials: Callable[..., Tensor]
    """(logits [T, C], ids int64 [T, K], temperature acc [T], real, mask bool [T] | None)
    -> acc [3 + K, T]. With z = logits[t, v] / temperature[t] over the first `real` columns:
    row 0 the maximum m of z (LOWEST where there is none), row 1 sum exp(z - m), row 2
    sum (z - m) exp(z - m), row 3 + k the z of column ids[t, k], or 0 where that is -1.
    A logit of -inf adds nothing to any sum; NaN and +inf make the row's sums NaN. Where the mask is
    False, all of the column is 0, whatever the row holds. Needs unit stride along C only."""
    gradient: Callable[..., None]
    """(logits, ids, temperature, real, mask, top acc [T], log_total acc [T], entropy acc [T],
    grad_logprobs acc [T, K], grad_entropy acc [T] | None, out [T, C]) -> None. With the global
    maximum `top` and log sum exp(z - top) `log_total`, log p = (z - top) - log_total (in this
    order, which keeps its precision where logits are large) and g = sum_k grad_logprobs[t, k]:
    out[t, v] = (sum_k grad_logprobs[t, k] [v = ids[t, k]]
                 - p (g + grad_entropy[t] (log p + entropy[t]))) / temperature[t],
    0 from column `real` on and in rows that the mask skips; a logit of -inf has p = 0. An id may
    occur several times in a row. `out` may be `logits`; it may have another float type."""


def _rows(rows: int, columns: int) -> Iterator[slice]:
    return parts(rows, max(_CHUNK_ELEMENTS // max(columns, 1), 1))


def _acc(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def partials(
    logits: Tensor, ids: Tensor, temperature: Tensor, real: int, mask: Tensor | None
) -> Tensor:
    """See `Sweep.partials`."""
    rows, acc = logits.size(0), _acc(logits)
    out = logits.new_zeros((3 + ids.size(1), rows), dtype=acc)
    if not real:
        out[0] = LOWEST
        return out if mask is None else out.where(mask, 0)
    for r in _rows(*logits.shape):
        z = logits[r, :real].to(acc) / temperature[r, None]
        top = z.max(-1).values.clamp(min=LOWEST)
        out[0, r] = top
        out[3:, r] = z.gather(-1, ids[r].clamp(min=0)).where(ids[r] >= 0, 0).T
        z.sub_(top[:, None])
        exp = z.exp()
        out[1, r] = exp.sum(-1)
        # A logit at -inf has p = 0 and adds nothing, though 0 * -inf is NaN.
        z.masked_fill_(z == -torch.inf, 0)
        out[2, r] = exp.mul_(z).sum(-1)
    return out if mask is None else out.where(mask, 0)


def gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    real: int,
    mask: Tensor | None,
    top: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """See `Sweep.gradient`."""
    out[:, real:] = 0
    if not real:
        return
    acc = _acc(logits)
    for r in _rows(*logits.shape):
        log_p = logits[r, :real].to(acc) / temperature[r, None]
        log_p.sub_(top[r, None]).sub_(log_total[r, None])
        p = log_p.exp()
        slope = grad_logprobs[r].sum(-1, keepdim=True)
        if grad_entropy is not None:
            # Where p = 0 the bracket only has to be finite: fp64's smallest p is exp(-745).
            log_p.clamp_(min=-1e3).add_(entropy[r, None]).mul_(grad_entropy[r, None])
            p.mul_(log_p.add_(slope))
        else:
            p.mul_(slope)
        grad = p.neg_()
        picked = grad_logprobs[r].where(ids[r] >= 0, 0)
        grad.scatter_add_(-1, ids[r].clamp(min=0), picked)
        grad.div_(temperature[r, None])
        if mask is not None:
            grad.masked_fill_(~mask[r, None], 0)
        out[r, :real] = grad


PLAIN = Sweep("plain torch", partials, gradient)


def sweep_for(logits: Tensor) -> Sweep:
    """The implementation that serves these logits: the fastest that this machine can run."""
    on_cpu = logits.device.type == "cpu"
    if logits.dtype == torch.float64 or (on_cpu and logits.dtype == torch.float16):
        return PLAIN
    return _choice(logits.device.type)[0]


def describe_sweep(device_type: str) -> str:
    """Which implementation serves fp32 and bf16 logits on such devices, and why not a faster one.

    Example: "compiled C (~/.cache/megatron_drpo/sweep-1f0c....so)"
    """
    chosen, reason = _choice(device_type)
    return f"{chosen.name} ({reason})"


@cache
def _choice(device_type: str) -> tuple[Sweep, str]:
    """Made once per process, with its reason."""
    if device_type == "cpu":
        choice = _compiled()
    elif device_type == "cuda":
        choice = _triton()
    else:
        choice = PLAIN, f"no kernels for {device_type}"
    logger.info("vocabulary sweep on %s: %s (%s)", device_type, choice[0].name, choice[1])
    return choice


def _compiled() -> tuple[Sweep, str]:
    try:
        compiled = sweep_c.load()
    except sweep_c.BuildError as error:
        return PLAIN, str(error)
    sweep = Sweep("compiled C", compiled.partials, compiled.gradient)
    if not _equals_plain(sweep):
        return PLAIN, f"{compiled.origin} computes wrong numbers here"
    return sweep, compiled.origin


def _triton() -> tuple[Sweep, str]:
    try:
        from megatron_drpo.vocab_parallel import sweep_triton

        sweep = Sweep("Triton", sweep_triton.partials, sweep_triton.gradient)
        with torch.device("cuda"):
            equal = _equals_plain(sweep)
    # Triton has no error of its own for what it lacks: a C compiler, a newer GPU, a place to write.
    except Exception as error:
        return PLAIN, f"{type(error).__name__}: {error}"
    if not equal:
        return PLAIN, "Triton's kernels compute wrong numbers here"
    return sweep, "compiled for this GPU"


def _equals_plain(sweep: Sweep) -> bool:
    """Whether a small example agrees with the plain sweep: against compilers that err."""
    rows, columns, real = 4, 2541, 2539
    z = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    z = z.mul(0.7).sin().mul(5) + z / 2000  # the maximum is in the second block
    z[0, :9] = -torch.inf
    ids = torch.tensor([[3, 2500], [38, -1], [7, 7], [1, 2]])
    mask = torch.tensor([True, True, True, False])
    temperature, grad_entropy, *slopes = torch.linspace(0.5, 1.5, rows).repeat(4, 1)
    for dtype in (torch.float32, torch.bfloat16):
        logits, results = z.to(dtype), []
        for each in (PLAIN, sweep):
            sums = each.partials(logits, ids, temperature, real, mask)
            log_total = sums[1].log().where(mask, 0)
            out = torch.empty_like(logits)
            each.gradient(
                logits, ids, temperature, real, mask, sums[0], log_total, sums[2],
                torch.stack(slopes, 1), grad_entropy, out,
            )  # fmt: skip
            results.append((sums, out.float()))
        limits = (1e-5, torch.finfo(dtype).eps)
        for plain, other, limit in zip(*results, limits, strict=True):
            if not torch.allclose(plain, other, rtol=limit, atol=1e-5):
                return False
    return True
