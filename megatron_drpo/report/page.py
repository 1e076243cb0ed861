"""HTML and numbers as text: what the pages of all reports are made of."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def number(value: float) -> str:
    """Four significant digits, integers in full."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def setting(value: object) -> str:
    """The value of a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def picture(title: str, caption: str, figure: Figure, *, wide: bool = False) -> str:
    """A <figure> that carries its PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=170, metadata={"Software": None})
    data = base64.b64encode(png.getvalue()).decode("ascii")
    kind = ' class="wide"' if wide else ""
    return (
        f"<figure{kind}>"
        f'<h3>{escape(title)}</h3><img alt="{escape(title)}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def row(cells: Sequence[str], tag: str = "td") -> str:
    """A row of a table; the cells are HTML."""
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def two_columns(rows: Sequence[str], kind: str, head: str = "") -> str:
    """A long table as two, side by side."""
    half = (len(rows) + 1) // 2
    tables = [
        f"<table>{head}{''.join(part)}</table>" for part in (rows[:half], rows[half:]) if part
    ]
    return f'<div class="grid {kind}">{"".join(tables)}</div>'


STYLE = """
body { margin: 0; background: #f7fafc; color: #1a202c; line-height: 1.45;
  font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0; }
h2 { font-size: 18px; margin: 38px 0 12px; }
h3 { font-size: 14px; margin: 0 0 4px; }
.subtitle { color: #4a5568; margin: 2px 0 18px; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 1px; margin: 0; background: #e2e8f0;
  border: 1px solid #e2e8f0; border-radius: 6px; overflow: hidden; }
dl div { background: #fff; padding: 10px 14px; flex: 1 1 auto; }
dt { font-size: 12px; color: #4a5568; }
dd { margin: 1px 0 0; font-size: 18px; font-weight: 600; }
small { display: block; font-size: 12px; font-weight: 400; color: #4a5568; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  align-items: start; }
.plots { align-items: stretch; }
figure { margin: 0; padding: 12px 14px; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 6px; }
figure img { width: 100%; display: block; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 12.5px; color: #4a5568; margin-top: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; background: #fff;
  border: 1px solid #e2e8f0; }
td, th { padding: 3px 9px; border-bottom: 1px solid #edf2f7; text-align: left;
  overflow-wrap: anywhere; vertical-align: top; }
th { color: #4a5568; font-weight: 600; }
td:first-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td:first-child { white-space: nowrap; width: 1%; }
.sample { margin: 0 0 12px; padding: 9px 14px; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 6px; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 5px 0 0; font-size: 12.5px;
  font-family: ui-monospace, Menlo, Consolas, monospace; }
mark { background: #ebf4ff; color: inherit; }
.key { position: sticky; top: 0; margin: 0 -20px 12px; padding: 8px 20px; background: #f7fafc;
  border-bottom: 1px solid #e2e8f0; font-size: 13px; font-weight: 600; }
.key span { margin-right: 22px; white-space: nowrap; }
.pen { display: inline-block; width: 22px; height: 0; margin-right: 7px; vertical-align: middle; }
.verdicts td { font-size: 14px; font-weight: 600; }
.verdicts td:first-child { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #4a5568; }
@media (max-width: 700px) { .grid { grid-template-columns: minmax(0, 1fr); } }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole file; empty sections are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(s for s in sections if s)}</main></body></html>\n"
    )


def save(path: Path, html: str) -> Path:
    """Write a page, in place of an earlier one; its path.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        write_atomically(path, html)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; write elsewhere with --out, or mend the directory"
        ) from error
    return path
