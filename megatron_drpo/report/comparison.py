"""Several runs on one page: their verdicts, the flags that differ, and curves over each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_drpo.config import flag
from megatron_drpo.errors import DataError
from megatron_drpo.report.facts import TIMES, facts
from megatron_drpo.report.page import number, page, picture, row, save, setting
from megatron_drpo.report.plots import STYLE, draw_line, log_scale, new_figure, step_axis
from megatron_drpo.report.run import Run, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4a5568")
"""Of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart by the colour-blind too."""
DASHES = ("-", "--", ":")
_BORDERS = {"-": "solid", "--": "dashed", ":": "dotted"}
_NONE = "&ndash;"


@dataclass(frozen=True)
class Curve:
    """A scalar of all runs over each other; drawn if one of them logged it."""

    title: str
    name: str
    ylabel: str
    caption: str
    band: tuple[str, str] | None = None
    """Scalars that bound a shaded band around it."""
    log: bool = False
    by_time: bool = False
    """Over the minutes since the start of the run, instead of steps."""

    def draw(self, runs: Sequence[Run]) -> Figure | None:
        """None where no run has it."""
        values = [value for run in runs for value in run.finite(self.name)]
        if not values:
            return None
        figure, (ax,) = new_figure()
        for number_of_run, run in enumerate(runs):
            if not run.finite(self.name):
                continue
            color, dashes = _pen(number_of_run)
            steps, y = run.series(self.name)
            minutes = _minutes(run)
            draw_line(ax, [minutes[s] for s in steps] if self.by_time else steps, y, color, dashes)
            if self.band and all(run.finite(name) for name in self.band):
                (steps, low), (_, high) = map(run.series, self.band)
                ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        ax.set_ylabel(self.ylabel)
        if self.log and max(values) > 0:
            log_scale(ax, values)
        if self.by_time:
            ax.set_xlabel("minutes")
        else:
            step_axis(ax)
        return figure


CURVES = (
    Curve(
        "Held-out reward",
        "eval/avg",
        "mean over prompts",
        "On prompts that are never trained on: the number to compare runs by.",
    ),
    Curve(
        "Held-out reward by time",
        "eval/avg",
        "mean over prompts",
        "The same over the minutes that steps, evaluations and checkpoints took.",
        by_time=True,
    ),
    Curve(
        "Reward",
        "reward/mean",
        "mean reward",
        "Of the sampled responses, before each step's updates.",
    ),
    Curve(
        "Gradient weight",
        "weight/mean",
        "gradient weight w",
        "Mean, and band from p01 to p99: where an objective clips or masks, the band reaches 0.",
        band=("weight/p01", "weight/p99"),
    ),
    Curve(
        "Effective sample size",
        "ratio/effective_sample_size",
        "share",
        "Of the ratios pi / mu: a fall means that few tokens carry the gradient.",
    ),
    Curve("Largest ratio", "ratio/max", "pi / mu", "Of all tokens of a step.", log=True),
    Curve(
        "Divergence from the behaviour policy",
        "divergence/binary_tv",
        "mean |pi - mu|",
        "What the updates of a step amount to.",
        log=True,
    ),
    Curve(
        "Drift within a step",
        "drift/mean_abs",
        "nats per token",
        "How far the updates on one batch carry the policy, by the trainer's own log-probs.",
        log=True,
    ),
    Curve(
        "Engine gap",
        "engine_gap/mean_abs",
        "nats per token",
        "|log pi - log mu| of a fresh batch: rounding only, if all is well.",
        log=True,
    ),
    Curve("Entropy", "entropy/mean", "nats per token", "Of the policy at the sampled tokens."),
    Curve("Gradient norm", "grad_norm", "norm", "Before clipping.", log=True),
    Curve(
        "Groups without a difference",
        "reward/groups_all_equal",
        "share",
        "Groups whose rewards are all equal, which give no gradient.",
    ),
    Curve("Response length", "response_length/mean", "tokens", "Mean over responses."),
    Curve(
        "Cut-off responses",
        "finish/length_share",
        "share",
        "Responses that reached the limit before they ended.",
    ),
    Curve("Time per step", "time/step", "seconds", "Without evaluations and checkpoints."),
    Curve("Memory", "memory/train", "GiB", "Of the fullest rank in the updates."),
)


def _pen(number_of_run: int) -> tuple[str, str]:
    """Colour and dashes of a run's curves."""
    round_, place = divmod(number_of_run, len(COLORS))
    return COLORS[place], DASHES[round_ % len(DASHES)]


def _minutes(run: Run) -> dict[int, float]:
    """By step, since the start of the run."""
    seconds, minutes = 0.0, {}
    for step, line in run.metrics.items():
        times = [line.get(name, 0.0) for name in TIMES]
        seconds += sum(each for each in times if math.isfinite(each))
        minutes[step] = seconds / 60
    return minutes


def names(run_dirs: Sequence[Path]) -> list[str]:
    """What to call the runs: of each path the shortest end that no other has.

    Raises:
        DataError: a run is given twice.
    """
    parts = [path.resolve().parts for path in run_dirs]
    twice = [path for path, count in Counter(parts).items() if count > 1]
    if twice:
        raise DataError(f"{Path(*twice[0])}: given twice; name each run once")
    return [_name(path, [other for other in parts if other != path]) for path in parts]


def _name(path: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    lengths = range(1, len(path) + 1)
    ends = (path[-n:] for n in lengths if all(path[-n:] != other[-n:] for other in others))
    return "/".join(next(ends))


def _heads(labels: Sequence[str]) -> list[str]:
    """The runs' names, each with a piece of its line."""
    heads = []
    for number_of_run, label in enumerate(labels):
        color, dashes = _pen(number_of_run)
        style = f"border-top: 3px {_BORDERS[dashes]} {color}"
        heads.append(f'<i class="pen" style="{style}"></i>{escape(label)}')
    return heads


def _verdicts(runs: Sequence[Run], heads: Sequence[str]) -> str:
    told = [{fact.label: fact for fact in facts(run)} for run in runs]
    labels = {label: None for each in told for label in each}
    rows = [row(["", *heads], "th")]
    for label in labels:
        cells = [escape(label)]
        for each in told:
            fact = each.get(label)
            shown = fact and f"{escape(fact.value)}<small>{escape(fact.remark)}</small>"
            cells.append(shown or _NONE)
        rows.append(row(cells))
    return f'<table class="verdicts">{"".join(rows)}</table>'


def _flags(runs: Sequence[Run], heads: Sequence[str]) -> str:
    """The flags that are not alike in all runs, the output directory apart."""
    fields = {field: None for run in runs for field in run.config if field != "output_dir"}
    rows = [row(["", *heads], "th")]
    for field in fields:
        cells = [
            escape(setting(run.config[field])) if field in run.config else _NONE for run in runs
        ]
        if len(set(cells)) > 1:
            rows.append(row([escape(flag(field)), *cells]))
    if len(rows) == 1:
        return "<p>All flags are the same.</p>"
    return f"<table>{''.join(rows)}</table>"


def _numbers(runs: Sequence[Run], heads: Sequence[str]) -> str:
    rows = [row(["", *heads], "th")]
    for name in sorted({name for run in runs for name in run.names()}):
        last = [(run.series(name)[1] or [None])[-1] for run in runs]
        rows.append(row([escape(name), *(_NONE if v is None else number(v) for v in last)]))
    return f'<table class="numbers">{"".join(rows)}</table>'


def render(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """The whole page.

    Args:
        labels: what to call each run.
    """
    from matplotlib import rc_context

    heads, plots = _heads(labels), []
    with rc_context(STYLE):
        for curve in CURVES:
            figure = curve.draw(runs)
            if figure is not None:
                plots.append(picture(curve.title, curve.caption, figure))
    key = "".join(f"<span>{head}</span>" for head in heads)
    curves = f'<p class="key">{key}</p><div class="grid plots">{"".join(plots)}</div>'
    title = f"{len(runs)} runs compared"
    return page(
        title,
        [
            f'<h1>{title}</h1><p class="subtitle">{escape(", ".join(labels))}</p>',
            _verdicts(runs, heads),
            f"<h2>Flags that differ</h2>{_flags(runs, heads)}",
            f"<section><h2>Curves</h2>{curves}</section>" if plots else "",
            f"<h2>Last metrics</h2>{_numbers(runs, heads)}",
        ],
    )


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page about several runs; an earlier one is replaced.

    Args:
        run_dirs: at least two, all different.
        out: the file.

    Returns:
        `out`.

    Raises:
        DataError: a run is given twice, or its metrics.jsonl or config.json is missing, empty or
            damaged, or the page cannot be written; names the file.
    """
    labels = names(run_dirs)
    return save(out, render([load(path) for path in run_dirs], labels))
