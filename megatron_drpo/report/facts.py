"""The verdict on a run: the few numbers that a person asks for first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_drpo.report.page import duration, number, percent
from megatron_drpo.report.run import Run

ARROW = "\N{RIGHTWARDS ARROW}"


class Fact(NamedTuple):
    """Example: Fact("Reward", "0.39 to 0.91", "step 1 to step 40")."""

    label: str
    value: str
    remark: str = ""


TIMES = ("time/step", "time/evaluate", "time/checkpoint")
"""What the time of a run is made of; none of them is part of another."""


def wall_time(run: Run) -> float | None:
    """Seconds of all steps, evaluations and checkpoints, over all starts of the run."""
    times = [seconds for name in TIMES for seconds in run.finite(name)]
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


def facts(run: Run) -> Iterator[Fact]:
    """The verdict: what a person asks first."""
    steps, accuracy = run.series("eval/avg")
    evaluated = [(s, a) for s, a in zip(steps, accuracy, strict=True) if math.isfinite(a)]
    if evaluated:
        (_, before), (last_step, after) = evaluated[0], evaluated[-1]
        best_step, best = max(evaluated, key=lambda pair: pair[1])
        avg = f"avg@{run.config.get('eval_samples_per_prompt', 1)}"
        # A user's reward need not be a share of right answers.
        if all(0 <= a <= 1 for _, a in evaluated):
            what, show, gain = "accuracy", percent, f"{100 * (after - before):+.1f} points"
        else:
            what, show, gain = "reward", number, f"{after - before:+.4g}"
        if len(evaluated) == 1:
            yield Fact(f"Held-out {what}", show(after), f"{avg}, step {last_step}")
        else:
            yield Fact(
                f"Held-out {what}", f"{show(before)} {ARROW} {show(after)}", f"{avg}, {gain}"
            )
            yield Fact(f"Best {what}", show(best), f"at step {best_step}")
    steps, rewards = run.series("reward/mean")
    if rewards:
        value = f"{number(rewards[0])} {ARROW} {number(rewards[-1])}"
        yield Fact("Reward", value, f"step {steps[0]} to step {steps[-1]}")
        planned = run.config.get("train_iters")
        yield Fact("Steps", str(len(steps)), f"of {planned}" if planned else "")
    seconds = wall_time(run)
    if seconds is not None:
        yield Fact("Wall time", duration(seconds))
    speed = tokens_per_second(run)
    if speed is not None:
        yield Fact("Tokens per second", f"{speed:,.0f}", "whole step, all ranks")
    memory = [max(run.finite(name)) for name in run.names("memory/") if run.finite(name)]
    if memory:
        yield Fact("Memory", f"{max(memory):.2f} GiB", "fullest rank, at most")
    yield Fact("Device and layout", layout(run))
