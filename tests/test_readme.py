"""The README says what is true: its tree is the disk's, its commands and flags exist."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from megatron_drpo.arguments import Options, parse, types_of
from megatron_drpo.config import Config, ModelConfig, flag
from tools import convert_checkpoint, doctor

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    "\n".join(line.removeprefix("    ") for line in block.splitlines())
    for block in re.findall(r"(?:^    .*\n?|^\n(?=    ))+", README, re.MULTILINE)
]


def test_the_tree_is_the_disks() -> None:
    (tree,) = (block for block in BLOCKS if block.lstrip().startswith("megatron_drpo/\n"))
    lines = [line for line in tree.splitlines() if line.strip()]
    listed = set()
    for line in lines[1:-1]:
        names = re.match(r"  ((?:[\w.]+/? )+)", line)
        assert names, line
        listed |= {name.rstrip("/") for name in names[1].split()}
    package = {path.name for path in (ROOT / "megatron_drpo").iterdir()}
    package -= {"__init__.py", "__main__.py", "__pycache__"}
    assert listed == package
    assert all((ROOT / name).exists() for name in lines[-1].split())


def test_the_flags_exist() -> None:
    flags = {flag(name) for name in Config(ModelConfig("m"), data=_data()).flat()}
    flags |= {"--help"} | _options(convert_checkpoint.build_parser())
    flags |= {flag(name) for name in types_of([Options, doctor.Doctor])}
    elsewhere = {"--nproc-per-node", "--logdir"}  # torchrun's and TensorBoard's
    mentioned = set(re.findall(r"--[a-z][a-z0-9-]+", README)) - elsewhere
    assert mentioned and mentioned <= flags


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of its commands."""
    found = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for each in action.choices.values() for option in _options(each)}
    return found


def _data():
    from megatron_drpo.config import DataConfig

    return DataConfig(prompts="p")


def test_the_commands_parse() -> None:
    command = next(block for block in BLOCKS if block.lstrip().startswith("torchrun"))
    words = shlex.split(command.replace("\\\n", " "))
    assert (ROOT / words[3]).is_file()
    config, _ = parse(words[4:])
    assert config.model.hf_model == "/models/my-llama"
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", README)
    assert {"train", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_documents_linked_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), (document, link)
