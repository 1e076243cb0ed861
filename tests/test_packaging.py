"""What is installed is what runs: the wheel, its command, its metadata."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from megatron_drpo import __version__

ROOT = Path(__file__).resolve().parent.parent
NAME = f"megatron_drpo-{__version__}"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command that must succeed prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_below(folder: str) -> set[str]:
    """Every file of the checkout there, by its path, without what Python has compiled."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.parent.name != "__pycache__"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of sdist and wheel, the latter made from the former, as for a release."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
        scripts = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
    inside = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    assert inside == files_below("megatron_drpo")
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert {"megatron_drpo/py.typed", "megatron_drpo/vocab_parallel/sweep.c"} <= inside
    assert (metadata["Version"], metadata["License-Expression"]) == (__version__, "Apache-2.0")
    assert {"gpu", "parquet", "test"} <= set(metadata.get_all("Provides-Extra", []))
    assert "megatron-drpo = megatron_drpo.launch:main" in scripts


def test_the_source_distribution_can_be_tested(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    folders = ("megatron_drpo", "benchmarks", "docs", "examples", "tests", "tools")
    assert set().union(*map(files_below, folders)) <= names
    assert {"Makefile", "Dockerfile", "constraints.txt", "pyproject.toml", "LICENSE"} <= names
    assert {".dockerignore", ".gitignore"} <= names


def test_an_installed_wheel_starts_from_anywhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--disable-pip-version-check", "--target", site, wheel, cwd=tmp_path)
    place = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    found = run(sys.executable, "-c", "import megatron_drpo as m; print(m.__file__)",
                cwd=tmp_path, **place)  # fmt: skip
    assert Path(found.strip()).is_relative_to(site)
    for command in ([site / "bin" / "megatron-drpo"], [sys.executable, "-m", "megatron_drpo"]):
        assert "--drpo-delta" in run(*command, "--help", cwd=tmp_path, **place)


def test_the_changes_of_this_version_are_told() -> None:
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
