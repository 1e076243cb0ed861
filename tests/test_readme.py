"""The README says what is true: its tree is the disk's, its commands run, every flag is told."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from megatron_drpo import doctor
from megatron_drpo.arguments import Options, types_of
from megatron_drpo.config import Config
from tests.tiny_run import make_tiny_run
from tools import document_flags

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
    package -= {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert listed == package
    assert all((ROOT / name).exists() for name in lines[-1].split())


def commands() -> list[list[str]]:
    """Every command of the README, in order, as words, without its comment."""
    found = []
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\s*(make|torchrun|python) ", line):
                words = shlex.split(line, comments=True)
                under_torchrun = "# under torchrun" in line
                found.append(["torchrun", *words[1:]] if under_torchrun else words)
    return found


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z-]+)", README)
    assert {"train", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets if target != "it")


_MEANT = {
    "DIR": ["model"],
    "FILE": ["train.jsonl"],
    "RUN": ["runs/mine"],
    "[RUN": ["runs/other"],
    "...]": [],
    "N": ["2"],
    "/models/my-llama": ["model"],
    "[flags]": ["--config", "run.yaml"],
}
"""What stands for something of the reader's."""
_SMALL = {
    "rollout-prompts-per-step": "4",
    "rollout-samples-per-prompt": "2",
    "rollout-max-response-length": "8",
    "updates-per-rollout": "2",
    "train-iters": "2",
    "checkpoint-interval": "1",
    "save-rollouts": "true",
}
"""The paper's batch is too large for a test, and what a tool looks at has to be there."""
_SHORT = ["--rollout-max-response-length", "8", "--rollout-samples-per-prompt", "2"]


@pytest.mark.distributed
def test_every_command_runs_as_it_is_written(tmp_path: Path) -> None:
    """With a tiny model, small batches, and two ranks wherever there are several."""
    make_tiny_run(tmp_path)
    (tmp_path / "prompts.jsonl").rename(tmp_path / "train.jsonl")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "heldout.jsonl")
    small = "".join(f"{key}: {value}\n" for key, value in _SMALL.items())
    (tmp_path / "small.yaml").write_text(small)
    (tmp_path / "run.yaml").write_text(f"hf-model: model\nprompts: train.jsonl\n{small}")
    for number, command in enumerate(commands()):
        words = [meant for word in command for meant in _MEANT.get(word, [word])]
        if words[0] == "make":
            continue
        if "runs/other" in words:
            shutil.copytree(tmp_path / "runs/mine", tmp_path / "runs/other")
        if "--out" in words:
            words[words.index("--out") + 1] = f"out-{number}"
        if "tools/generate_rollouts.py" in words:
            words += _SHORT
        elif "--hf-model" in words and words[0] == "torchrun":
            length = words.index("--rollout-max-response-length")
            del words[length : length + 2]  # longer than the tiny model's context
            words += ["--config", "small.yaml"]
        done = start(words, tmp_path)
        assert done.returncode == 0, (words, done.stdout, done.stderr)


def start(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command, with this Python and this checkout, on two ranks at most."""
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    if words[0] == "torchrun":
        if words[1] == "--nproc-per-node":
            words = [words[0], *words[3:]]
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words[1:]]
    else:
        words = words[1:]
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_page_of_flags_is_current() -> None:
    assert document_flags.PAGE.read_text() == document_flags.page(), (
        "run python tools/document_flags.py"
    )


def test_every_flag_has_its_help() -> None:
    rows = [line for line in document_flags.page().splitlines() if line.startswith("| `--")]
    assert len(rows) == len(types_of([*get_type_hints(Config).values(), Options, doctor.Doctor]))
    assert all(row.split(" | ")[-1].removesuffix(" |").strip() for row in rows)


def test_the_documents_linked_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), (document, link)
