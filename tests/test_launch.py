"""The ways to start: one file as Python and as shell, `python -m`, make, one machine or several."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_drpo import launch
from megatron_drpo.arguments import parse
from megatron_drpo.cli import STOPPED
from megatron_drpo.dashboard import is_measurement
from megatron_drpo.errors import ConfigError
from megatron_drpo.launch import Agent, Rank, first_host, plan
from tests.tiny_run import make_tiny_run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_drpo_gpt.sh"

OUTER = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
OUTER += ("SLURM_", "PET_", "TORCHELASTIC_", "NNODES", "NODE_RANK", "NPROC_", "GPUS_PER_NODE")
"""How the names begin of what an outer torchrun, make or srun leaves behind."""


def environment(**given: str) -> dict[str, str]:
    """That of a user's shell, and what is given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OUTER)}
    return {**inherited, "OMP_NUM_THREADS": "1", **given}


def run(*command: str | Path, cwd: Path = ROOT, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**given),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
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


# The default recipe.


def test_without_a_model_of_the_users_the_recipe_and_its_base_model_are_taken(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import make_base_model

    made: list[Path] = []
    monkeypatch.setattr(make_base_model, "ensure_base_model", made.append)
    flags = script.with_recipe(["--train-iters", "3"], 2)
    config, _ = parse(flags)
    assert [str(path) for path in made] == [config.model.hf_model]
    assert config.data.prompts == f"{made[0]}/prompts.jsonl"
    assert config.data.eval_prompts == f"{made[0]}/eval_prompts.jsonl"
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.train.train_iters == 3
    assert script.with_recipe(flags, 2) == flags, "a rank gets what the launcher has completed"


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_recipe_fits_an_odd_number_of_ranks_too(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    from tools import make_base_model

    monkeypatch.setattr(make_base_model, "ensure_base_model", lambda directory: directory)
    config, _ = parse(script.with_recipe([], world_size))
    assert config.parallel.tensor_model_parallel_size == 1
    config, _ = parse(
        script.with_recipe(["--tensor-model-parallel-size", str(world_size)], world_size)
    )
    assert config.parallel.tensor_model_parallel_size == world_size


@pytest.mark.parametrize("flag", ["--hf-model", "--hf_model=x", "--config=x.yaml", "--help"])
def test_a_model_or_recipe_of_the_users_is_left_alone(script: ModuleType, flag: str) -> None:
    assert script.with_recipe([flag, "x"], 2) == [flag, "x"]


# What a process is, by its environment.

STEP = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[003-006]",
    "SLURM_STEP_NODELIST": "gpu[004-006]",
}  # fmt: skip
"""Of the second of three nodes, with one task on each."""
RANKS = STEP | {"SLURM_STEP_NUM_TASKS": "24", "SLURM_PROCID": "13", "SLURM_LOCALID": "5"}
"""Of the fourteenth of 24 tasks on three nodes."""
POD = {
    "MASTER_ADDR": "drpo-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "32", "RANK": "2",
    "PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "drpo-master-0", "PET_MASTER_PORT": "23456",
}  # fmt: skip
"""Of the third of four pods with eight GPUs, as Kubeflow's operator sets it."""
HEAD = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"}


def of(env: Mapping[str, str], gpus: int = 0, **more: str) -> Agent | Rank:
    return plan({**env, **more}, lambda: gpus)


def test_one_machine_has_a_rank_for_each_gpu_or_two() -> None:
    assert of({}) == Agent(1, 0, 2, None, 29500)
    assert of({}, gpus=8) == Agent(1, 0, 8, None, 29500)
    assert of({}, NPROC_PER_NODE="3") == of({}, GPUS_PER_NODE="3") == Agent(1, 0, 3, None, 29500)
    assert of({}, gpus=8, GPUS_PER_NODE="4") == Agent(1, 0, 4, None, 29500)
    assert of({}, NNODES="1", NODE_RANK="0", MASTER_ADDR="head") == of({})


def test_several_machines_by_hand() -> None:
    assert of(HEAD, gpus=8) == Agent(2, 1, 8, "head", 29500)
    assert of(HEAD, gpus=8, MASTER_PORT="1234") == Agent(2, 1, 8, "head", 1234)
    assert of(HEAD, gpus=8).world_size == 16


def test_one_task_of_srun_per_node_starts_its_ranks() -> None:
    assert of(STEP, gpus=8) == Agent(3, 1, 8, "gpu004", 24567)
    # A task knows its own step only by these names in older versions, or in containers.
    older = {"SLURM_NNODES": "3", "SLURM_NTASKS": "3", "SLURM_STEPID": "0"} | {
        name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")
    }
    assert of(older, gpus=8) == Agent(3, 1, 8, "gpu003", 24567)
    assert of(STEP, gpus=8, MASTER_ADDR="ib-004", MASTER_PORT="5") == Agent(3, 1, 8, "ib-004", 5)
    assert of(STEP, gpus=8, NNODES="3") == of(STEP, gpus=8)
    alone = Agent(1, 0, 8, None, 24567)
    assert of(STEP, gpus=8, NNODES="1") == alone, "each node a run of its own"
    by_hand: Any = {"NNODES": "8", "NODE_RANK": "6", "MASTER_ADDR": "head"}
    assert of(STEP, gpus=8, **by_hand) == Agent(8, 6, 8, "head", 24567)
    assert of(RANKS, gpus=1, **by_hand) == Agent(8, 6, 1, "head", 24567)


def test_one_task_of_srun_per_gpu_is_a_rank_itself() -> None:
    expected = {
        "RANK": "13", "WORLD_SIZE": "24", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu004", "MASTER_PORT": "24567",
    }  # fmt: skip
    assert of(RANKS) == Rank(24, expected)
    assert of(RANKS, GPUS_PER_NODE="8", NNODES="3") == Rank(24, expected)
    every: Any = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert of(RANKS, **every) == Rank(24, expected)
    # Bound by Slurm, a task sees one GPU, whose number there is 0.
    bound: Any = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}
    assert of(RANKS, **bound) == Rank(24, expected | {"LOCAL_RANK": "0"})
    # One GPU for eight tasks is another matter, and is refused where the GPU is taken.
    assert of(RANKS, **(bound | {"SLURM_GPUS_ON_NODE": "1"})) == Rank(24, expected)


def test_an_interactive_shell_under_slurm_is_one_machine() -> None:
    shell = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "1", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "16", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
    }  # fmt: skip
    assert of(shell, gpus=8) == Agent(1, 0, 8, None, 20007)
    batch = {name: value for name, value in shell.items() if "STEP" not in name}
    assert of(batch, gpus=8, NNODES="1") == Agent(1, 0, 8, None, 20007)
    one = batch | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}
    assert of(one, gpus=8) == Agent(1, 0, 8, None, 20007)


def test_a_pod_of_kubeflow_starts_its_ranks_though_it_has_a_rank() -> None:
    assert of(POD) == Agent(4, 2, 8, "drpo-master-0", 23456)
    assert of(POD, gpus=6, PET_NPROC_PER_NODE="auto") == Agent(4, 2, 6, "drpo-master-0", 23456)
    single = POD | {"PET_NNODES": "1", "PET_NODE_RANK": "0", "RANK": "0"}
    assert of(single) == Agent(1, 0, 8, None, 23456)
    trainer = {name: value for name, value in POD.items() if name.startswith("PET_")}
    assert of(trainer) == of(POD)


def test_ranks_that_are_there_are_not_started_again() -> None:
    assert of({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Rank(4, {})
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}
    assert of(POD | torchrun) == of(STEP | torchrun) == Rank(16, {})


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"NNODES": "2"}, ["NNODES 2: NODE_RANK is not set", "MASTER_ADDR is not set"]),
        (HEAD | {"MASTER_ADDR": ""}, ["NNODES 2: MASTER_ADDR is not set", "node 0"]),
        (HEAD | {"NODE_RANK": "2"}, ["NODE_RANK 2", "NNODES 2", "0 to 1"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK 1", "NNODES 1"]),
        (HEAD | {"NNODES": "two"}, ["NNODES two", "at least 1"]),
        (HEAD | {"NODE_RANK": "-1"}, ["NODE_RANK -1", "at least 0"]),
        (HEAD | {"MASTER_PORT": "99999"}, ["MASTER_PORT 99999", "65535"]),
        ({"GPUS_PER_NODE": "16"}, ["GPUS_PER_NODE 16", "8 GPUs", "NPROC_PER_NODE=16"]),
        ({"GPUS_PER_NODE": "4", "NPROC_PER_NODE": "8"}, ["NPROC_PER_NODE 8", "GPUS_PER_NODE is 4"]),
        (STEP | {"NNODES": "2"}, ["NNODES 2", "has 3 nodes", "--nodes=2"]),
        (RANKS | {"NNODES": "2"}, ["NNODES 2", "has 3 nodes", "--nodes=2"]),
        (RANKS | {"GPUS_PER_NODE": "4"}, ["GPUS_PER_NODE 4", "8 tasks", "--ntasks-per-node=1"]),
        (RANKS | {"SLURM_STEP_NUM_TASKS": "23"}, ["23", "3", "--ntasks-per-node"]),
        (RANKS | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, ["MASTER_ADDR"]),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"}, ["srun", "2"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["RANK 1", "LOCAL_RANK", "NODE_RANK"]),
        (POD | {"PET_NNODES": "2:4"}, ["PET_NNODES 2:4", "elasticPolicy"]),
    ],
)
def test_contradictions_are_refused_with_both_values_and_the_remedy(
    env: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        of(env, gpus=8)
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("gpu[3,5-6]", "gpu3"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[2-3]node[04-08]-ib,x", "rack2node04-ib"),
        ("", ""),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_torchrun_understands_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run as torchrun

    told: list[Any] = []

    def elastic_launch(config: Any, entrypoint: str):
        return lambda *command: told.append((config, command))

    monkeypatch.setattr(torchrun, "elastic_launch", elastic_launch)
    for name, value in POD.items():  # torchrun reads PET_* too, as defaults
        monkeypatch.setenv(name, value)
    flags = ["--lr", "1 2", "--nnodes", "of mine"]
    for agent in (Agent(2, 1, 8, "head", 1234), Agent(1, 0, 8, None, 29500)):
        torchrun.main([*agent.arguments, "--module", "megatron_drpo", *flags])
        config, command = told.pop()
        assert config.min_nodes == config.max_nodes == agent.num_nodes
        assert config.nproc_per_node == 8
        alone = agent.address is None
        assert config.rdzv_backend == ("c10d" if alone else "static")
        assert config.rdzv_endpoint == ("localhost:0" if alone else "head:1234")
        assert alone or config.rdzv_configs["rank"] == 1
        assert command[-6:] == ("-m", "megatron_drpo", *flags)


def test_the_table_names_every_variable_that_a_user_sets() -> None:
    documents = [str(launch.__doc__), (ROOT / "docs" / "launch.md").read_text()]
    source = Path(str(launch.__file__)).read_text()
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE"):
        assert all(f"`{name}`" in text for text in documents) and f'"{name}"' in source


# Starting.


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


def test_bash_shows_a_users_error_alone_before_torchrun_starts() -> None:
    given: Any = {"PYTHON": sys.executable, "NPROC_PER_NODE": "2", "NNODES": "2"}
    given |= {"NODE_RANK": "0", "MASTER_ADDR": "no.such.host.invalid"}
    done = run("bash", SCRIPT, "--hf-model", "m", "--lr", "fast", **given)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == errors(done)
    assert len(errors(done)) == 1 and "--lr" in errors(done)[0]


def test_the_package_runs_as_a_module() -> None:
    done = run(sys.executable, "-m", "megatron_drpo", "--hf-model", "m", NPROC_PER_NODE="2")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in errors(done)] == ["error"]
    assert "--prompts" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process as a user's shell would start it, and put back afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield monkeypatch
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_dry_run_describes_all_nodes_from_one(
    tmp_path: Path, shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_tiny_run(tmp_path), "--dry-run", "--tensor-model-parallel-size", "2"]
    shell.chdir(tmp_path)
    for name, value in (HEAD | {"NODE_RANK": "0", "NPROC_PER_NODE": "2"}).items():
        shell.setenv(name, value)
    assert launch.main(flags) == 0
    assert capsys.readouterr().out.count("4 rank(s) = TP 2 x PP 1 x DP 2") == 1
    assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "nobody dies of it"


def test_a_dry_run_where_no_ranks_are_named_takes_the_fewest_ranks_that_fit(
    tmp_path: Path, shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*make_tiny_run(tmp_path), "--dry-run", "--tensor-model-parallel-size", "4"]
    shell.chdir(tmp_path)
    assert launch.main(flags) == 0
    assert "4 rank(s) = TP 4" in capsys.readouterr().out
    for name, value in (HEAD | {"NPROC_PER_NODE": "4"}).items():
        shell.setenv(name, value)
    assert launch.main(flags) == 0
    assert "8 rank(s) = TP 4" in capsys.readouterr().out, "another node may be asked, too"


def test_nodes_that_do_not_meet_are_told_where(
    shell: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        node = {"NNODES": "2", "NODE_RANK": "0", "NPROC_PER_NODE": "1"}
        for name, value in {**node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            shell.setenv(name, value)
        assert launch.main(["--hf-model", "m", "--prompts", "p"]) == 2
    error = capfd.readouterr().err
    assert f"error: MASTER_ADDR 127.0.0.1 MASTER_PORT {port}: the 2 nodes did not find" in error
    assert "Traceback" not in error


def test_a_shell_of_srun_does_not_wait_for_the_other_shells(
    shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in RANKS.items():
        shell.setenv(name, value)
    shell.setattr(os, "isatty", lambda file: True)
    assert launch.main(["--hf-model", "m", "--prompts", "p"]) == 2
    assert "set NNODES=1 NODE_RANK=0 to start" in capsys.readouterr().err


def test_help_comes_wherever_one_is(
    shell: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.setenv("NNODES", "2")  # of a cluster, with the rest missing
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert end.value.code == 0 and "--train-iters" in capsys.readouterr().out
    assert launch.main(["--lr", "1"]) == 2
    assert "NODE_RANK is not set" in capsys.readouterr().err


def test_a_python_without_torch_is_named_with_the_remedy(tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = run("bash", SCRIPT, PYTHON=str(bare))
    assert done.returncode == 2
    assert "has no torch" in errors(done)[0] and "make env" in errors(done)[0]


# Two nodes, and a stop.

REWARD = '''
import os, signal
from pathlib import Path

def reward(request):
    """Asks the launcher whose process id is in this file to stop."""
    if Path("launcher").exists():
        os.kill(int(Path("launcher").read_text()), signal.SIGUSR1)
    return float(len(request.response) % 3)
'''


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on two nodes with a rank each, of which the second one's launcher is asked to stop in
    the first step; its rest as two tasks of srun on one node; and the same run without a stop."""
    directory = tmp_path_factory.mktemp("nodes")
    flags = make_tiny_run(directory)
    (directory / "stopping.py").write_text(REWARD)
    flags[flags.index("exact")] = "stopping:reward"
    flags += ["--train-iters", "3", "--no-export-hf", "--no-progress", "--output-dir"]
    by_bash, by_module = ["bash", str(SCRIPT)], [sys.executable, "-m", "megatron_drpo"]
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], *more: str, **given: str) -> None:
        process = subprocess.Popen(
            [*command, *flags, *more], cwd=directory, env=environment(**given),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)

    def end() -> list[subprocess.CompletedProcess[str]]:
        ended = []
        try:
            for process in started:
                output, error = process.communicate(timeout=300)
                done = subprocess.CompletedProcess(process.args, process.returncode, output, error)
                ended.append(done)
        finally:
            for process in started:
                process.kill()
            started.clear()
        return ended

    nodes = HEAD | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "1"}
    for rank in ("0", "1"):
        start(by_bash, "two", PYTHON=sys.executable, **(nodes | {"NODE_RANK": rank}))
    (directory / "launcher").write_text(str(started[1].pid))
    both = end()
    (directory / "launcher").unlink()
    state = (directory / "two/checkpoints/latest").read_text()
    task = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
        "MASTER_PORT": free_port(), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for rank in ("0", "1"):
        start(by_module, "two", "--resume", **task, SLURM_PROCID=rank, SLURM_LOCALID=rank)
    rest = end()
    start(by_module, "one", NPROC_PER_NODE="2", PYTHONPATH=str(ROOT))
    (straight,) = end()
    return {"nodes": both, "latest": state, "rest": rest, "straight": straight, "in": directory}


def logged(run: Path) -> list[dict[str, float]]:
    """What a run has logged but for measurements of the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    kept = [{n: v for n, v in line.items() if not is_measurement(n)} for line in lines]
    return [line for line in kept if set(line) != {"step"}]  # a checkpoint's times


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_stop_is_agreed_on_by_all_nodes_and_is_no_failure(stopped: dict[str, Any]) -> None:
    first, second = stopped["nodes"]
    assert (first.returncode, second.returncode) == (STOPPED, STOPPED), first.stderr
    assert STOPPED == 128 + signal.SIGUSR1
    number = int(stopped["latest"].removeprefix("step-"))
    assert number in (1, 2), "stopped before the end"
    said = f"stopped (SIGUSR1) after step {number} of 3: saved; continue with --resume"
    assert first.stdout.count(said) == 1 and said not in second.stdout
    assert "SIGUSR1" in second.stderr and "SIGUSR1" not in first.stderr
    assert not errors(first) and not errors(second) and "Traceback" not in first.stderr
    assert "layout: 2 rank(s)" in first.stdout and "layout" not in second.stdout


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_nodes_a_stop_and_tasks_of_srun_give_the_numbers_of_one_run(
    stopped: dict[str, Any],
) -> None:
    (rest, other), straight, directory = stopped["rest"], stopped["straight"], stopped["in"]
    assert rest.returncode == other.returncode == 0, rest.stderr + other.stderr
    assert straight.returncode == 0, straight.stderr
    assert "resumed from two/checkpoints/step-00000" in rest.stdout
    assert "layout: 2 rank(s)" in rest.stdout and other.stdout == ""
    assert "resumed" not in straight.stdout
    expected = logged(directory / "one")
    assert [line["step"] for line in expected] == [1, 2, 3]
    assert len(expected[0]) > 40 and expected[0]["loss"] != expected[1]["loss"]
    assert logged(directory / "two") == expected


# make.


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
