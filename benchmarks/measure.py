"""Processes, clocks, memory and tables: how everything in this folder is measured.

Out: `run_ranks`, which calls a function in fresh processes, one per tensor-parallel rank; and for
use in there `seconds_of` and `extra_memory_of` a call. Memory needs Linux: it is read off /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_drpo.device import Device, choose_device

MB = 1e6


@dataclass(frozen=True)
class Place:
    """One of `size` processes, on a device of its own."""

    rank: int
    size: int
    device: Device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None for one."""
        return dist.group.WORLD if self.size > 1 else None

    def start_megatron(self) -> Any:
        """The layout (`mcore.parallel.Layout`) of all ranks as one tensor-parallel group."""
        return _start_megatron(self.size, self.device)


@cache
def _start_megatron(size: int, device: Device) -> Any:
    # Imported where it is wanted: it takes seconds, and memory that others need not have.
    from megatron_drpo.config import ParallelConfig
    from megatron_drpo.mcore import parallel

    return parallel.initialize(ParallelConfig(tensor_model_parallel_size=size), device, seed=0)


def run_ranks(
    function: Callable[..., Any], size: int, device: str, threads: int, *arguments: Any
) -> list[Any]:
    """What `function(place, *arguments)` returns on each of `size` ranks, all of them new.

    Args:
        function: at the top level of its module; returns what JSON can hold.
        size: number of ranks.
        device: auto, cpu or cuda.
        threads: of each rank.

    Raises:
        torch.multiprocessing.ProcessException: a rank failed, and with it all; its traceback.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the children, before they import torch
    with tempfile.TemporaryDirectory() as directory:
        spawn(_child, (Path(directory), function, size, device, threads, arguments), nprocs=size)
        return [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(size)]


def _child(
    rank: int,
    directory: Path,
    function: Callable[..., Any],
    size: int,
    device: str,
    threads: int,
    arguments: tuple[Any, ...],
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(threads)
    place = Place(rank, size, choose_device(device))  # type: ignore[arg-type]
    dist.init_process_group(
        place.device.backend,
        init_method=(directory / "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=10),
    )
    result = function(place, *arguments)
    (directory / str(rank)).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def seconds_of(place: Place, call: Callable[[], Any]) -> tuple[float, float]:
    """How long `call` takes on this rank, from a common start until its device is idle.

    Returns:
        Time on the wall, and time that this process has spent on CPUs, all of its threads.
    """
    dist.barrier()
    place.device.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    call()
    place.device.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def slowest(ranks: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each round, each of the rank that took most; from all ranks'."""
    wall, cpu = (
        [max(rank[column] for rank in turn) for turn in zip(*ranks, strict=True)]
        for column in (0, 1)
    )
    return wall, cpu


def extra_memory_of(place: Place, call: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes memory rises above the present level during `call`; and what it returns.

    On a GPU of what torch allocates, else of the process's resident memory.
    """
    gc.collect()
    if place.device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return torch.cuda.max_memory_allocated() - before, result
    _forget_peak()
    before = resident()
    result = call()
    return max(peak_resident() - before, 0), result


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(
            f"/proc/self/clear_refs cannot be written ({error}), which resets a process's peak "
            "memory: run on Linux, in a container that allows it"
        ) from error


def resident() -> int:
    """This process's resident memory in bytes."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The highest that it has been."""
    return _status("VmHWM")


def anonymous() -> int:
    """This process's resident memory in bytes that is of its own: no pages of mapped files."""
    return _status("RssAnon")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: run on Linux")


def machine(device: str) -> str:
    """The machine without its name: cores or GPU, and what torch sees of it."""
    if device != "cpu" and torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        where = f"{os.cpu_count()} {platform.machine()} cores, {instructions}"
    return f"{where}, torch {torch.__version__}"


def conditions(record: dict[str, Any]) -> str:
    """Of a benchmark's record: what its figures hold for."""
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return (
        f"{record['machine']}, megatron-core {record['megatron_core']}; {threads} per rank, "
        f"medians of {record['rounds']} round{'s' if record['rounds'] > 1 else ''}."
    )


def paired_ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the ratios of the rounds: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(ours, reference, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = f"| {'-' * widths[0]} |" + "".join(f" {'-' * (width - 1)}: |" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)])


def number(value: float, digits: int = 2) -> str:
    """A table's cell; a dash for NaN, where there is none."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def add_output(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write the figures here as well")


def add_settings(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The flags of a benchmark that computes, on ranks of a device."""
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_output(parser, rounds=rounds)


def check_counts(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Refuse flags below 1: those in `names`, and of `add_settings`."""
    for name in (*names, "rounds", "threads"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A benchmark's figures as JSON, from which its tables can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
