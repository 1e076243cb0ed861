"""Pictures of one run, and the pieces that pictures are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_drpo.metrics import MU_BUCKETS
from megatron_drpo.report.page import number, picture
from megatron_drpo.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#2b6cb0", "#c05621", "#2f855a"
RED, PURPLE, GREY = "#c53030", "#6b46c1", "#718096"
PHASES = {
    "generate": BLUE,
    "reward": GREEN,
    "score": PURPLE,
    "train": ORANGE,
    "sync": GREY,
    "checkpoint": "#b7791f",
    "evaluate": "#0f9ba8",
}
_WIDTH = 4.9
"""Inches of a picture in one of the two columns."""


@dataclass(frozen=True)
class Line:
    """One scalar over steps."""

    name: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis; drawn only if at least one of them was logged."""

    ylabel: str
    lines: tuple[Line, ...]
    log: bool = False
    share: bool = False
    """Values are shares: the axis runs from 0 to 1, unless a user's reward says otherwise."""
    reference: float | None = None
    """A value worth a horizontal line."""
    scientific: bool = False

    def logged(self, run: Run) -> list[Line]:
        return [line for line in self.lines if run.finite(line.name)]

    def draw(self, ax: Axes, run: Run) -> None:
        lines, values = self.logged(run), []
        for line in lines:
            steps, y = run.series(line.name)
            draw_line(ax, steps, y, line.color, line.style, line.label)
            values += run.finite(line.name)
        if self.reference is not None:
            ax.axhline(self.reference, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.set_ylabel(self.ylabel)
        if self.share and min(values) >= 0 and max(values) <= 1:
            ax.set_ylim(-0.03, 1.03)
        if self.log and max(values) > 0:
            log_scale(ax, values)
        if self.scientific:
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        if len(lines) > 1:
            legend(ax)


@dataclass(frozen=True)
class Plot:
    """A picture of the report, its panels one above the other over the same steps."""

    title: str
    caption: str
    panels: tuple[Panel, ...]

    def draw(self, run: Run) -> Figure | None:
        panels = [panel for panel in self.panels if panel.logged(run)]
        if not panels:
            return None
        figure, axes = new_figure(len(panels))
        for panel, ax in zip(panels, axes, strict=True):
            panel.draw(ax, run)
        step_axis(axes[-1])
        return figure


@dataclass(frozen=True)
class Drawing:
    """A picture that is not just lines; `draw` returns None where the run lacks the series."""

    title: str
    caption: str
    draw: Callable[[Run], Figure | None]
    wide: bool = False
    """Takes both columns."""


def new_figure(num_panels: int = 1, width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.0), layout="constrained")
    ratios = [2.0] + [1.2] * (num_panels - 1)
    axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    return figure, list(axes)


def step_axis(ax: Axes) -> None:
    """Whole steps below."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("step")


def legend(ax: Axes) -> None:
    """Above the axes, where it hides nothing; in two rows where one would be too long."""
    count = len(ax.get_legend_handles_labels()[1])
    figure = ax.get_figure(root=True)
    assert figure is not None
    narrow = figure.get_figwidth() < 2 * _WIDTH
    columns = math.ceil(count / 2) if narrow and count > 5 else count
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Logarithmic y, with room for exact zeros, which must be seen where they occur."""
    from matplotlib.ticker import LogFormatter

    if min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    else:
        ax.set_yscale("symlog", linthresh=min(v for v in values if v > 0))


def draw_line(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    color: str,
    dashes: str = "-",
    label: str | None = None,
) -> None:
    """A curve, with its points where they are few."""
    marker = "o" if len(x) <= 30 else None
    ax.plot(x, y, color=color, label=label, linestyle=dashes, marker=marker)


def _draw_weight(run: Run) -> Figure | None:
    names = ("weight/p01", "weight/p99", "weight/p50", "weight/mean")
    if not all(run.finite(name) for name in names):
        return None
    figure, (ax,) = new_figure()
    (steps, low), (_, high), (_, median), (_, mean) = map(run.series, names)
    ax.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="p01 to p99")
    draw_line(ax, steps, median, GREEN, "--", "median")
    draw_line(ax, steps, mean, BLUE, label="mean")
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_ylabel("gradient weight w")
    step_axis(ax)
    legend(ax)
    return figure


def _draw_objective(run: Run) -> Figure | None:
    lines = [
        Line(name, name.removeprefix("objective/").replace("_", " "), color)
        for name, color in zip(
            run.names("objective/"), itertools.cycle(_BUCKET_COLORS), strict=False
        )
        if run.finite(name)
    ]
    if not lines:
        return None
    figure, (ax,) = new_figure()
    Panel("mean over tokens", tuple(lines)).draw(ax, run)
    step_axis(ax)
    legend(ax)
    return figure


def _draw_histogram(name: str, xlabel: str) -> Callable[[Run], Figure | None]:
    """The distribution at the first and at the last step that has one."""

    def draw(run: Run) -> Figure | None:
        steps = [step for step, line in run.histograms.items() if name in line]
        if not steps:
            return None
        figure, (ax,) = new_figure()
        for step, color, filled in ((steps[0], GREY, False), (steps[-1], BLUE, True)):
            h, label = run.histograms[step][name], f"step {step}"
            if h.low == h.high:
                ax.axvline(h.low, color=color, label=f"{label} (all {number(h.low)})")
                continue
            # Shares per unit of x, as the bins of the two differ in width.
            unit = sum(h.counts) * (h.high - h.low) / len(h.counts)
            ax.stairs(
                [count / unit for count in h.counts],
                h.edges,
                fill=filled,
                color=color,
                alpha=0.75 if filled else 1.0,
                label=f"{label} ({number(h.min)} to {number(h.max)})",
            )
            # One tall bin, such as the tokens that hardly moved, would hide all others.
            if max(h.counts) > 50 * max(1, sorted(h.counts)[len(h.counts) // 2]):
                ax.set_yscale("log")
            if steps[0] == steps[-1]:
                break
        ax.set_xlabel(xlabel)
        ax.set_ylabel("density")
        legend(ax)
        return figure

    return draw


def _draw_time(run: Run) -> Figure | None:
    phases = [p for p in PHASES if run.finite(f"time/{p}")]
    if not phases:
        return None
    figure, (ax, *rest) = new_figure(1 + bool(_SPEED.logged(run)), width=2.06 * _WIDTH)
    steps = [s for s, line in run.metrics.items() if any(f"time/{p}" in line for p in phases)]
    seconds = [
        [_finite_or_zero(run.metrics[s].get(f"time/{p}", 0.0)) for s in steps] for p in phases
    ]
    colors = [PHASES[p] for p in phases]
    if len(steps) <= 150:
        base = [0.0] * len(steps)
        for phase, color, values in zip(phases, colors, seconds, strict=True):
            ax.bar(steps, values, bottom=base, width=0.9, color=color, label=phase)
            base = [b + v for b, v in zip(base, values, strict=True)]
    else:  # thousands of bars take a minute to draw
        ax.stackplot(steps, seconds, colors=colors, labels=phases, step="mid", linewidth=0)
    ax.set_ylabel("seconds")
    legend(ax)
    if rest:
        _SPEED.draw(rest[0], run)
    step_axis((rest or [ax])[-1])
    return figure


def _finite_or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


_SPEED = Panel(
    "tokens / s",
    (
        Line("tokens_per_second/generate", "generate", BLUE),
        Line("tokens_per_second/train", "train", ORANGE),
        Line("tokens_per_second", "whole step", GREY, "--"),
    ),
)

_BUCKET_COLORS = ("#1a365d", "#2b6cb0", "#63b3ed", "#dd6b20", "#9c4221")

PLOTS: tuple[Plot | Drawing, ...] = (
    Plot(
        "Reward",
        "Mean reward of the sampled responses, before each step's updates; it should rise. Groups "
        "whose rewards are all equal give no gradient: near 1, the prompts are too easy or too "
        "hard.",
        (
            Panel("mean reward", (Line("reward/mean", "mean", BLUE),)),
            Panel("equal groups", (Line("reward/groups_all_equal", "share", GREY),), share=True),
        ),
    ),
    Plot(
        "Held-out accuracy",
        "On the evaluation prompts, which are never trained on: the number that counts. If reward "
        "rises and this does not, the policy learns the training prompts or the reward's gaps.",
        (
            Panel(
                "accuracy",
                (
                    Line("eval/avg", "avg@k", BLUE),
                    Line("eval/pass", "pass@k", GREEN, "--"),
                ),
                share=True,
            ),
        ),
    ),
    Drawing(
        "Gradient weight",
        "The objective's factor on each token's policy gradient: 1 leaves it alone, 0 clips or "
        "masks it; under DRPO, below 1 damps a token that moves away from the behaviour policy and "
        "above 1 speeds up its return. A band that keeps widening says that updates are too large "
        "for the trust region.",
        _draw_weight,
    ),
    Drawing(
        "Gradient weight, distribution",
        "The same over all tokens of the first and the last step; the outermost bins of a "
        "distribution also hold its tails. Weights below 0 push a token back.",
        _draw_histogram("weight", "gradient weight w"),
    ),
    Drawing(
        "What the objective does",
        "Means over all tokens of what the objective says of each: shares of clipped or masked "
        "tokens, penalties, divergences from the reference model.",
        _draw_objective,
    ),
    Plot(
        "Importance ratio",
        "pi / mu per token. A growing maximum alone is a few rare tokens; a falling effective "
        "sample size means that few tokens carry the gradient.",
        (
            Panel(
                "ratio",
                (
                    Line("ratio/max", "max", ORANGE),
                    Line("ratio/p99", "p99", BLUE),
                    Line("ratio/mean", "mean", GREY, "--"),
                ),
                log=True,
                reference=1.0,
            ),
            Panel(
                "eff. sample",
                (Line("ratio/effective_sample_size", "share", GREEN),),
                reference=1.0,
            ),
        ),
    ),
    Drawing(
        "Importance ratio, distribution",
        "Over all tokens of the first and the last step, around 1.",
        _draw_histogram("ratio", "pi / mu"),
    ),
    Plot(
        "Divergence from the behaviour policy",
        "Within a step, by its updates: total variation and KL of the sampled id against all "
        "others, and the k3 estimate of the full KL. Steady is good; growth over the run is not.",
        (
            Panel(
                "per token",
                (
                    Line("divergence/binary_tv", "TV (binary)", BLUE),
                    Line("divergence/binary_kl", "KL (binary)", ORANGE),
                    Line("divergence/k3", "KL (k3)", GREEN, "--"),
                ),
                log=True,
            ),
        ),
    ),
    Plot(
        "Divergence by probability of the token",
        "Mean total variation of the tokens with that behaviour probability mu. Rare tokens have "
        "large ratios and yet hardly any divergence: the reason to bound the latter.",
        (
            Panel(
                "mean |pi - mu|",
                tuple(
                    Line(f"divergence/tv_mu_{name}", label, color)
                    for (name, color, label) in zip(
                        MU_BUCKETS,
                        _BUCKET_COLORS,
                        ("mu < 1e-4", "< 1e-3", "< 1e-2", "< 0.1", "up to 1"),
                        strict=True,
                    )
                ),
                log=True,
            ),
        ),
    ),
    Plot(
        "Engine gap",
        "|log pi - log mu| of a fresh batch, where generator and trainer hold the same weights: "
        "rounding only. Growth means that they no longer compute the same policy, the usual "
        "beginning of a collapse.",
        (
            Panel(
                "nats per token",
                (
                    Line("engine_gap/max_abs", "max", ORANGE),
                    Line("engine_gap/mean_abs", "mean", BLUE),
                ),
                log=True,
            ),
            Panel("equal tokens", (Line("engine_gap/exact_share", "share", GREEN),), share=True),
        ),
    ),
    Plot(
        "Drift within a step",
        "|log pi - log pi before the step's first update|, both by the trainer, so without the "
        "engine gap: how far the updates on one batch carry the policy. The first update sees 0.",
        (
            Panel(
                "nats per token",
                (
                    Line("drift/max_abs", "max", ORANGE),
                    Line("drift/mean_abs", "mean", BLUE),
                    Line("drift/k3", "KL (k3)", GREEN, "--"),
                ),
                log=True,
            ),
        ),
    ),
    Plot(
        "Gradient norm and learning rate",
        "Norm before clipping. Spikes should be rare; a gap is a norm that was not finite, whose "
        "update was skipped.",
        (
            Panel("gradient norm", (Line("grad_norm", "norm", BLUE),)),
            Panel("lr", (Line("lr", "lr", GREY),), scientific=True),
        ),
    ),
    Plot(
        "Entropy",
        "Mean entropy of the policy at the sampled tokens. A slow fall is learning; a fall to zero "
        "ends exploration, a rise without reward is noise.",
        (Panel("nats per token", (Line("entropy/mean", "mean", BLUE),)),),
    ),
    Drawing(
        "Entropy, distribution",
        "Many tokens near 0 are decided; learning happens at the few that are not.",
        _draw_histogram("entropy", "nats"),
    ),
    Plot(
        "Response length",
        "Tokens per response, and the share cut off at the limit. A cut-off answer is usually "
        "worth nothing: if the share grows, the limit is too tight or the policy rambles.",
        (
            Panel(
                "tokens",
                (
                    Line("response_length/max", "max", GREY, ":"),
                    Line("response_length/p99", "p99", ORANGE),
                    Line("response_length/mean", "mean", BLUE),
                    Line("eval/response_length", "evaluation", GREEN, "--"),
                ),
            ),
            Panel("truncated", (Line("finish/length_share", "share", RED),), share=True),
        ),
    ),
    Drawing(
        "Response length, distribution",
        "A pile at the right end is responses that hit the limit.",
        _draw_histogram("response_length", "tokens"),
    ),
    Drawing(
        "Time per step and speed",
        "Where the seconds go, and tokens per second over all ranks.",
        _draw_time,
        wide=True,
    ),
    Plot(
        "Memory",
        "GiB of the fullest rank in each phase: on a GPU the most that its tensors took, on a CPU "
        "what the process held at its end, which its allocator gives back late or never. A rise "
        "that does not level off is a leak.",
        (
            Panel(
                "GiB",
                tuple(Line(f"memory/{phase}", phase, color) for phase, color in PHASES.items()),
            ),
        ),
    ),
)

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#a0aec0",
    "axes.labelcolor": "#2d3748",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf2f7",
    "xtick.color": "#4a5568",
    "ytick.color": "#4a5568",
    "lines.linewidth": 1.4,
    "lines.markersize": 2.8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
}


def pictures(run: Run) -> str:
    """Every picture that the run has the series for, as HTML."""
    from matplotlib import rc_context

    found = []
    with rc_context(STYLE):
        for plot in PLOTS:
            figure = plot.draw(run)
            if figure is not None:
                wide = isinstance(plot, Drawing) and plot.wide
                found.append(picture(plot.title, plot.caption, figure, wide=wide))
    return "".join(found)
