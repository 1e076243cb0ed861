"""What two layouts made of one batch, side by side."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_drpo.verify_layout.measure import NUM_PROJECTIONS, Digest, Measured

LEAST_SHARE = 1e-3
"""A tensor's gradient counts as at least this share of the global norm: what is below is made of
terms that cancel, and rounding is as large as those are."""

FARTHER = 5
"""How many times the tolerance the distance of two gradients may be: rounding, which has no
direction, moves a tensor more than its norm."""

_TOLD = 10


@dataclass(frozen=True)
class Line:
    """One number of both layouts."""

    name: str
    chosen: float
    reference: float
    difference: float
    """Relative; to what, `_EXPLANATION` says."""
    distance: float = 0.0
    """Of two tensors whose norms the numbers are, relative to the norm; an estimate."""

    @property
    def worst(self) -> float:
        """What the tolerance limits; infinite if a number is none."""
        worst = max(self.difference, self.distance / FARTHER)
        return math.inf if math.isnan(self.difference + self.distance) else worst


@dataclass(frozen=True)
class Report:
    """What `--verify-layout` found."""

    chosen: str
    reference: str
    tolerance: float
    lines: list[Line]
    parameters: list[Line]
    """The gradient of each tensor, the one that differs most first."""

    @property
    def failed(self) -> list[Line]:
        """What differs by more than the tolerance, the most first."""
        beyond = [line for line in (*self.lines, *self.parameters) if self._is_beyond(line)]
        return sorted(beyond, key=lambda line: -line.worst)

    def _is_beyond(self, line: Line) -> bool:
        return line.worst > self.tolerance

    @property
    def verdict(self) -> str:
        """What the error says; empty if there is none."""
        failed = self.failed
        if not failed:
            return ""
        named = [
            f"{line.name}: {line.chosen:.9g}, in the reference {line.reference:.9g}: relative "
            f"difference {line.difference:.2g}"
            + (f", distance {line.distance:.2g}" if line in self.parameters else "")
            for line in failed[:_TOLD]
        ]
        more = [f"and {len(failed) - _TOLD} more"] if len(failed) > _TOLD else []
        head = (
            f"--verify-layout: {len(failed)} of {len(self.lines) + len(self.parameters)} numbers "
            f"differ by more than --verify-layout-tolerance {self.tolerance:g} allows: the run's "
            "layout does not compute what its reference does"
        )
        return "\n".join([head, *named, *more])

    def __str__(self) -> str:
        beyond = sum(map(self._is_beyond, self.parameters))
        shown = self.parameters[: min(max(_TOLD, beyond), 4 * _TOLD)]
        width = max(len(line.name) for line in (*self.lines, *shown))
        columns = f"{'chosen':>15}  {'reference':>15}  {'difference':>10}"
        title = (
            f"norms of the gradients of {len(self.parameters)} tensors, {beyond} of them beyond "
            f"the tolerance; the {len(shown)} that differ most:"
        )
        rows = [
            "layouts compared on one batch",
            f"  chosen:    {self.chosen}",
            f"  reference: {self.reference}",
            "",
            f"{'':{width}}  {columns}",
            *(self._row(line, width) for line in self.lines),
            "",
            title,
            f"{'':{width}}  {columns}  {'distance':>10}",
            *(self._row(line, width, f"  {line.distance:>10.1e}") for line in shown),
            "",
            _EXPLANATION.format(tolerance=self.tolerance, farther=FARTHER * self.tolerance),
        ]
        return "\n".join(rows)

    def _row(self, line: Line, width: int, distance: str = "") -> str:
        return (
            f"{line.name:{width}}  {line.chosen:>15.9g}  {line.reference:>15.9g}  "
            f"{line.difference:>10.1e}{distance}  {'FAIL' if self._is_beyond(line) else 'ok'}"
        )


_EXPLANATION = """\
Differences are relative, and may be {tolerance:g}: of the loss, to what it would be if no token
cancelled another; of log-probs (shown: their means), the largest of any token, to its log-prob, at
least 1 nat; of a gradient's norm, to the norm, at least 0.001 of the global one. The distance of
both gradients as tensors, estimated by random projections, may be {farther:g} of that."""


def compare(chosen: Measured, reference: Measured, tolerance: float) -> Report:
    """Both layouts' numbers, side by side."""

    def relative(distance: float, scale: float) -> float:
        return distance / max(scale, sys.float_info.min)

    def line(name: str, one: float, other: float, scale: float) -> Line:
        return Line(name, one, other, relative(abs(one - other), scale))

    norm = reference.grad_norm
    floor = LEAST_SHARE * norm
    count, wanted = chosen.num_tokens, reference.num_tokens
    scale = max(reference.loss_scale, abs(reference.loss))
    lines = [
        Line("tokens with loss", count, wanted, 0.0 if count == wanted else math.inf),
        line("loss", chosen.loss, reference.loss, scale),
        line("global gradient norm", chosen.grad_norm, norm, norm),
        _of_logprobs("log-probs, scored", chosen.scored, reference.scored),
        _of_logprobs("log-probs, trained", chosen.trained, reference.trained),
    ]
    alike = [
        line(f"copies of {name}", low, high, max(high, floor)) for name, low, high in chosen.copies
    ]
    lines += sorted(alike, key=lambda each: -each.worst)[:1]
    parameters = []
    for name in reference.gradients.keys() | chosen.gradients.keys():
        one, other = (each.gradients.get(name, _ABSENT) for each in (chosen, reference))
        apart = float((one.projections - other.projections).square().mean().sqrt())
        scale = max(other.norm, floor)
        parameters.append(
            replace(line(name, one.norm, other.norm, scale), distance=relative(apart, scale))
        )
    parameters.sort(key=lambda each: (-each.worst, each.name))
    return Report(str(chosen), str(reference), tolerance, lines, parameters)


_ABSENT = Digest(math.nan, torch.full((NUM_PROJECTIONS,), torch.nan, dtype=torch.float64))


def _of_logprobs(name: str, one: Tensor, other: Tensor) -> Line:
    seen = ~(one.isnan() & other.isnan())
    difference = (one - other).abs() / other.abs().clamp(min=1)
    worst = float(difference[seen].max())
    return Line(name, float(one.nanmean()), float(other.nanmean()), worst)
