"""The report of a run: one HTML file with its numbers, pictures and configuration.

Layer 3, and apart from the trainer: it reads what a run wrote (config.json, metrics.jsonl and,
where they exist, histograms.jsonl, samples.jsonl and summary.json) and writes report.html beside
them. The file is complete in itself: pictures are embedded, nothing is fetched from anywhere. A
series that the run did not log leaves its plot out.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_drpo.config import flag
from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import DataError
from megatron_drpo.metrics import MU_BUCKETS, Histogram, read_jsonl

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
    "checkpoint": "#b7791f",
    "evaluate": "#0f9ba8",
}
NUM_SAMPLES = 3
"""Samples shown at each end of the reward."""
MAX_TEXT = 1500
"""Characters of a prompt or response that are shown."""


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    name: str
    config: dict[str, Any]
    """Flat: field name to value."""
    metrics: dict[int, dict[str, float]]
    """Scalars by step, ascending; NaN where the log says null."""
    histograms: dict[int, dict[str, Histogram]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    """Written at the end of a run: `device`, `layout`, `wall_seconds`, `steps`; any other field is
    shown as it is."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a scalar was logged, and its values."""
        pairs = [(step, line[name]) for step, line in self.metrics.items() if name in line]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def finite(self, name: str) -> list[float]:
        return [value for value in self.series(name)[1] if math.isfinite(value)]


def load(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: metrics.jsonl or config.json is missing, empty or damaged; names the file.
    """
    metrics: dict[int, dict[str, float]] = {}
    for record in _lines(run_dir / "metrics.jsonl"):
        line = metrics.setdefault(record.pop("step"), {})
        line.update({k: math.nan if v is None else float(v) for k, v in record.items()})
    if not metrics:
        path = run_dir / "metrics.jsonl"
        what = "holds no complete line" if path.exists() else "does not exist"
        raise DataError(f"{path}: {what}; give the --output-dir of a run that has made a step")
    histograms: dict[int, dict[str, Histogram]] = {}
    for record in _lines(run_dir / "histograms.jsonl"):
        step = histograms.setdefault(record.pop("step"), {})
        step.update({name: Histogram(**h) for name, h in record.items()})
    return Run(
        name=run_dir.resolve().name,
        config=_object(run_dir / "config.json"),
        metrics=dict(sorted(metrics.items())),
        histograms=dict(sorted(histograms.items())),
        samples=_lines(run_dir / "samples.jsonl"),
        summary=_object(run_dir / "summary.json", required=False),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def _object(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not path.exists():
        if required:
            raise DataError(f"{path}: does not exist; give the --output-dir of a run")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# --- plots


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
            _plot(ax, steps, y, line)
            values += run.finite(line.name)
        if self.reference is not None:
            ax.axhline(self.reference, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        ax.set_ylabel(self.ylabel)
        if self.share and min(values) >= 0 and max(values) <= 1:
            ax.set_ylim(-0.03, 1.03)
        if self.log and max(values) > 0:
            _log_scale(ax, values)
        if self.scientific:
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        if len(lines) > 1:
            _legend(ax)


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
        figure, axes = _figure(len(panels))
        for panel, ax in zip(panels, axes, strict=True):
            panel.draw(ax, run)
        _step_axis(axes[-1])
        return figure


@dataclass(frozen=True)
class Drawing:
    """A picture that is not just lines; `draw` returns None where the run lacks the series."""

    title: str
    caption: str
    draw: Callable[[Run], Figure | None]
    wide: bool = False
    """Takes both columns."""


def _figure(num_panels: int = 1, width: float = 4.9) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.0), layout="constrained")
    ratios = [2.0] + [1.2] * (num_panels - 1)
    axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    return figure, list(axes)


def _step_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("step")


def _legend(ax: Axes) -> None:
    """Above the axes, where it hides nothing."""
    count = len(ax.get_legend_handles_labels()[1])
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=count)


def _log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Logarithmic y, with room for exact zeros, which must be seen where they occur."""
    from matplotlib.ticker import LogFormatter

    if min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    else:
        ax.set_yscale("symlog", linthresh=min(v for v in values if v > 0))


def _plot(ax: Axes, steps: Sequence[int], values: Sequence[float], line: Line) -> None:
    marker = "o" if len(steps) <= 30 else None
    ax.plot(
        steps,
        values,
        color=line.color,
        label=line.label,
        linestyle=line.style,
        marker=marker,
    )


def _draw_weight(run: Run) -> Figure | None:
    names = ("weight/p01", "weight/p99", "weight/p50", "weight/mean")
    if not all(run.finite(name) for name in names):
        return None
    figure, (ax,) = _figure()
    (steps, low), (_, high), (_, median), (_, mean) = map(run.series, names)
    ax.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0, label="p01 to p99")
    _plot(ax, steps, median, Line("", "median", GREEN, "--"))
    _plot(ax, steps, mean, Line("", "mean", BLUE))
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ax.set_ylabel("gradient weight w")
    _step_axis(ax)
    _legend(ax)
    return figure


def _draw_objective(run: Run) -> Figure | None:
    names = sorted({n for line in run.metrics.values() for n in line if n.startswith("objective/")})
    lines = [
        Line(name, name.removeprefix("objective/").replace("_", " "), color)
        for name, color in zip(names, itertools.cycle(_BUCKET_COLORS), strict=False)
        if run.finite(name)
    ]
    if not lines:
        return None
    figure, (ax,) = _figure()
    Panel("mean over tokens", tuple(lines)).draw(ax, run)
    _step_axis(ax)
    _legend(ax)
    return figure


def _draw_histogram(name: str, xlabel: str) -> Callable[[Run], Figure | None]:
    """The distribution at the first and at the last step that has one."""

    def draw(run: Run) -> Figure | None:
        steps = [step for step, line in run.histograms.items() if name in line]
        if not steps:
            return None
        figure, (ax,) = _figure()
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
        _legend(ax)
        return figure

    return draw


def _draw_time(run: Run) -> Figure | None:
    phases = [p for p in PHASES if run.finite(f"time/{p}")]
    if not phases:
        return None
    figure, (ax, *rest) = _figure(1 + bool(_SPEED.logged(run)), width=10.1)
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
    _legend(ax)
    if rest:
        _SPEED.draw(rest[0], run)
    _step_axis((rest or [ax])[-1])
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
)

_RC: dict[Any, Any] = {
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


def _picture(plot: Plot | Drawing, run: Run) -> str:
    """A <figure>, or nothing where the run lacks the series."""
    from matplotlib import rc_context

    with rc_context(_RC):
        figure = plot.draw(run)
        if figure is None:
            return ""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=170, metadata={"Software": None})
    wide = ' class="wide"' if isinstance(plot, Drawing) and plot.wide else ""
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return (
        f"<figure{wide}>"
        f'<h3>{escape(plot.title)}</h3><img alt="{escape(plot.title)}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


# --- text


def number(value: float) -> str:
    """Four significant digits, integers in full."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def wall_time(run: Run) -> float | None:
    """Seconds, from the summary, else the sum of the logged steps."""
    if "wall_seconds" in run.summary:
        return float(run.summary["wall_seconds"])
    times = run.finite("time/step")
    return sum(times) if times else None


def tokens_per_second(run: Run) -> float | None:
    """All tokens over all seconds: each step's speed weighted by its time."""
    tokens = seconds = 0.0
    for line in run.metrics.values():
        speed, step = line.get("tokens_per_second"), line.get("time/step")
        if speed is not None and step is not None and math.isfinite(speed * step):
            tokens, seconds = tokens + speed * step, seconds + step
    return tokens / seconds if seconds else None


def layout(run: Run) -> str:
    """Such as `cpu, 2 rank(s): TP 2, PP 1, DP 1`; what the flags say while the run goes on."""
    config = run.config
    flags = (
        f"TP {config.get('tensor_model_parallel_size', 1)}, "
        f"PP {config.get('pipeline_model_parallel_size', 1)}"
    )
    device = run.summary.get("device", config.get("device", "auto"))
    return f"{device}, {run.summary.get('layout', flags)}"


def _facts(run: Run) -> Iterator[tuple[str, str, str]]:
    """The verdict as (label, value, remark)."""
    steps, accuracy = run.series("eval/avg")
    evaluated = [(s, a) for s, a in zip(steps, accuracy, strict=True) if math.isfinite(a)]
    if evaluated:
        (_, before), (last_step, after) = evaluated[0], evaluated[-1]
        best_step, best = max(evaluated, key=lambda pair: pair[1])
        avg = f"avg@{run.config.get('eval_samples_per_prompt', 1)}"
        # A user's reward need not be a share of right answers.
        if all(0 <= a <= 1 for _, a in evaluated):
            what, show, gain = "accuracy", _percent, f"{100 * (after - before):+.1f} points"
        else:
            what, show, gain = "reward", number, f"{after - before:+.4g}"
        if len(evaluated) == 1:
            yield f"Held-out {what}", show(after), f"{avg}, step {last_step}"
        else:
            yield f"Held-out {what}", f"{show(before)} &rarr; {show(after)}", f"{avg}, {gain}"
            yield f"Best {what}", show(best), f"at step {best_step}"
    steps, rewards = run.series("reward/mean")
    if rewards:
        value = f"{number(rewards[0])} &rarr; {number(rewards[-1])}"
        yield "Reward", value, f"step {steps[0]} to step {steps[-1]}"
        planned = run.config.get("train_iters")
        yield "Steps", str(len(steps)), f"of {planned}" if planned else ""
    seconds = wall_time(run)
    if seconds is not None:
        yield "Wall time", _duration(seconds), ""
    speed = tokens_per_second(run)
    if speed is not None:
        yield "Tokens per second", f"{speed:,.0f}", "whole step, all ranks"
    yield "Device and layout", escape(layout(run)), ""


def _verdict(run: Run) -> str:
    return "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{escape(remark)}</small></dd></div>"
        for label, value, remark in _facts(run)
    )


def _metrics_table(run: Run) -> str:
    names = sorted({name for line in run.metrics.values() for name in line})
    rows = []
    for name in names:
        steps, values = run.series(name)
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{number(values[0])}</td>"
            f"<td><b>{number(values[-1])}</b></td><td>{steps[-1]}</td></tr>"
        )
    half = (len(rows) + 1) // 2
    head = "<tr><th>metric</th><th>first</th><th>last</th><th>at step</th></tr>"
    tables = [
        f"<table>{head}{''.join(part)}</table>" for part in (rows[:half], rows[half:]) if part
    ]
    return f'<div class="grid numbers">{"".join(tables)}</div>'


def _settings_table(settings: dict[str, Any], name: Callable[[str], str]) -> str:
    rows = [
        f"<tr><td>{escape(name(key))}</td><td>{escape(_setting(value))}</td></tr>"
        for key, value in settings.items()
    ]
    half = (len(rows) + 1) // 2
    tables = [f"<table>{''.join(part)}</table>" for part in (rows[:half], rows[half:]) if part]
    return f'<div class="grid settings">{"".join(tables)}</div>'


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT} more characters]"


def _samples(run: Run) -> str:
    """The worst and the best of the last step that has samples."""
    last = max((s["step"] for s in run.samples), default=None)
    ranked = sorted(
        (s for s in run.samples if s["step"] == last and s.get("reward") is not None),
        key=lambda s: s["reward"],
    )
    if not ranked:
        return ""
    best = _one_per_prompt(reversed(ranked))
    worst = _one_per_prompt(s for s in ranked if s["reward"] < best[-1]["reward"])
    columns = []
    for title, samples in (("Best", best), ("Worst", worst)):
        column = ""
        for s in samples:
            answer = s.get("answer")
            expected = "" if answer is None else f", answer {escape(_clip(str(answer)))}"
            column += (
                f'<div class="sample"><b>{title}: reward {number(s["reward"])}</b>{expected}'
                f"<pre>{escape(_clip(str(s.get('prompt', ''))))}"
                f"<mark>{escape(_clip(str(s.get('response', ''))))}</mark></pre></div>"
            )
        columns.append(f"<div>{column}</div>")
    return f'<h2>Samples of step {last}</h2><div class="grid">{"".join(columns)}</div>'


def _one_per_prompt(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first NUM_SAMPLES, no prompt twice."""
    chosen: dict[str, dict[str, Any]] = {}
    for s in samples:
        chosen.setdefault(str(s.get("prompt")), s)
    return list(chosen.values())[:NUM_SAMPLES]


_STYLE = """
body { margin: 0; background: #f7fafc; color: #1a202c; line-height: 1.45;
  font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0; }
h2 { font-size: 18px; margin: 38px 0 12px; }
h3 { font-size: 14px; margin: 0 0 4px; }
.subtitle { color: #4a5568; margin: 2px 0 18px; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 1px; margin: 0; background: #e2e8f0;
  border: 1px solid #e2e8f0; border-radius: 6px; overflow: hidden; }
dl div { background: #fff; padding: 10px 14px; flex: 1 1 auto; }
dt { font-size: 12px; color: #4a5568; }
dd { margin: 1px 0 0; font-size: 18px; font-weight: 600; }
small { display: block; font-size: 12px; font-weight: 400; color: #4a5568; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  align-items: start; }
.plots { align-items: stretch; }
figure { margin: 0; padding: 12px 14px; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 6px; }
figure img { width: 100%; display: block; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 12.5px; color: #4a5568; margin-top: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; background: #fff;
  border: 1px solid #e2e8f0; }
td, th { padding: 3px 9px; border-bottom: 1px solid #edf2f7; text-align: left;
  overflow-wrap: anywhere; vertical-align: top; }
th { color: #4a5568; font-weight: 600; }
td:first-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td:first-child { white-space: nowrap; width: 1%; }
.sample { margin: 0 0 12px; padding: 9px 14px; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 6px; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 5px 0 0; font-size: 12.5px;
  font-family: ui-monospace, Menlo, Consolas, monospace; }
mark { background: #ebf4ff; color: inherit; }
@media (max-width: 700px) { .grid { grid-template-columns: minmax(0, 1fr); } }
"""


def render(run: Run) -> str:
    """The whole page."""
    title = f"DRPO run {run.name}"
    model = run.config.get("load") or run.config.get("hf_model")
    facts = (run.config.get("objective"), model, run.config.get("prompts"))
    subtitle = " &middot; ".join(escape(str(f)) for f in facts if f)
    plots = "".join(_picture(plot, run) for plot in PLOTS)
    used = ("device", "layout", "wall_seconds", "steps")
    rest = {k: v for k, v in run.summary.items() if k not in used}
    sections = [
        f'<h1>{escape(title)}</h1><p class="subtitle">{subtitle}</p>',
        f"<dl>{_verdict(run)}</dl>",
        f'<h2>Curves</h2><div class="grid plots">{plots}</div>' if plots else "",
        f"<h2>Last metrics</h2>{_metrics_table(run)}",
        _samples(run),
        f"<h2>Summary</h2>{_settings_table(rest, str)}" if rest else "",
        f"<h2>Configuration</h2>{_settings_table(run.config, flag)}",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(s for s in sections if s)}</main></body></html>\n"
    )


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from what the run logged so far; an earlier one is replaced.

    Returns:
        The path of the report.

    Raises:
        DataError: metrics.jsonl or config.json is missing, empty or damaged; names the file.
    """
    path = Path(run_dir) / "report.html"
    write_atomically(path, render(load(Path(run_dir))))
    return path
