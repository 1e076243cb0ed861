"""Converting a checkpoint, against copying the same bytes: time, and memory of the process.

    python -m benchmarks.conversion

A llama of random bf16 weights, 2.2 GB in three files. The bound is a copy through safetensors
(`load_file`, `save_file`: read and write, nothing else), file by file; the contenders convert both
ways with one worker and with several, hash every tensor and write the manifest. All leave their
result on the disk (fsync), and take turns in one process; memory is measured in processes of its
own, of anonymous pages, since what is read through the page cache is the kernel's to drop.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import (
    MB,
    Place,
    add_output,
    anonymous,
    check_counts,
    conditions,
    machine,
    number,
    paired_ratio,
    run_ranks,
    seconds_of,
    table,
    write_record,
)
from megatron_drpo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_drpo.checkpoint.families import family_of, read_architecture
from megatron_drpo.checkpoint.hf import SafetensorsFile, file_names, plan_files, write_index

_NUM_FILES = 3
_COPY = "copy"


@dataclass(frozen=True)
class Result:
    """One contender. Example: Result("hf-to-megatron, 2 workers", [2.1, 2.0], [3.9, 3.8], 3e8)."""

    name: str
    seconds: list[float]
    """Of each round."""
    cpu_seconds: list[float]
    """Of each round, all threads."""
    peak_bytes: float
    """Anonymous memory above what the process held before."""


def measure(
    layers: int, hidden: int, workers: Sequence[int], rounds: int, scratch: Path | None
) -> tuple[list[Result], dict[str, float]]:
    """Every contender, and facts of the model."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        directory = Path(name)
        facts = _make_model(directory / "hf", layers, hidden)
        hf_to_megatron(directory / "hf", directory / "megatron", workers=max(workers))
        names = list(_contenders(directory, workers))
        (times,) = run_ranks(_time, 1, "cpu", 1, name, list(workers), rounds)
        results = []
        for number_, contender in enumerate(names):
            (peak,) = run_ranks(_peak, 1, "cpu", 1, name, list(workers), contender)
            wall, cpu = zip(*times[number_], strict=True)
            results.append(Result(contender, list(wall), list(cpu), peak))
    return results, facts


def _make_model(directory: Path, layers: int, hidden: int) -> dict[str, float]:
    """A Hugging Face directory of random weights, one tensor in memory at a time."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    architecture = read_architecture(directory)
    tensors = {
        name: (torch.bfloat16, shape)
        for entry in family_of(architecture).entries(architecture)
        for name, shape in zip(entry.hf, entry.transform.hf_shapes(architecture), strict=True)
    }
    sizes = [2 * torch.Size(shape).numel() for _, shape in tensors.values()]
    plan = plan_files(tensors, -(-sum(sizes) // (_NUM_FILES - 1)))
    generator = torch.Generator().manual_seed(0)
    files = dict(zip(file_names(len(plan)), plan, strict=True))
    for file, names in files.items():
        writer = SafetensorsFile(directory / file, {name: tensors[name] for name in names})
        for name in names:
            writer.write(name, torch.randn(tensors[name][1], generator=generator).bfloat16())
        writer.close()
    placed = {name: file for file, names in files.items() for name in names}
    write_index(directory, placed, sum(sizes))
    return {"bytes": sum(sizes), "largest": max(sizes), "tensors": len(sizes)}


def _contenders(directory: Path, workers: Sequence[int]) -> dict[str, Callable[[], Any]]:
    hf, megatron, out = directory / "hf", directory / "megatron", directory / "out"
    calls: dict[str, Callable[[], Any]] = {_COPY: lambda: _copy(hf, out)}
    for count in workers:
        threads = f"{count} worker{'s' if count > 1 else ''}"
        calls[f"hf-to-megatron, {threads}"] = lambda n=count: hf_to_megatron(hf, out, workers=n)
        calls[f"megatron-to-hf, {threads}"] = lambda n=count: megatron_to_hf(
            megatron, out, workers=n
        )
    return calls


def _copy(source: Path, out: Path) -> None:
    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / file.name, metadata={"format": "pt"})
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _time(
    place: Place, directory: str, workers: Sequence[int], rounds: int
) -> list[list[tuple[float, float]]]:
    """Wall and CPU seconds of each contender in each round, after one that does not count."""
    calls = list(_contenders(Path(directory), workers).values())
    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for shift in range(len(calls)):
            index = (turn + shift) % len(calls)
            found = seconds_of(place, calls[index])
            if turn:
                times[index].append(found)
            _clean(directory)
    return times


def _clean(directory: str) -> None:
    """No result, and nothing of it still on its way to the disk, for who comes next."""
    shutil.rmtree(Path(directory) / "out")
    os.sync()


def _peak(place: Place, directory: str, workers: Sequence[int], contender: str) -> float:
    """By how many bytes anonymous memory rises while the contender runs, looked at 500 times/s."""
    call = _contenders(Path(directory), workers)[contender]
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    _clean(directory)
    return float(max(peak - before, 0))


# Records: what a JSON file holds.


def record_of(results: Sequence[Result], facts: dict[str, float], rounds: int) -> dict[str, Any]:
    """All that `render` needs, and what the figures depend on."""
    return {
        "benchmark": "conversion",
        "machine": machine("cpu"),
        "megatron_core": version("megatron-core"),
        "threads": 1,
        "rounds": rounds,
        "model": facts,
        "results": [asdict(result) for result in results],
    }


def render(record: dict[str, Any]) -> str:
    """A table in Markdown."""
    results = [Result(**result) for result in record["results"]]
    copy, size = results[0], record["model"]["bytes"]
    rows = [
        [
            f"{result.name}, safetensors" if result.name == _COPY else f"`{result.name}`",
            number(statistics.median(result.seconds)),
            number(statistics.median(result.cpu_seconds)),
            number(size / MB / statistics.median(result.seconds), 0),
            f"{100 * paired_ratio(copy.seconds, result.seconds):.0f} %",
            number(result.peak_bytes / MB, 0),
        ]
        for result in results
    ]
    return "\n".join(
        [
            conditions(record),
            "",
            f"{size / 1e9:.1f} GB in {record['model']['tensors']} tensors, the largest of "
            f"{record['model']['largest'] / MB:.0f} MB.",
            "",
            table(["", "s", "CPU s", "MB/s", "of the copy's speed", "peak MB"], rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion",
        description="Time and memory of converting a checkpoint, both ways, against a copy.",
        allow_abbrev=False,
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, help="on the disk to be measured; default: /tmp")
    add_output(parser, rounds=5)
    options = parser.parse_args(argv)
    check_counts(parser, options, "layers")
    if options.hidden < 256 or options.hidden % 256:
        parser.error(f"--hidden {options.hidden}: must be a multiple of 256")
    if min(options.workers) < 1:
        parser.error(f"--workers {min(options.workers)}: must be at least 1")
    found = measure(
        options.layers, options.hidden, options.workers, options.rounds, options.scratch
    )
    record = record_of(*found, options.rounds)
    print(render(record))
    if options.json:
        write_record(options.json, record)


if __name__ == "__main__":
    main()
