"""Everything that README.md shows, measured anew: python -m benchmarks [NAME ...]

Each name is a file under `results/`; without one, all are measured on this machine's CPU, which
takes about forty minutes on two idle cores. `--readme` measures nothing and makes the README's
tables from the files that are there, GPUs' among them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import conversion, generation, objective_cost, training_memory, vocab_parallel

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
_BLOCK = re.compile(r"<!-- (results/[\w.-]+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def render(record: dict[str, Any]) -> str:
    """The tables of a record, whichever benchmark made it."""
    modules = (vocab_parallel, training_memory, objective_cost, conversion, generation)
    named = {module.__name__.rpartition(".")[2]: module for module in modules}
    return named[record["benchmark"]].render(record)


def filled(text: str) -> str:
    """The README with the tables of the files that its blocks name."""

    def block(match: re.Match[str]) -> str:
        record = json.loads((FOLDER / match[1]).read_text())
        return f"<!-- {match[1]} -->\n{render(record)}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def benchmarks() -> dict[str, Callable[[Path], None]]:
    """By name, what measures and writes a file."""
    named: dict[str, Callable[[Path], None]] = {}

    def add(name: str, main: Callable[[Sequence[str]], None], *arguments: str) -> None:
        named[name] = lambda path: main([*arguments, "--json", str(path)])

    cpu = ("--device", "cpu")

    for dtype in ("fp32", "bf16"):
        for tp in ("1", "2"):
            add(f"cpu-{dtype}-tp{tp}", vocab_parallel.main, *cpu, "--dtype", dtype, "--tp", tp)
    add("cpu-growth", vocab_parallel.main, *cpu, "--sweep", "--rounds", "3")
    add("cpu-training", training_memory.main, *cpu)
    add("cpu-objective-cost", objective_cost.main, *cpu)
    add("cpu-conversion", conversion.main)
    add("cpu-generation", generation.main)
    return named


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    named = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure, and fill the README's tables."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(named)}")
    parser.add_argument("--readme", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in named]
    if unknown:
        parser.error(f"{', '.join(unknown)}: unknown; use {', '.join(named)}")
    if options.readme and options.names:
        parser.error("--readme: measures nothing; drop it, or the names")
    for name in [] if options.readme else options.names or named:
        named[name](FOLDER / "results" / f"{name}.json")
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
