"""Write the report of a run, finished or not, or compare several:

python tools/report.py RUN                        # RUN/report.html
python tools/report.py RUN RUN ... --out FILE     # one page about all of them
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_drpo.cli import exit_status
from megatron_drpo.report import write_comparison, write_report


@dataclass(frozen=True)
class Report:
    """Write the report of a run, finished or not; or, of several runs, a page that compares
    them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """--output-dir of a run."""
    others: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")
    ] = ()
    """More runs: then the page compares them."""
    out: Path | None = None
    """The file to write; default: RUN/report.html, or comparison.html here for several runs."""


def main(argv: list[str]) -> int:
    """The exit status; prints the path of the page."""
    arguments = tyro.cli(Report, args=argv, prog="tools/report.py")
    return exit_status(lambda: _write(arguments))


def _write(arguments: Report) -> None:
    if arguments.others:
        out = arguments.out or Path("comparison.html")
        print(write_comparison([arguments.run, *arguments.others], out))
    else:
        print(write_report(arguments.run, arguments.out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
