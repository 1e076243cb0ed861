"""The vocabulary sweep as Triton kernels: what `sweep.Sweep` promises, for 16 and 32 bit logits.

A row is cut into blocks of columns, and a program serves one block of one row, so that a few rows
(generation) occupy a GPU as many rows (training) do. `partials` launches one program per block and
then one per row that merges its blocks, always in the same order; `gradient` launches one program
per block. How a row is cut depends on the number of its columns only, and nothing is tuned at run
time: a row has the same bits alone and in a batch (for the same columns, float type and alignment
of rows to 16 bytes, which decide how the compiler spreads a block over threads).

Bound by memory: `partials` reads each logit once, `gradient` reads and writes each once, so that
both together take 3 T C bytes-per-logit / bandwidth, plus 24 bytes per block of `BLOCK` logits.

Importing this module needs Triton. `sweep` does, for tensors on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed; it comes with torch's CUDA builds") from error

BLOCK = 4096
"""Columns of one program. 8 KiB of bf16: five programs in flight keep an SM's share of the memory
busy; and a vocabulary of 151936 gives 38 programs per row, so that four rows fill a GPU."""
_WARPS = 4
"""Of one program: 32 logits per thread, which stay in registers between the passes over them."""

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""As `sweep.LOWEST`."""
_NO_MASS = tl.constexpr(-1e3)
"""Stands for a log-probability of -inf: finite, so that 0 times it is 0, and its exp is still 0."""
_LOG2_E = tl.constexpr(math.log2(math.e))

# Numbers and alignments that differ between a batch and one of its rows. Triton would compile
# another kernel for 1, for multiples of 16 and for aligned pointers, which also costs seconds.
_kernel: Any = triton.jit(
    do_not_specialize=[
        *("rows", "ids", "temperature", "mask", "tops", "sums", "weighted", "partials"),
        *("top", "log_total", "entropy", "grad_logprobs", "grad_entropy"),
    ]
)


@triton.jit
def _if_live(value, mask, row):
    """`value`, and 0 in rows that the mask skips."""
    if mask is not None:
        value = tl.where(tl.load(mask + row), value, 0)
    return value


@triton.jit
def _read(logits, stride, mask, row, start, columns, real, BLOCK: tl.constexpr):
    """A block in fp32; -inf in padding columns and in skipped rows, which are not read."""
    column = start + tl.arange(0, BLOCK)
    # Not `real`, which is seldom a multiple of 16: threads could not read 16 bytes at a time.
    width = _if_live(columns, mask, row)
    x = tl.load(logits + row * stride + column, mask=column < width, other=-float("inf"))
    x = x.to(tl.float32)
    if start + BLOCK > real:
        x = tl.where(column < real, x, -float("inf"))
    return x


@triton.jit
def _inverse(temperature, row):
    """1 / temperature, rounded correctly: 1 stays 1. A product costs a fraction of a division."""
    return tl.div_rn(1.0, tl.load(temperature + row))


@triton.jit
def _exp(x):
    """exp(x), and 0 below 1.2e-38: Triton's own exp spends three more instructions on those."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _at_least(x, lowest):
    """max(x, lowest), but NaN stays NaN, for which the hardware's maximum would take the other."""
    return tl.maximum(x, lowest, propagate_nan=tl.PropagateNan.ALL)


@_kernel
def _block_partials(
    logits, stride, temperature, mask, columns, real, blocks, tops, sums, weighted,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # 64 bits: row * stride passes 2**31 with 14135 rows of 151936 columns.
    row = (program // blocks).to(tl.int64)
    x = _read(logits, stride, mask, row, (program % blocks) * BLOCK, columns, real, BLOCK)
    z = x * _inverse(temperature, row)
    top = tl.maximum(tl.max(z, 0), _LOWEST)
    z = _at_least(z - top, _NO_MASS)
    exp = _exp(z)
    tl.store(tops + program, top)
    tl.store(sums + program, tl.sum(exp, 0))
    tl.store(weighted + program, tl.sum(exp * z, 0))


@_kernel
def _merge_and_pick(
    logits, stride, ids, num_ids, temperature, mask, real, blocks, tops, sums, weighted, partials,
    rows, BLOCKS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out = partials + row
    live = _if_live(1, mask, row) > 0

    block = tl.arange(0, BLOCKS)
    here = block < blocks
    block = row * blocks + block
    block_top = tl.load(tops + block, mask=here, other=_LOWEST)
    block_sum = tl.load(sums + block, mask=here, other=0.0)
    block_weighted = tl.load(weighted + block, mask=here, other=0.0)
    top = tl.max(block_top, 0)
    shift = _at_least(block_top - top, _NO_MASS)
    scale = _exp(shift)
    total = tl.sum(block_sum * scale, 0)
    total_weighted = tl.sum((block_weighted + shift * block_sum) * scale, 0)
    # The hardware's maximum passes NaN by.
    top = tl.where(total == total, top, total)
    tl.store(out, tl.where(live, top, 0.0))
    tl.store(out + rows, tl.where(live, total, 0.0))
    tl.store(out + 2 * rows, tl.where(live, total_weighted, 0.0))

    k = tl.arange(0, IDS)
    column = tl.load(ids + row * num_ids + k, mask=k < num_ids, other=-1)
    held = (column >= 0) & (column < _if_live(real, mask, row))
    x = tl.load(logits + row * stride + column, mask=held, other=0.0)
    z = tl.where(held, x.to(tl.float32) * _inverse(temperature, row), 0.0)
    tl.store(out + (3 + k).to(tl.int64) * rows, z, mask=k < num_ids)


@_kernel
def _block_gradient(
    logits, stride, ids, num_ids, temperature, mask, columns, real, blocks, top, log_total,
    entropy, grad_logprobs, grad_entropy, out, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks) * BLOCK
    column = start + tl.arange(0, BLOCK)
    # The whole block is in registers before any of it is written: `out` may be `logits`.
    x = _read(logits, stride, mask, row, start, columns, real, BLOCK)
    width = _if_live(real, mask, row)
    # Skipped rows may hold any temperature.
    inverse = tl.where(width > 0, _inverse(temperature, row), 0.0)
    log_p = x * inverse - tl.load(top + row) - tl.load(log_total + row)

    # Few blocks hold any of the ids, so that K costs K scalar reads, not K operations per logit.
    slope = 0.0
    picked = tl.zeros((BLOCK,), tl.float32)
    for k in range(num_ids):
        chosen = tl.load(ids + row * num_ids + k).to(tl.int32)
        grad = tl.load(grad_logprobs + row * num_ids + k)
        slope += grad
        if (chosen >= start) & (chosen < tl.minimum(start + BLOCK, width)):
            picked += tl.where(column == chosen, grad, 0.0)

    p = _exp(log_p)
    if grad_entropy is not None:
        bend = _at_least(log_p, _NO_MASS) + tl.load(entropy + row)
        p *= slope + tl.load(grad_entropy + row) * bend
    else:
        p *= slope
    # Logits of -inf have no mass, nor has what was not read: padding columns and skipped rows.
    value = (picked - tl.where(x == -float("inf"), 0.0, p)) * inverse
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=column < columns)


def partials(
    logits: Tensor, ids: Tensor, temperature: Tensor, real: int, mask: Tensor | None
) -> Tensor:
    """See `sweep.Sweep.partials`."""
    rows, num_ids = ids.shape
    out = logits.new_empty((3 + num_ids, rows), dtype=torch.float32)
    if not rows:
        return out
    ids, temperature, mask = _dense(ids), _dense(temperature), _dense(mask)
    # One block where there is no real column: it finds no mass, as a shard of padding should.
    blocks = max(_blocks(real), 1)
    found = logits.new_empty((3, rows * blocks), dtype=torch.float32).unbind()
    _block_partials[(rows * blocks,)](
        logits, logits.stride(0), temperature, mask, logits.size(1), real, blocks, *found,
        BLOCK=BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    _merge_and_pick[(rows,)](
        logits, logits.stride(0), ids, num_ids, temperature, mask, real, blocks, *found, out, rows,
        BLOCKS=triton.next_power_of_2(blocks), IDS=triton.next_power_of_2(num_ids),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


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
    """See `sweep.Sweep.gradient`."""
    rows, columns = logits.shape
    blocks = _blocks(columns)
    if not rows * blocks:
        return
    # Products and sums are not fused here either: both kernels round a logit over the temperature
    # alike, so that p is exp of the log-prob that `partials` led to.
    _block_gradient[(rows * blocks,)](
        logits, logits.stride(0), _dense(ids), ids.size(1), _dense(temperature), _dense(mask),
        columns, real, blocks, _dense(top), _dense(log_total), _dense(entropy),
        _dense(grad_logprobs), _dense(grad_entropy), out, out.stride(0),
        BLOCK=BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _dense(value: Tensor | None) -> Any:
    """The kernels index the small inputs without strides; autograd's may be expanded scalars."""
    return None if value is None else value.contiguous()
