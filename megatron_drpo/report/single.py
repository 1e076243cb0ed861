"""The report of one run: verdict, curves, last metrics, samples, flags."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from megatron_drpo.config import flag
from megatron_drpo.metrics import worst_and_best
from megatron_drpo.report.facts import facts
from megatron_drpo.report.page import number, page, row, save, setting, two_columns
from megatron_drpo.report.plots import pictures
from megatron_drpo.report.run import Run, load

NUM_SAMPLES = 3
"""Samples shown at each end of the reward."""
MAX_TEXT = 1500
"""Characters of a prompt or response that are shown."""


def _verdict(run: Run) -> str:
    return "".join(
        f"<div><dt>{escape(fact.label)}</dt>"
        f"<dd>{escape(fact.value)}<small>{escape(fact.remark)}</small></dd></div>"
        for fact in facts(run)
    )


def _metrics_table(run: Run) -> str:
    rows = []
    for name in run.names():
        steps, values = run.series(name)
        last = f"<b>{number(values[-1])}</b>"
        rows.append(row([escape(name), number(values[0]), last, str(steps[-1])]))
    return two_columns(rows, "numbers", row(["metric", "first", "last", "at step"], "th"))


def _settings_table(settings: dict[str, Any], name: Callable[[str], str]) -> str:
    rows = [row([escape(name(key)), escape(setting(value))]) for key, value in settings.items()]
    return two_columns(rows, "settings")


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT} more characters]"


def _samples(run: Run) -> str:
    """The worst and the best of the last step that has samples."""
    last = max((s["step"] for s in run.samples), default=None)
    judged = [s for s in run.samples if s["step"] == last and s.get("reward") is not None]
    if not judged:
        return ""
    worst, best = worst_and_best(
        judged,
        NUM_SAMPLES,
        reward=lambda sample: sample["reward"],
        prompt=lambda sample: str(sample.get("prompt")),
    )
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


def render(run: Run) -> str:
    """The whole page."""
    title = f"Run {run.name}"
    model = run.config.get("load") or run.config.get("hf_model")
    told = (run.config.get("objective"), model, run.config.get("prompts"))
    subtitle = " &middot; ".join(escape(str(each)) for each in told if each)
    plots = pictures(run)
    used = ("device", "layout", "steps")
    rest = {k: v for k, v in run.summary.items() if k not in used}
    return page(
        title,
        [
            f'<h1>{escape(title)}</h1><p class="subtitle">{subtitle}</p>',
            f"<dl>{_verdict(run)}</dl>",
            f'<h2>Curves</h2><div class="grid plots">{plots}</div>' if plots else "",
            f"<h2>Last metrics</h2>{_metrics_table(run)}",
            _samples(run),
            f"<h2>Summary</h2>{_settings_table(rest, str)}" if rest else "",
            f"<h2>Configuration</h2>{_settings_table(run.config, flag)}",
        ],
    )


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write a page about a run from what it logged so far; an earlier one is replaced.

    Args:
        out: the file; None: RUN_DIR/report.html.

    Returns:
        The path of the report.

    Raises:
        DataError: metrics.jsonl or config.json is missing, empty or damaged, or the page cannot
            be written; names the file.
    """
    return save(out or run_dir / "report.html", render(load(run_dir)))
