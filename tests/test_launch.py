"""The ways to start: one file as Python and as shell, `python -m`, and make."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from megatron_drpo.arguments import parse
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_drpo_gpt.sh"


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, without what an outer torchrun or make leaves behind."""
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHON")
    outer += ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


@pytest.fixture
def script() -> ModuleType:
    """The Python half of the script, imported as a process that it did not start would."""
    loader = SourceFileLoader("train_drpo_gpt", str(SCRIPT))
    spec = importlib.util.spec_from_loader("train_drpo_gpt", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_script_is_both_languages(shell: str) -> None:
    done = run(shell, "-n", SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(ast.parse(SCRIPT.read_text()), ast.Module)


def test_without_a_model_of_the_users_the_recipe_and_its_base_model_are_taken(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import make_base_model

    made: list[Path] = []
    monkeypatch.setattr(make_base_model, "ensure_base_model", made.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, _ = parse(script.with_recipe(["--train-iters", "3"]))
    assert [str(path) for path in made] == [config.model.hf_model]
    assert config.data.prompts == f"{made[0]}/prompts.jsonl"
    assert config.data.eval_prompts == f"{made[0]}/eval_prompts.jsonl"
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.train.train_iters == 3


@pytest.mark.parametrize("world_size", ["1", "3"])
def test_the_recipe_fits_an_odd_number_of_ranks_too(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, world_size: str
) -> None:
    from tools import make_base_model

    monkeypatch.setattr(make_base_model, "ensure_base_model", lambda directory: directory)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    config, _ = parse(script.with_recipe([]))
    assert config.parallel.tensor_model_parallel_size == 1
    config, _ = parse(script.with_recipe(["--tensor-model-parallel-size", world_size]))
    assert config.parallel.tensor_model_parallel_size == int(world_size)


@pytest.mark.parametrize("flag", ["--hf-model", "--hf_model=x", "--config=x.yaml", "--help"])
def test_a_model_or_recipe_of_the_users_is_left_alone(script: ModuleType, flag: str) -> None:
    assert script.with_recipe([flag, "x"]) == [flag, "x"]


@pytest.mark.distributed
def test_torchrun_prints_a_users_error_once_and_ends_at_once() -> None:
    start = time.monotonic()
    done = run(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(SCRIPT, "--hf-model", "m", "--lr", "fast"),
    )
    assert done.returncode != 0
    assert len(errors(done)) == 1 and "--lr" in errors(done)[0]
    assert "exitcode  : 2" in done.stderr
    assert f"traceback : {errors(done)[0]}" in done.stderr  # where users of torchrun look
    assert time.monotonic() - start < 60


@pytest.mark.distributed
def test_bash_starts_torchrun_with_two_ranks_and_passes_flags(tmp_path: Path) -> None:
    flags = make_tiny_run(tmp_path)
    done = run(
        *("bash", SCRIPT, *flags, "--tensor-model-parallel-size", "2", "--dry-run"),
        cwd=tmp_path, PYTHON=sys.executable, NPROC_PER_NODE="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 rank(s) = TP 2 x PP 1 x DP 1") == 1


def test_the_package_runs_as_a_module() -> None:
    done = run(sys.executable, "-m", "megatron_drpo", "--hf-model", "m")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in errors(done)] == ["error"]
    assert "--prompts" in done.stderr and "Traceback" not in done.stderr


def test_a_python_without_torch_is_named_with_the_remedy(tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = run("bash", SCRIPT, PYTHON=str(bare))
    assert done.returncode == 2
    assert "has no torch" in errors(done)[0] and "make env" in errors(done)[0]


@pytest.mark.parametrize("nodes", ["1", "3"])
def test_several_nodes_come_from_the_environment(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, nodes: str
) -> None:
    environment = {"GPUS_PER_NODE": "8", "NNODES": nodes, "NODE_RANK": "1", "MASTER_ADDR": "head"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    where = "--nnodes 3 --node-rank 1 --master-addr head --master-port 29500"
    where = where if nodes == "3" else "--standalone"
    arguments = script.torchrun_arguments(["--lr", "1 2"])
    assert arguments == [*where.split(), "--nproc-per-node", "8", str(SCRIPT), "--lr", "1 2"]


@pytest.mark.distributed
def test_bash_shows_a_users_error_alone() -> None:
    done = run("bash", SCRIPT, "--hf-model", "m", "--lr", "fast", PYTHON=sys.executable)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == errors(done)
    assert len(errors(done)) == 1 and "--lr" in errors(done)[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads, in a directory without an environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_uses_a_python_that_has_the_packages(checkout: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run("make", "-n", "train", "ARGS=--lr 1", cwd=checkout, PATH=path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("PYTHON=python3 bash examples/train_drpo_gpt.sh --output-dir runs/")
    assert line.endswith(" --lr 1")
    assert "python3 -m pytest -m" in run("make", "-n", "test", cwd=checkout, PATH=path).stdout


def test_make_prepares_an_environment_with_torch_first(checkout: Path) -> None:
    bare = checkout / "bin"
    bare.mkdir()
    (bare / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    (bare / "python3").chmod(0o755)
    path = f"{bare}:{os.environ['PATH']}"
    lines = run("make", "-n", "test", cwd=checkout, PATH=path).stdout.splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert "torch==" in installs[0] and '".[test]"' in installs[1]
    assert all("-c constraints.txt" in line for line in installs)
    assert lines[-1].startswith('.venv/bin/python -m pytest -m "not slow"')
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()
    assert "pip" not in run("make", "-n", "test", cwd=checkout, PATH=path).stdout


def test_make_without_a_new_enough_python_says_so(checkout: Path) -> None:
    bare = checkout / "bin"
    bare.mkdir()
    for tool in ("sh", "date", "touch", "grep", "make"):
        (bare / tool).symlink_to(str(shutil.which(tool)))
    done = run("make", "env", cwd=checkout, PATH=str(bare))
    assert done.returncode != 0
    assert "no Python of at least 3.11" in errors(done)[0]
