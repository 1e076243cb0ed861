"""Write RUN/report.html from the log of a run, finished or not: `python tools/report.py RUN`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_drpo.errors import DrpoError
from megatron_drpo.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write RUN/report.html from the log of a run.")
    parser.add_argument("run", type=Path, help="a run's --output-dir")
    try:
        print(write_report(parser.parse_args().run))
    except DrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
