"""What two layouts made of one batch, side by side."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_drpo.verify_layout.measure import NUM_PROJECTIONS, Digest, Measured

LEAST_SHARE = 1e-3
"""A tensor's gradient counts as at least this share of the global norm: what is below is made of
terms that cancel, and rounding is as large as those are."""

FARTHER = 5
"""How many times the tolerance single parts may differ by: rounding moves a tensor more than its
norm, and one of many tokens more than most."""

_TOLD = 10


@dataclass(frozen=True)
class Line:
    """One number of both layouts."""

    name: str
    chosen: float
    reference: float
    difference: float
    """Relative; to what, `_EXPLANATION` says."""
    parts: float = 0.0
    """How far what the number is made of differs, likewise: its largest part, or its direction."""

    @property
    def worst(self) -> float:
        """What the tolerance limits; infinite if a number is none."""
        worst = max(self.difference, self.parts / FARTHER)
        return math.inf if math.isnan(self.difference + self.parts) else worst


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
        """What differs by more than the tolerance, the parameters that differ most first."""
        return [line for line in (*self.lines, *self.parameters) if self._is_beyond(line)]

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
            + (f", {line.parts:.2g} in parts" * (line.parts > 0))
            for line in failed[:_TOLD]
        ]
        more = [f"and {len(failed) - _TOLD} more"] if len(failed) > _TOLD else []
        head = (
            f"--verify-layout: {len(failed)} of {len(self.lines) + len(self.parameters)} numbers "
            f"differ by more than --verify-layout-tolerance {self.tolerance:g} allows: the run's "
            "layout does not compute what its reference does"
        )
        return "\n".join([head, *named, *more])

    def to_json(self) -> str:
        """Everything, with `failed` as the names of what is beyond the tolerance; what is no number
        is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(each) for name, each in value.items()}
            if isinstance(value, list):
                return [plain(each) for each in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        told = asdict(self) | {"failed": [line.name for line in self.failed]}
        return json.dumps(plain(told), indent=1) + "\n"

    def __str__(self) -> str:
        beyond = sum(map(self._is_beyond, self.parameters))
        shown = self.parameters[: min(max(_TOLD, beyond), 4 * _TOLD)]
        width = max(len(line.name) for line in (*self.lines, *shown))
        columns = f"{'chosen':>15}  {'reference':>15}  {'difference':>10}  {'in parts':>8}"
        rows = [
            "layouts compared on one batch",
            f"  chosen:    {self.chosen}",
            f"  reference: {self.reference}",
            "",
            f"{'':{width}}  {columns}",
            *(self._row(line, width) for line in self.lines),
            "",
            f"norms of the gradients of {len(self.parameters)} tensors, {beyond} of them beyond "
            f"the tolerance; the {len(shown)} that differ most:",
            *(self._row(line, width) for line in shown),
            "",
            _EXPLANATION.format(tolerance=self.tolerance, farther=FARTHER * self.tolerance),
        ]
        return "\n".join(rows)

    def _row(self, line: Line, width: int) -> str:
        parts = f"{line.parts:.1e}" if line.parts else ""
        return (
            f"{line.name:{width}}  {line.chosen:>15.9g}  {line.reference:>15.9g}  "
            f"{line.difference:>10.1e}  {parts:>8}  {'FAIL' if self._is_beyond(line) else 'ok'}"
        )


_EXPLANATION = """\
Differences are relative and may be {tolerance:g}, those in parts {farther:g}. Of the loss: to what
it would be if no token cancelled another. Of log-probs (shown: their means): the root mean square,
and in parts the largest, of the tokens' differences, each to its log-prob or to 1 nat. Of a
gradient: of its norm, and in parts the distance of both tensors, estimated by random projections,
to the norm or to 0.001 of the global norm."""


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
        norms = line(name, one.norm, other.norm, scale)
        parameters.append(replace(norms, parts=relative(apart, scale)))
    parameters.sort(key=lambda each: (-each.worst, each.name))
    return Report(str(chosen), str(reference), tolerance, lines, parameters)


_ABSENT = Digest(math.nan, torch.full((NUM_PROJECTIONS,), torch.nan, dtype=torch.float64))


def _of_logprobs(name: str, one: Tensor, other: Tensor) -> Line:
    seen = ~(one.isnan() & other.isnan())
    differences = ((one - other).abs() / other.abs().clamp(min=1))[seen]
    typical, worst = differences.square().mean().sqrt(), differences.max()
    return Line(name, float(one.nanmean()), float(other.nanmean()), float(typical), float(worst))
