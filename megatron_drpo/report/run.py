"""What a run directory says: its log, read back into one record."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_drpo.errors import DataError
from megatron_drpo.metrics import Histogram, read_jsonl


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
    """Written at the end of a run: `device`, `layout`, `steps`; any other field is
    shown as it is."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a scalar was logged, and its values."""
        pairs = [(step, line[name]) for step, line in self.metrics.items() if name in line]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def names(self, prefix: str = "") -> list[str]:
        """The scalars that were logged, in order of the alphabet."""
        found = {name for line in self.metrics.values() for name in line}
        return sorted(name for name in found if name.startswith(prefix))

    def finite(self, name: str) -> list[float]:
        return [value for value in self.series(name)[1] if math.isfinite(value)]


def load(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: metrics.jsonl or config.json is missing, empty or damaged; names the file.
    """
    metrics = read_metrics(run_dir)
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


def read_metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Scalars by step, as `Run.metrics`; empty where nothing was logged.

    Raises:
        DataError: metrics.jsonl is damaged; names file and line.
    """
    metrics: dict[int, dict[str, float]] = {}
    for record in _lines(run_dir / "metrics.jsonl"):
        line = metrics.setdefault(record.pop("step"), {})
        line.update({k: math.nan if v is None else float(v) for k, v in record.items()})
    return metrics


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
