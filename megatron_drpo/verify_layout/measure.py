"""What a layout makes of a batch: loss, log-probs, and a digest of every gradient."""

from __future__ import annotations

import resource
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_drpo.device import Device
from megatron_drpo.mcore import gradients
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.types import Row
from megatron_drpo.verify_layout.batch import Batch

SHARPER = 1.05
"""Factor of the hidden states that stand for the weights that generated."""

NUM_PROJECTIONS = 8
_PIECE = 1 << 21


class Digest(NamedTuple):
    """What is kept of a gradient: its norm, and its products with some random tensors."""

    norm: float
    projections: Tensor
    """fp64 [NUM_PROJECTIONS]."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a layout made of a batch."""

    layout: str
    rows: str
    loss: float
    loss_scale: float
    """sum(|weight * ratio * advantage|) / sum(num_items): the loss, if no token cancelled
    another."""
    grad_norm: float
    num_tokens: int
    """Loss tokens, each counted as often as it was computed."""
    scored: Tensor
    """fp64 [all tokens], log-probs before the update; NaN at tokens without loss."""
    trained: Tensor
    """The same of the pass with gradients."""
    gradients: dict[str, Digest]
    """By name of the tensor in a Hugging Face checkpoint."""
    copies: list[gradients.Copies]
    seconds: float
    """Of scoring and of the pass with gradients."""
    peak_bytes: int
    """Most memory of any rank so far: of the device, or of the process on a CPU."""

    def __str__(self) -> str:
        peak = f"{self.peak_bytes / 2**30:.2f} GiB at most"
        return f"{self.layout}; {self.rows}; {self.seconds:.1f} s, {peak}"


class _Tokens(NamedTuple):
    """Of the loss tokens of a rank."""

    numbers: Tensor
    scored: Tensor
    trained: Tensor
    magnitude: float
    num_items: int


def measure(policy: Policy, rows: Sequence[Row], batch: Batch) -> Measured | None:
    """Score the rows and compute loss and gradients; collective. None but on rank 0.

    Args:
        rows: the rows of this replica, of all trajectories of the batch.
    """
    layout, device = policy.layout, policy.device
    started = time.perf_counter()
    [annotated] = policy.annotate([rows])
    known = [_made_up(row, batch) for row in annotated]
    loss, diagnostics = policy.forward_backward(known)
    norm = gradients.norm(policy)
    device.synchronize()
    seconds = time.perf_counter() - started
    gradients.complete(policy)
    digests = {name: _digest(name, value) for name, value in gradients.tensors(policy)}
    copies = gradients.copies(policy)
    own = None
    if diagnostics is not None and layout.tp_rank == 0:
        said = diagnostics.cpu()
        weights = torch.cat([row.weights for row in rows])
        scores = [row.old_logprobs.cpu() for row in annotated if row.old_logprobs is not None]
        own = _Tokens(
            torch.cat([batch.numbers(row) for row in rows]),
            torch.cat(scores),
            said.logprobs,
            float((weights * said.ratio * said.advantages).abs().sum()),
            sum(row.num_items for row in rows),
        )
    peaks = layout.gather_objects(_peak_bytes(device))
    tokens: list[_Tokens] = layout.gather_to_main(own)
    if layout.rank:
        return None
    numbers = torch.cat([part.numbers for part in tokens])

    def whole(values: Sequence[Tensor]) -> Tensor:
        result = torch.full((batch.num_tokens,), torch.nan, dtype=torch.float64)
        result[numbers] = torch.cat([*values]).double()
        return result

    most = len(rows)
    return Measured(
        layout=str(layout),
        rows=f"{most} rows of {rows[0].tokens.numel()} tokens",
        loss=loss,
        loss_scale=sum(part.magnitude for part in tokens) / sum(part.num_items for part in tokens),
        grad_norm=norm,
        num_tokens=numbers.numel(),
        scored=whole([part.scored for part in tokens]),
        trained=whole([part.trained for part in tokens]),
        gradients=digests,
        copies=copies,
        seconds=seconds,
        peak_bytes=max(peaks),
    )


def _made_up(row: Row, batch: Batch) -> Row:
    """The annotated row, with what this first update of a batch would find too easy."""
    if batch.old_logprobs is not None and row.old_logprobs is not None:
        row = replace(row, old_logprobs=batch.old_logprobs[batch.numbers(row)])
    if row.behaviour_hidden is not None:
        row = replace(row, behaviour_hidden=SHARPER * row.behaviour_hidden)
    return row


def _digest(name: str, gradient: Tensor) -> Digest:
    """Norm and projections; the random tensors depend on name and size alone."""
    generator = torch.Generator(gradient.device).manual_seed(zlib.crc32(name.encode()))
    norm = torch.zeros((), dtype=torch.float64, device=gradient.device)
    projections = norm.new_zeros(NUM_PROJECTIONS)
    for piece in gradient.flatten().split(_PIECE):
        size = (NUM_PROJECTIONS, piece.numel())
        noise = torch.randn(size, generator=generator, device=piece.device)
        exact = piece.double()
        norm += exact.square().sum()
        projections += noise.double() @ exact
    return Digest(float(norm.sqrt()), projections.cpu())


def _peak_bytes(device: Device) -> int:
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated(device.torch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
