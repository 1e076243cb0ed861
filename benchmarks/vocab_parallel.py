"""Time and memory of log-probs and their gradient: ours, others', and what is the least possible.

    python -m benchmarks.vocab_parallel                          # fp32, one rank
    python -m benchmarks.vocab_parallel --dtype bf16 --tp 2
    python -m benchmarks.vocab_parallel --sweep                  # how ours grows with T and V

Time: contenders take turns in the same processes, so that a round's ratios are of one moment;
medians of rounds. Memory: each contender in new processes. README.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Inputs, Problem
from benchmarks.measure import (
    MB,
    Place,
    add_settings,
    check_counts,
    conditions,
    extra_memory_of,
    machine,
    number,
    paired_ratio,
    run_ranks,
    seconds_of,
    slowest,
    table,
    write_record,
)
from megatron_drpo.vocab_parallel.sweep import sweep_for

_TITLES = {
    "logits": "From logits to their gradient",
    "hidden": "From hidden states to their gradient and the weight's",
}
_SWEEP = [(tokens, vocab) for vocab in (32_000, 151_936) for tokens in (256, 1024, 4096)]
_TARGET_SIZES = (1024, 512, 151_936)


@dataclass(frozen=True)
class Settings:
    """How to measure, apart from what."""

    device: str = "auto"
    threads: int = 1
    rounds: int = 5


@dataclass(frozen=True)
class Result:
    """What was measured of one contender on one problem."""

    problem: Problem
    key: str
    seconds: list[float]
    """Of each round, of the slowest rank."""
    cpu_seconds: list[float]
    """Of each round, of the busiest rank, all its threads."""
    extra_bytes: int | None
    """Highest rise of memory on rank 0, without a new gradient of the weight; None for bounds."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(cases: Sequence[tuple[Problem, str]], settings: Settings) -> list[Result]:
    """Time and memory of contenders (by key), all at one TP; those of one family take turns."""

    def run(function: Any, *arguments: Any) -> list[Any]:
        tp = cases[0][0].tp
        return run_ranks(function, tp, settings.device, settings.threads, *arguments)

    times: dict[tuple[Problem, str], tuple[list[float], list[float]]] = {}
    for family in _TITLES:
        turns = [case for case in cases if CONTENDERS[case[1]].family == family]
        if turns:
            ranks = run(_time, turns, settings.rounds)
            times |= zip(turns, map(slowest, zip(*ranks, strict=True)), strict=True)
    results = []
    for problem, key in cases:
        extra = None if CONTENDERS[key].bound else run(_memory, problem, key)[0]
        results.append(Result(problem, key, *times[problem, key], extra))
    return results


def _time(
    place: Place, cases: Sequence[tuple[Problem, str]], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of each case in each round, after one that does not count."""
    inputs = {problem: Inputs(problem, place) for problem, _ in cases}
    calls = [CONTENDERS[key].prepare(inputs[problem]) for problem, key in cases]
    if any(CONTENDERS[key].family == "logits" for _, key in cases):
        for x in inputs.values():
            x.keep_logits()
    seconds: list[list[tuple[float, float]]] = [[] for _ in cases]
    for turn in range(rounds + 1):
        # An order of its own for each round, so that none always follows the same one.
        for index in random.Random(turn).sample(range(len(cases)), len(cases)):
            problem, key = cases[index]
            inputs[problem].restore()
            wall, cpu = seconds_of(place, calls[index])
            if turn:
                scale = CONTENDERS[key].scale
                seconds[index].append((scale * wall, scale * cpu))
    return seconds


def _memory(place: Place, problem: Problem, key: str) -> int:
    """Bytes on this rank, beyond the inputs and without a new gradient of the weight."""
    contender = CONTENDERS[key]
    contender.prepare(Inputs(problem.tiny, place))()
    call = contender.prepare(Inputs(problem, place))
    extra, gradients = extra_memory_of(place, call)
    return max(extra - sum(grad.nbytes for grad in gradients[1:]), 0)


# Records: what a JSON file holds.


def record_of(results: Sequence[Result], settings: Settings, *, sweep: bool) -> dict[str, Any]:
    """All that `render` needs, and what the figures depend on."""
    return {
        "benchmark": "vocab_parallel",
        "sweep": sweep,
        "machine": machine(settings.device),
        "kernels": _kernels(settings.device),
        "megatron_core": version("megatron-core"),
        **dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) for result in results],
    }


def _kernels(device: str) -> str:
    """Which implementation of the vocabulary sweep ours takes on this machine."""
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return sweep_for(torch.empty((1, 1), device=kind)).name


def results_of(record: dict[str, Any]) -> list[Result]:
    """The results that a record was made from."""
    return [
        Result(**result | {"problem": Problem(**result["problem"])}) for result in record["results"]
    ]


def render(record: dict[str, Any]) -> str:
    """Tables in Markdown, each with a title, and a line for each target."""
    results = results_of(record)
    lines = [f"{conditions(record)} Our sweep: {record['kernels']}.", ""]
    if record["sweep"]:
        return "\n".join([*lines, _render_sweep(results)])
    for family, title in _TITLES.items():
        shown = [result for result in results if CONTENDERS[result.key].family == family]
        if shown:
            lines += [_render_family(family, title, shown), ""]
    return "\n".join([*lines, *targets(results)]).rstrip()


def _render_family(family: str, title: str, results: Sequence[Result]) -> str:
    problem = results[0].problem
    by_key = {result.key: result for result in results}
    shape = f"T = {problem.tokens}, V = {problem.vocab}, {problem.dtype}, TP {problem.tp}"
    if family == "hidden":
        shape += f", H = {problem.hidden}"
    reference = by_key.get("megatron" if family == "logits" else "megatron-plain")
    bound = by_key.get("copy" if family == "logits" else "gemms")
    rows = []
    for result in results:
        extra = math.nan if result.extra_bytes is None else result.extra_bytes
        rows.append(
            [
                CONTENDERS[result.key].label,
                number(1e3 * result.median, 0),
                number(1e3 * statistics.median(result.cpu_seconds), 0),
                *(
                    number(paired_ratio(result.seconds, other.seconds) if other else math.nan)
                    for other in (reference, bound)
                ),
                number(extra / MB, 1),
                number(100 * extra / problem.logits_bytes, 1),
            ]
        )
    head = ["", "ms", "CPU ms", "x Megatron", "x bound", "extra MB", "% of logits"]
    text = [
        f"**{title}**: {shape}; the logits of a rank are {problem.logits_bytes / MB:,.0f} MB.",
        "",
        table(head, rows),
    ]
    if bound is not None and family == "logits":
        rate = 3 * problem.logits_bytes / bound.median / 1e9
        text += ["", f"Copy bandwidth: {rate:.1f} GB/s per rank."]
    if bound is not None and family == "hidden":
        work = 6 * problem.tokens * problem.hidden * problem.columns
        text += ["", f"The GEMMs reach {work / bound.median / 1e9:,.0f} GFLOP/s per rank."]
    return "\n".join(text)


def targets(results: Sequence[Result]) -> list[str]:
    """What ours was meant to reach, and whether it does, of the contenders that ran."""
    by_key = {result.key: result for result in results}

    def line(what: str, value: float, limit: float, unit: str) -> str:
        verdict = "met" if value <= limit else "missed"
        return f"- {what}: {value:.2f} {unit}, wanted at most {limit:.2f}: {verdict}"

    def time(key: str, other: str, limit: float, what: str, unit: str) -> list[str]:
        if key not in by_key or other not in by_key:
            return []
        ratio = paired_ratio(by_key[key].seconds, by_key[other].seconds)
        return [line(what, ratio, limit, unit)]

    def memory(key: str, limit: float, what: str) -> list[str]:
        if key not in by_key:
            return []
        result = by_key[key]
        share = 100 * (result.extra_bytes or 0) / result.problem.logits_bytes
        return [line(what, share, limit, "% of the logits")]

    found = [
        *time("ours", "megatron", 0.40, "time from logits", "x Megatron's"),
        *memory("ours", 2.0, "extra memory from logits"),
        *time("fused", "megatron-plain", 1.00, "time fused", "x Megatron's plain path"),
        *time("fused", "gemms", 1.15, "time fused", "x the three GEMMs"),
        *memory("fused", 5.0, "extra memory fused"),
    ]
    if not found:
        return []
    problem = results[0].problem
    where = ""
    if (problem.tokens, problem.hidden, problem.vocab) != _TARGET_SIZES:
        where = " (set for T = {}, H = {}, V = {})".format(*_TARGET_SIZES)
    return [f"Targets{where}:", "", *found]


def _render_sweep(results: Sequence[Result]) -> str:
    problem = results[0].problem
    rows = []
    for result in results:
        p = result.problem
        rows.append(
            [
                f"T = {p.tokens}, V = {p.vocab}",
                number(1e3 * result.median, 0),
                number(1e3 * statistics.median(result.cpu_seconds), 0),
                number(1e9 * result.median / p.tokens / p.columns, 2),
                number((result.extra_bytes or 0) / MB, 1),
                number(p.tokens * p.hidden * p.torch_dtype.itemsize / MB, 1),
                number(p.logits_bytes / MB, 0),
            ]
        )
    head = ["", "ms", "CPU ms", "ns per logit", "extra MB", "hidden MB", "logits MB"]
    label = CONTENDERS[results[0].key].label
    return "\n".join(
        [
            f"**Growth of {label}**: H = {problem.hidden}, {problem.dtype}, TP {problem.tp}.",
            "",
            table(head, rows),
        ]
    )


def compare(problem: Problem, keys: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The record of these contenders, all of them able to run, on one problem."""
    results = measure([(problem, key) for key in keys], settings)
    return record_of(results, settings, sweep=False)


def _able(problem: Problem, keys: Sequence[str]) -> list[str]:
    """The contenders that can run; says of the others why not."""
    able = []
    for key in keys:
        contender = CONTENDERS[key]
        reason = contender.missing
        if problem.tp > 1 and not contender.shards:
            reason = f"it knows nothing of tensor parallelism (--tp {problem.tp})"
        if reason:
            print(f"left out: {contender.label}: {reason}", file=sys.stderr)
        else:
            able.append(key)
    return able


def sweep(problem: Problem, settings: Settings) -> dict[str, Any]:
    """The record of ours fused over several T and V; H, type and ranks are those of `problem`."""
    cases = [
        (dataclasses.replace(problem, tokens=tokens, vocab=vocab), "fused")
        for tokens, vocab in _SWEEP
    ]
    return record_of(measure(cases, settings), settings, sweep=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vocab_parallel",
        description="Time and memory of log-probs, entropy and their gradient.",
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, default=1024, help="T")
    parser.add_argument("--hidden", type=int, default=512, help="H")
    parser.add_argument("--vocab", type=int, default=151_936, help="V, a multiple of --tp")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tp", type=int, choices=(1, 2, 4), default=1, help="ranks")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders only")
    parser.add_argument("--sweep", action="store_true", help="ours fused, over several T and V")
    add_settings(parser, rounds=5)
    options = parser.parse_args(argv)
    check_counts(parser, options, "tokens", "hidden", "vocab")
    if options.vocab % options.tp:
        parser.error(f"--vocab {options.vocab}: must be a multiple of --tp {options.tp}")
    if options.sweep and options.only:
        parser.error("--only: --sweep is of ours fused; drop one of them")
    settings = Settings(options.device, options.threads, options.rounds)
    problem = Problem(options.tokens, options.hidden, options.vocab, options.dtype, options.tp)
    if options.sweep:
        record = sweep(problem, settings)
    else:
        keys = _able(problem, options.only or list(CONTENDERS))
        if not keys:
            parser.error(f"--only: none of these can run at --tp {options.tp}")
        record = compare(problem, keys, settings)
    print(render(record))
    if options.json:
        write_record(options.json, record)


if __name__ == "__main__":
    main()
