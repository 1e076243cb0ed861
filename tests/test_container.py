"""The image, as far as that goes without building one: its pins, its user, what it leaves out."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
COMMANDS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
"""Instructions without comments, each on a line."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE_PYTHON = "3.12"
"""Of the pinned tag."""


def argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", TEXT, flags=re.MULTILINE)
    return value


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run(
        [command, "--no-color", str(ROOT / "Dockerfile")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in TEXT and not list(ROOT.glob(".hadolint*"))


def test_the_base_image_is_a_tag_and_not_whatever_is_newest() -> None:
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", argument("BASE_IMAGE"))
    assert [line for line in COMMANDS if line.startswith("FROM")] == ["FROM ${BASE_IMAGE}"]
    # Tags of 2024-11 and later have Python 3.12.
    assert argument("BASE_IMAGE").rpartition(":")[2] >= "24.11"
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(IMAGE_PYTHON)


def test_megatron_core_is_the_newest_that_is_supported_and_tested() -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("megatron-core")
    ]
    here = [pin for pin in pins if pin.marker and pin.marker.evaluate({"python_version": "3.12"})]
    (tested,) = here
    assert str(tested.specifier) == f"=={argument('MEGATRON_CORE')}"
    (allowed,) = [
        Requirement(text) for text in PROJECT["dependencies"] if text.startswith("megatron-core")
    ]
    assert allowed.specifier.contains(argument("MEGATRON_CORE"))
    (below,) = [each for each in allowed.specifier if each.operator == "<"]
    major, minor = Version(argument("MEGATRON_CORE")).release[:2]
    assert Version(below.version) == Version(f"{major}.{minor + 1}"), "there is a newer series"
    assert any('"megatron-core==${MEGATRON_CORE}"' in line for line in COMMANDS)


def test_dependencies_are_the_projects_and_installed_before_the_source(tmp_path: Path) -> None:
    (listing,) = [line for line in COMMANDS if "tomllib" in line]
    (code,) = re.findall(r"python -c '(.*?)'", listing)
    code = code.replace("/tmp/pyproject.toml", str(ROOT / "pyproject.toml"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["parquet"]]
    assert done.stdout.splitlines() == wanted
    # Only the package itself may go round the constraints that keep the image's torch.
    assert [line for line in COMMANDS if "PIP_CONSTRAINT" in line] == [
        "RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps -e ."
    ]
    order = [COMMANDS.index(listing), COMMANDS.index("COPY --chown=drpo:drpo . .")]
    assert order == sorted(order)
    assert all("--no-cache-dir" in line for line in COMMANDS if "pip install" in line)


def test_it_runs_as_a_user_and_examines_itself() -> None:
    users = [line for line in COMMANDS if line.startswith("USER")]
    assert users == ["USER 10001"]
    assert any("useradd" in line and "--uid 10001" in line for line in COMMANDS)
    joined = "\n".join(COMMANDS)
    assert joined.index("USER 10001") > joined.index("pip install --no-cache-dir --no-deps")
    assert 'CMD ["python", "-m", "megatron_drpo.doctor"]' in joined
    assert "HEALTHCHECK" in joined


def left_out(name: str) -> bool:
    """Whether .dockerignore keeps a path of the top directory out of the image."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/").rstrip("/")
            if fnmatch.fnmatchcase(name, pattern):
                found = not line.startswith("!")
    return found


@pytest.mark.parametrize(
    "name",
    [
        ".git",
        ".venv",
        ".venv-vllm",
        "runs",
        "build",
        "dist",
        "__pycache__",
        "megatron_drpo.egg-info",
    ]
    + [".pytest_cache", ".ruff_cache", ".hypothesis"],
)
def test_what_machines_leave_behind_stays_out(name: str) -> None:
    assert left_out(name)


def test_what_is_not_kept_by_git_is_not_put_into_the_image() -> None:
    kept_out = (ROOT / ".gitignore").read_text().split()
    assert kept_out and all(left_out(line.strip("/").replace("*", "x")) for line in kept_out)


def test_everything_else_is_in_the_image() -> None:
    needed = ["megatron_drpo", "examples", "tools", "tests", "docs", "benchmarks"]
    needed += ["pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"]
    assert not [name for name in needed if left_out(name)]
