"""The first step where two runs differ, in which numbers, and by which flags.

    python tools/compare_runs.py RUN_A RUN_B [--tolerance 1e-5]

compares every number that both runs logged (metrics.jsonl), clocks and memory left out, up to the
last step that both have made. Exit status: 0 if the runs are equal, to the last bit or to the
tolerance; 1 if they differ; 2 if one of them cannot be read. docs/debugging.md says what the stage
that differs first tells.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_drpo.checkpoint.resume import MAY_CHANGE
from megatron_drpo.cli import exit_status
from megatron_drpo.config import Config, flag
from megatron_drpo.dashboard import is_measurement
from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.report.run import Run, load

DIFFERENT = 1
"""Exit status where the runs differ."""

_STAGES = {
    "responses": ("response_length/", "finish/", "tokens/", "staleness/", "dynamic_sampling/"),
    "rewards": ("reward/", "advantage/"),
    "packing": ("packing/", "tflop/"),
    "scoring": ("engine_gap/",),
    "training": ("",),
    "weight sync": ("servers/",),
    "evaluation": ("eval/",),
}
"""What a step does, in order, by the beginnings of its numbers' names; the longest one counts."""
_WIDTH = 1000
"""Columns, more than any line has: a terminal folds a long line, a table would cut the digits off
in which two numbers differ."""
_WITHOUT_MEANING = frozenset({"output_dir", "resume", "progress"})
"""Flags that differ between any two runs."""


@dataclass(frozen=True)
class Compare:
    """The first step where two runs differ, in which numbers, and by which flags. Exit status 0:
    they are equal; 1: they differ; 2: one cannot be read."""

    runs: tyro.conf.Positional[tuple[str, str]]
    """The two runs' --output-dir."""
    tolerance: float = 0.0
    """Largest difference that counts as equal, relative to the larger of two numbers; 0 is to the
    last bit."""
    absolute_tolerance: float = 0.0
    """Largest difference that counts as equal whatever the numbers are."""
    ignore: tuple[str, ...] = ()
    """Beginnings of names that are not compared, such as packing/ for runs in two layouts."""
    all: bool = False
    """List all numbers that ever differ, not only those of the first step where some do."""
    json: bool = False
    """Print one JSON object instead."""

    def problems(self) -> list[str]:
        """Values that mean nothing."""
        problems = [
            f"{flag(name)} {getattr(self, name)}: must be 0 or more, and finite"
            for name in ("tolerance", "absolute_tolerance")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if self.json and self.all:
            problems.append("--json: lists all numbers that ever differ; drop --all")
        return problems


@dataclass(frozen=True)
class Difference:
    """A number that two runs do not have in common.

    Example: Difference(name="loss", stage="training", step=4, ours=0.25, theirs=0.26,
                        relative=0.038, largest=0.11, largest_step=6)
    """

    name: str
    stage: str
    step: int
    """The first at which it differs."""
    ours: float | None
    """Then, in the first run; None: not logged."""
    theirs: float | None
    relative: float
    """Then, to the larger of both, 0 to 2; NaN where one of them is no finite number."""
    largest: float
    """Of the relative differences of all steps; NaN where none is a number."""
    largest_step: int


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: 0 if run(words) else DIFFERENT)


def run(argv: Sequence[str]) -> bool:
    """Parse, read, compare, print; whether the runs are equal.

    Raises:
        DrpoError: whatever the user has to mend.
    """
    asked = tyro.cli(
        Compare, args=argv, prog="compare_runs.py", config=(tyro.conf.OmitArgPrefixes,)
    )
    problems = asked.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    ours, theirs = (load(Path(name)) for name in asked.runs)
    steps = sorted(ours.metrics.keys() & theirs.metrics.keys())
    if not steps:
        raise DataError(
            f"{asked.runs[0]} has logged {_steps(ours)}, {asked.runs[1]} {_steps(theirs)}: no step "
            "that both have; give two runs from the same start"
        )
    found = differences(
        ours.metrics,
        theirs.metrics,
        steps,
        relative=asked.tolerance,
        absolute=asked.absolute_tolerance,
        ignore=asked.ignore,
    )
    flags = differing_flags(ours.config, theirs.config)
    if asked.json:
        print(_json(steps, flags, found))
    else:
        _tell(asked, ours, theirs, steps, flags, found)
    return not found


def stage(name: str) -> str:
    """What part of a step a number is of."""
    found = [
        (len(start), each)
        for each, starts in _STAGES.items()
        for start in starts
        if name.startswith(start)
    ]
    return max(found)[1]


def differences(
    ours: Mapping[int, Mapping[str, float]],
    theirs: Mapping[int, Mapping[str, float]],
    steps: Sequence[int],
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
    ignore: Sequence[str] = (),
) -> list[Difference]:
    """The numbers that differ: by first step, then in the order of a step, then by name.

    Args:
        ours, theirs: scalars by step and name; NaN is what was not finite.
        steps: to look at, ascending.
        relative, absolute: a difference is none that is at most `relative` times the larger number,
            or at most `absolute`.
        ignore: beginnings of names to leave out; measurements are left out in any case.
    """
    gaps: dict[str, list[tuple[int, float | None, float | None, float]]] = {}
    for step in steps:
        for name in ours[step].keys() | theirs[step].keys():
            if is_measurement(name) or name.startswith(tuple(ignore)):
                continue
            a, b = ours[step].get(name), theirs[step].get(name)
            if not _alike(a, b, relative, absolute):
                gaps.setdefault(name, []).append((step, a, b, _relative(a, b)))
    found = []
    for name, each in gaps.items():
        worst = max(each, key=lambda gap: -1.0 if math.isnan(gap[3]) else gap[3])
        found.append(Difference(name, stage(name), *each[0], worst[3], worst[0]))
    order = [*_STAGES]
    return sorted(found, key=lambda each: (each.step, order.index(each.stage), each.name))


def _alike(a: float | None, b: float | None, relative: float, absolute: float) -> bool:
    if a is None or b is None:
        return a is b
    both_nan = math.isnan(a) and math.isnan(b)
    return both_nan or math.isclose(a, b, rel_tol=relative, abs_tol=absolute)


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None or not math.isfinite(a - b):
        return math.nan
    return abs(a - b) / max(abs(a), abs(b))


def differing_flags(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[value of the first run, of the second] of each flag that differs, by its field's name.

    A flag that one of the runs did not know yet counts with its default.
    """
    groups = typing.get_type_hints(Config).values()
    defaults = {item.name: item.default for group in groups for item in dataclasses.fields(group)}

    def value(run: Mapping[str, Any], name: str) -> Any:
        found = run.get(name, defaults.get(name))
        return list(found) if isinstance(found, tuple) else found

    names = sorted((ours.keys() | theirs.keys()) - _WITHOUT_MEANING)
    pairs = {name: [value(ours, name), value(theirs, name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _tell(
    asked: Compare,
    ours: Run,
    theirs: Run,
    steps: Sequence[int],
    flags: Mapping[str, list[Any]],
    found: Sequence[Difference],
) -> None:
    """What was found, for people."""
    console = Console(highlight=False, markup=False, width=_WIDTH)
    for letter, name, each in zip("AB", asked.runs, (ours, theirs), strict=True):
        console.print(f"{letter}  {name}: {_steps(each)}", soft_wrap=True)
    learned = {name: pair for name, pair in flags.items() if name not in MAY_CHANGE}
    for title, some in (
        ("flags that differ in what is learned", learned),
        ("flags that differ in where and how it is computed", flags.keys() - learned),
    ):
        if some:
            console.print(f"\n{title}", style="bold")
            for name in sorted(some):
                one, other = flags[name]
                console.print(f"  {flag(name)}: A {_shown(one)}, B {_shown(other)}", soft_wrap=True)
    exact = not asked.tolerance and not asked.absolute_tolerance
    within = "to the last bit" if exact else "within the tolerance"
    console.print()
    if not found:
        console.print(f"equal {within}: steps {steps[0]} to {steps[-1]}", style="bold green")
        return
    first = found[0].step
    before = [step for step in steps if step < first]
    told = f"; equal {within} before" if before else ""
    console.print(f"first difference: step {first}, in {found[0].stage}{told}", style="bold red")
    shown = found if asked.all else [each for each in found if each.step == first]
    console.print(_table(shown))
    if len(shown) < len(found):
        console.print(
            f"{len(found) - len(shown)} more differ from a later step on; --all lists them"
        )


def _table(found: Sequence[Difference]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("step", "stage", "number", "A", "B", "relative", "largest", "at step"):
        right = title not in ("stage", "number")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for each in found:
        cells = [str(each.step), each.stage, each.name, _number(each.ours), _number(each.theirs)]
        cells += [f"{each.relative:.1e}", f"{each.largest:.1e}", str(each.largest_step)]
        table.add_row(*map(Text, cells))
    return table


def _number(value: float | None) -> str:
    """With all digits: two numbers that differ look different."""
    return "not logged" if value is None else repr(value)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _steps(run: Run) -> str:
    return f"steps {min(run.metrics)} to {max(run.metrics)}"


def _json(steps: Sequence[int], flags: Mapping[str, list[Any]], found: Sequence[Difference]) -> str:
    """JSON has no NaN: null."""
    lines = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(each).items()
        }
        for each in found
    ]
    return json.dumps(
        {
            "equal": not found,
            "steps": list(steps),
            "first_step": found[0].step if found else None,
            "flags": flags,
            "differences": lines,
        },
        indent=1,
    )


if __name__ == "__main__":
    sys.exit(main())
