"""The dashboard: which chart of which group shows each number that a run logs.

Layer 0. TensorBoard's "custom scalars" tab shows these groups, in this order. A metric that a run
may log belongs into a chart here, or into `LEFT_OUT` with the reason; a test holds the source to
it. What the charts mean, and how they look in health and sickness: docs/dashboard.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Lines:
    """Scalars that share an axis.

    Example: Lines(("time/.*",)) has a line for each phase.
    """

    names: tuple[str, ...]
    """Regular expressions, each of a whole name."""

    def shows(self, name: str) -> bool:
        """True if the scalar is in this chart."""
        return any(re.fullmatch(each, name) for each in self.names)

    def tensorboard(self) -> list[Any]:
        """As `SummaryWriter.add_custom_scalars` takes it."""
        return ["Multiline", [f"{name}$" for name in self.names]]  # TensorBoard matches a start


@dataclass(frozen=True)
class Band:
    """A scalar between two others."""

    value: str
    lower: str
    upper: str

    def shows(self, name: str) -> bool:
        """True if the scalar is in this chart."""
        return name in (self.value, self.lower, self.upper)

    def tensorboard(self) -> list[Any]:
        """As `SummaryWriter.add_custom_scalars` takes it."""
        return ["Margin", [self.value, self.lower, self.upper]]


GROUPS: dict[str, dict[str, Lines | Band]] = {
    "learning": {
        "held-out reward: mean and best of k": Lines(("eval/avg", "eval/pass")),
        "reward of the sampled responses": Lines(("reward/mean",)),
        "entropy (nats per token)": Lines(("entropy/mean",)),
        "gradient norm": Lines(("grad_norm",)),
        "loss": Lines(("loss",)),
        "learning rate": Lines(("lr",)),
        "updates skipped so far": Lines(("skipped_updates",)),
    },
    "trust region": {
        "gradient weight: p01, median, p99": Band("weight/p50", "weight/p01", "weight/p99"),
        "gradient weight: mean": Lines(("weight/mean",)),
        "gradient weight: share of tokens below 0 and 0.5": Lines(
            ("weight/below_0", "weight/below_half")
        ),
        "what the objective does (means over tokens)": Lines(("objective/.*",)),
        "ratio pi / mu": Lines(("ratio/max", "ratio/p99", "ratio/mean")),
        "ratio: effective sample size": Lines(("ratio/effective_sample_size",)),
        "ratio: share of tokens beyond the log-ratio limit": Lines(("ratio/beyond_limit_share",)),
        "divergence from the behaviour policy": Lines(
            ("divergence/binary_tv", "divergence/binary_kl", "divergence/k3")
        ),
        "total variation by probability mu of the token": Lines(("divergence/tv_mu_.*",)),
        "share of tokens by probability mu": Lines(("divergence/share_mu_.*",)),
        "drift within a step (nats per token)": Lines(
            ("drift/max_abs", "drift/mean_abs", "drift/k3")
        ),
    },
    "mismatch": {
        "engine gap |log pi - log mu| (nats)": Lines(("engine_gap/max_abs", "engine_gap/mean_abs")),
        "engine gap: ratio pi / mu": Lines(("engine_gap/ratio_min", "engine_gap/ratio_max")),
        "engine gap: share of equal tokens": Lines(("engine_gap/exact_share",)),
        "staleness (steps)": Lines(("staleness/mean", "staleness/max")),
        "servers: gap on the canary prompts (nats)": Lines(("servers/canary_gap",)),
        "servers in use": Lines(("servers/used",)),
        "routing replay: share of choices that differ": Lines(("moe/routing_differs",)),
    },
    "groups": {
        "share of groups whose rewards are all equal": Lines(("reward/groups_all_equal",)),
        "standard deviation of rewards and advantages": Lines(("reward/std", "advantage/std")),
        "samples whose reward failed": Lines(("reward/failed",)),
        "dynamic sampling: prompts": Lines(
            (
                "dynamic_sampling/prompts",
                "dynamic_sampling/uninformative",
                "dynamic_sampling/replaced",
                "dynamic_sampling/missing",
            )
        ),
        "dynamic sampling: rounds": Lines(("dynamic_sampling/rounds",)),
    },
    "lengths": {
        "response length (tokens)": Lines(
            (
                "response_length/max",
                "response_length/p99",
                "response_length/mean",
                "eval/response_length",
            )
        ),
        "share of responses cut off at the limit": Lines(("finish/length_share",)),
        "tokens per step": Lines(("tokens/response", "tokens/total")),
    },
    "performance": {
        "tokens per second": Lines(("tokens_per_second", "tokens_per_second/.*")),
        "seconds per phase": Lines(("time/.*",)),
        "share of the devices' peak (MFU)": Lines(("mfu",)),
        "TFLOP of training per step": Lines(("tflop/train",)),
        "packing: share of row tokens that are real": Lines(("packing/efficiency",)),
        "packing: dearest replica / mean": Lines(("packing/imbalance",)),
    },
    "memory": {
        "GiB per phase, fullest rank": Lines(("memory/.*",)),
    },
}

LEFT_OUT = {
    "ratio/beyond_limit": "the number of those tokens; ratio/beyond_limit_share is in its chart",
    "policy_version": "the number of optimizer updates so far: a second step axis",
}
"""Scalars that no chart shows, with the reason."""

_MEASURED = re.compile(r"(time|memory)/.*|tokens_per_second(/.*)?|mfu")


def is_measurement(name: str) -> bool:
    """True for what the machine decides, clocks and memory, which equal runs need not share."""
    return _MEASURED.fullmatch(name) is not None


def custom_scalars(logged: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts that have something to show, as `SummaryWriter.add_custom_scalars` takes them.

    A chart's definition does not depend on `logged`, so that TensorBoard merges those of several
    runs into one.

    Args:
        logged: names of scalars.
    """
    names = list(logged)
    layout = {
        group: {
            title: chart.tensorboard()
            for title, chart in charts.items()
            if any(chart.shows(name) for name in names)
        }
        for group, charts in GROUPS.items()
    }
    return {group: charts for group, charts in layout.items() if charts}
