"""The three GEMMs of an output layer: logits, the hidden states' gradient, the weight's gradient.

Logits are fp32 whatever the weights are: a logit rounded to bf16 moves log-probs by 0.03 nats on
average, as much as many updates. GPUs keep the fp32 sums of a 16-bit GEMM when asked
(`torch.mm(..., out_dtype=)`); CPUs do not, and compute on parts of the weight held in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_drpo.vocab_parallel.shard import parts

MIN_ROWS = 4
"""Fewer rows than this make CPU libraries take another GEMM kernel, with other rounding."""

KEY_BLOCK = 64
"""Numbers of keys are rounded up to this in attention, so that training and generation sum over
them in the same order."""

_WEIGHT_ROWS = 2048
"""Rows of the weight that a GEMM takes at a time where it needs memory of its own for them: oneDNN
for a second copy of its result, others for the weight, or a sum of its gradient, in fp32."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [t, V/tp] = hidden [t, H] @ weight [V/tp, H].T, in fp32 (fp64 where both are).

    A row's bits depend on the row and the weight alone, so few rows are computed among others.
    """
    count = hidden.size(0)
    if count < MIN_ROWS:
        hidden = torch.cat([hidden, hidden.new_zeros(MIN_ROWS - count, hidden.size(1))])
    if is_mixed(weight):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)[:count]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    hidden = hidden.to(dtype)
    if weight.dtype == dtype and (
        dtype == torch.float64 or _fp32_linear(weight.device.type) is None
    ):
        return torch.mm(hidden, weight.T)[:count]
    logits = hidden.new_empty((hidden.size(0), weight.size(0)))
    for part in parts(weight.size(0), _WEIGHT_ROWS):
        logits[:, part] = _linear(hidden, weight[part].to(dtype))
    return logits[:count]


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """[t, H] = grad [t, V/tp] @ weight [V/tp, H], all in the type of `weight`."""
    return _linear(grad.to(weight.dtype), weight.T)


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V/tp, H] += grad [t, V/tp].T @ hidden [t, H]; `total` is fp32 (fp64 where all are).

    Sums over chunks diverge in bf16.
    """
    if grad.dtype == total.dtype:
        total.addmm_(grad.T, hidden.to(total.dtype))
        return
    for part in parts(total.size(0), _WEIGHT_ROWS):
        total[part] += torch.mm(grad[:, part].T, hidden, out_dtype=total.dtype)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The type that the GEMMs of the backward pass want the logits' gradient in."""
    return weight.dtype if is_mixed(weight) else torch.promote_types(weight.dtype, torch.float32)


def is_mixed(weight: Tensor) -> bool:
    """True for 16-bit weights whose GEMMs keep their fp32 sums."""
    return weight.element_size() == 2 and _mixed_gemm(weight.device.type)


@cache
def _mixed_gemm(device_type: str) -> bool:
    """True if this type of device multiplies 16-bit matrices into an fp32 result."""
    x = torch.ones((16, 16), dtype=torch.bfloat16, device=device_type)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):  # TypeError: torch without `out_dtype`
        return False
    return True


def describe_gemm(device_type: str) -> str:
    """Which GEMMs the output layer takes on such devices. Example: "fp32 by oneDNN, ..."."""
    fp32 = "torch.mm" if _fp32_linear(device_type) is None else "oneDNN"
    mixed = _mixed_gemm(device_type)
    return f"fp32 by {fp32}, bf16 {'with fp32 sums' if mixed else 'in fp32, part by part'}"


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [t, n] @ weight [m, n].T, both of one type."""
    fp32 = _fp32_linear(x.device.type) if x.dtype == torch.float32 else None
    return torch.mm(x, weight.T) if fp32 is None else fp32(x, weight)


@cache
def _fp32_linear(device_type: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's GEMM, where torch has it for this device.

    With few rows it takes half the time of the BLAS behind `torch.mm` (docs/notes.md), which it is
    only asked for by the compiler's own operator.
    """
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            return operator(x, weight, None, "none", [], "")

        x = torch.arange(32.0, device=device_type).reshape(8, 4)
        usable = torch.equal(linear(x, x), torch.mm(x, x.T))
    except (AttributeError, NotImplementedError, RuntimeError):
        usable = False
    return linear if usable else None
