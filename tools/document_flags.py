"""Write docs/flags.md: every flag with its default and help, read off the configuration.

    python tools/document_flags.py

The same docstrings give `--help`; a test sees to it that the page is current.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser

from megatron_drpo.arguments import Options
from megatron_drpo.config import Config, flag
from megatron_drpo.doctor import Doctor

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
_HEAD = """# Every flag

Of `examples/train_drpo_gpt.sh`, `megatron-drpo` and `python -m megatron_drpo`. The same names,
without the dashes, are the keys of a YAML file for `--config`; the command line wins. A flag that
is unknown, out of range, contradicts another or would do nothing is an error. `--dry-run` prints
what a run would use.

This page is written by `python tools/document_flags.py` from the docstrings that `--help` shows,
too.
"""


def page() -> str:
    """The whole page."""
    groups: dict[str, Any] = typing.get_type_hints(Config)
    sections = [_section(name.replace("_", " "), group) for name, group in groups.items()]
    sections.append(_section("one start", Options))
    sections.append(_section("python -m megatron_drpo.doctor", Doctor))
    return "\n".join([_HEAD, *sections])


def _section(title: str, group: type) -> str:
    about = (group.__doc__ or "").replace("\n", " ")
    lines = [f"## {title[0].upper()}{title[1:]}" if " -m " not in title else f"## `{title}`"]
    lines += ["", " ".join(about.split()), ""]
    lines += ["| flag | default | |", "|---|---|---|", *_rows(group), ""]
    return "\n".join(lines)


def _rows(group: type) -> Iterator[str]:
    kinds = typing.get_type_hints(group)
    texts = {each.arg_name: each.description for each in _attributes(group)}
    for field in dataclasses.fields(group):
        name, text = field.name, " ".join((texts[field.name] or "").split())
        yield f"| {_usage(name, kinds[name])} | {_default(field.default)} | {_cell(text)} |"


def _attributes(group: type) -> list[docstring_parser.DocstringParam]:
    return docstring_parser.parse_from_object(group).params


def _usage(name: str, kind: Any) -> str:
    """`--flag VALUES` as it is written on a command line."""
    if kind is bool:
        return f"`{flag(name)}`, `{flag(f'no_{name}')}`"
    return f"`{flag(name)} {_values(kind)}`"


def _values(kind: Any) -> str:
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return _cell("{" + ",".join(map(str, arguments)) + "}")
    if origin is tuple:
        return f"[{_values(arguments[0])} ...]"
    if origin in (types.UnionType, typing.Union):
        return _values(next(each for each in arguments if each is not types.NoneType))
    return {int: "INT", float: "NUMBER", str: "TEXT"}[kind]


def _default(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "`" + " ".join(map(str, value)) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    """A bar would end the cell, and stars would be taken for emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*")


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
