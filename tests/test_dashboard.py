"""Every number that the program can log has its chart, and TensorBoard gets the charts so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import megatron_drpo
from megatron_drpo.dashboard import GROUPS, LEFT_OUT, Band, custom_scalars, is_measurement
from megatron_drpo.metrics import MetricsWriter

PACKAGE = Path(megatron_drpo.__file__).parent
NAME = r"[a-z_0-9]+/[a-z_0-9-]{2,}"
"""Of a scalar in a group; `tok/s` is a unit."""
HISTOGRAMS = {"weight", "ratio", "entropy", "reward", "response_length"}
"""Distributions, which stand in the same functions as the scalars, and have tabs of their own."""


def keys(node: ast.AST) -> Iterator[str]:
    """What a statement or expression puts into a dict by name; each {field} of an f-string is x."""
    found: list[ast.expr | None] = []
    if isinstance(node, ast.Dict):
        found = node.keys
    elif isinstance(node, ast.DictComp):
        found = [node.key]
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        found = [node.slice]
    for key in found:
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value
        elif isinstance(key, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in key.values)


def logged_names() -> set[str]:
    """Names of scalars, read off the source: those of functions that return `dict[str, float]`,
    and whatever else in a dict looks like `group/name`."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names |= {key for key in keys(node) if re.fullmatch(NAME, key)}
            returns = isinstance(node, ast.FunctionDef) and node.returns
            if returns and "dict[str, float]" in ast.unparse(returns):
                names |= {key for inner in ast.walk(node) for key in keys(inner)}
    return names - HISTOGRAMS


NAMES = logged_names()


def test_the_names_of_the_source_are_found():
    assert {
        *("loss", "mfu", "reward/mean", "weight/p99", "ratio/max", "objective/x", "eval/avg"),
        *("divergence/tv_mu_x", "engine_gap/mean_abs", "dynamic_sampling/rounds", "time/x"),
        *("memory/x", "packing/efficiency", "servers/canary_gap", "staleness/mean"),
        *("moe/routing_differs", "tokens_per_second", "tokens_per_second/train", "tflop/train"),
    } <= NAMES
    assert len(NAMES) < 100  # nothing else has crept in


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_scalar_has_one_chart_or_is_left_out_on_purpose(name: str):
    charts = [
        f"{group}: {title}"
        for group, charts in GROUPS.items()
        for title, chart in charts.items()
        if chart.shows(name)
    ]
    assert len(charts) == (name not in LEFT_OUT), (
        f"{name} is in {charts or 'no chart'}: give it one in GROUPS, or a reason in LEFT_OUT"
    )


def test_every_chart_has_something_to_show():
    patterns = {
        name
        for charts in GROUPS.values()
        for chart in charts.values()
        for name in (
            (chart.value, chart.lower, chart.upper) if isinstance(chart, Band) else chart.names
        )
    }
    assert {p for p in patterns if not any(re.fullmatch(p, name) for name in NAMES)} == set()
    assert LEFT_OUT.keys() <= NAMES


def test_the_groups():
    assert list(GROUPS) == [
        *("learning", "trust region", "mismatch", "groups", "lengths", "performance", "memory")
    ]


def test_measurements_are_what_equal_runs_need_not_share():
    measured = {name for name in NAMES if is_measurement(name)}
    assert (
        measured
        == {
            *("time/x", "time/step", "time/evaluate", "time/checkpoint", "memory/x", "mfu"),
            *("tokens_per_second", "tokens_per_second/generate", "tokens_per_second/train"),
        }
        & NAMES
    )
    assert not is_measurement("tokens/total") and not is_measurement("staleness/mean")


def shown(run: Path) -> dict[str, dict[str, layout_pb2.Chart]]:
    """The charts of the last layout in a run's events, which is the one that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    layout = layout_pb2.Layout()
    (content,) = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    layout.ParseFromString(content)
    return {c.title: {chart.title: chart for chart in c.chart} for c in layout.category}


def test_the_board_shows_the_charts_that_have_something_and_no_others(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(0, {"eval/avg": 0.5})
        writer.write(1, {"weight/p01": 0.9, "weight/p50": 1.0, "weight/p99": 1.1, "lr": 1e-4})
        writer.write(2, {"tokens_per_second": 10.0, "tokens_per_second/train": 20.0, "mine": 1.0})
    groups = shown(tmp_path)
    assert {group: list(charts) for group, charts in groups.items()} == {
        "learning": ["held-out reward: mean and best of k", "learning rate"],
        "trust region": ["gradient weight: p01, median, p99"],
        "performance": ["tokens per second"],
    }
    (band,) = groups["trust region"]["gradient weight: p01, median, p99"].margin.series
    assert (band.value, band.lower, band.upper) == ("weight/p50", "weight/p01", "weight/p99")

    with MetricsWriter(tmp_path, resume_step=3) as writer:  # a resumed run has the same charts
        writer.write(3, {"lr": 1e-4})
    assert list(shown(tmp_path)["learning"]) == [*groups["learning"]]


@pytest.mark.parametrize("name", ["tokens_per_second", "time/x", "ratio/max", "objective/x"])
def test_tensorboard_finds_just_the_scalars_of_a_chart(name: str):
    """Its server takes `re.match`, which is content with the start of a name."""
    for group, charts in custom_scalars([name]).items():
        for title, (_, tags) in charts.items():
            for other in NAMES | {f"{name}_too" for name in NAMES}:
                found = any(re.match(tag, other) for tag in tags)
                assert found == GROUPS[group][title].shows(other)
