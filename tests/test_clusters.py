"""What starts runs on clusters: the batch script under a Slurm of two shell scripts, and the pods'
command under the variables that Kubeflow's operator sets. No cluster is needed, and none is tested.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_drpo.cli import STOPPED
from tests.test_launch import POD, ROOT, environment

SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
SCRIPTS = sorted(
    path
    for directory in (".ci", "benchmarks", "examples", "tools")
    for path in (ROOT / directory).rglob("*")
    if path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin/sh"))
)
JOB = {
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "drpo", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2", "SLURM_NODEID": "0",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
}  # fmt: skip
"""What a batch script on the first of two nodes is told."""

SRUN = """#!/usr/bin/env bash
# Starts the command once per node, one after the other, as srun does at once; the highest status.
printf '%s\\n' "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
highest=0
for node in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST="gpu[07-08]" \\
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" || {
    status=$?
    ((status > highest)) && highest=$status
  }
done
exit $highest
"""

PYTHON = """#!/usr/bin/env bash
# Stands for Python: what it is given, and with which variables; ends as it is told.
printf '%s\\n' "$SLURM_NODEID: $*" >> python.txt
exit "${STATUS:-0}"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A checkout with nothing but what the batch script needs, and a Slurm in bin/."""
    (tmp_path / "bin").mkdir()
    scontrol = '#!/usr/bin/env bash\necho "$@" > scontrol.txt\n'
    for name, text in {"srun": SRUN, "scontrol": scontrol, "python": PYTHON}.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "train_drpo_gpt.sh", tmp_path / "examples")
    return tmp_path


def submit(cluster: Path, *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm would on the first node of the job."""
    path = f"{cluster / 'bin'}:{environment()['PATH']}"
    for name in ("srun.txt", "python.txt", "scontrol.txt"):
        (cluster / name).unlink(missing_ok=True)
    variables = JOB | {"PATH": path, "PYTHON": str(cluster / "bin" / "python")} | given
    return subprocess.run(
        ["bash", str(SBATCH), *flags], cwd=cluster, env=environment(**variables),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert command, "the extra `test` brings shellcheck"
    done = subprocess.run([command, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_scripts_are_found() -> None:
    assert {"train_drpo_gpt.sh", "train.sbatch"} <= {path.name for path in SCRIPTS}


def test_the_batch_script_starts_the_launcher_on_each_node(cluster: Path) -> None:
    done = submit(cluster, "--hf-model", "my model", "--lr", "1e-6")
    assert done.returncode == 0, done.stderr
    flags = "--hf-model my model --lr 1e-6 --output-dir runs/drpo-4242 --no-progress"
    expected = [f"{node}: examples/train_drpo_gpt.sh {flags}" for node in (0, 1)]
    assert lines(cluster / "python.txt") == expected
    given = lines(cluster / "srun.txt")
    assert given[given.index("bash") + 3] == "my model", "an argument stays one"
    assert "--ntasks-per-node=1" in given and "--cpu-bind=none" in given
    assert not any("container" in line for line in given)
    assert not lines(cluster / "scontrol.txt")


def test_the_launcher_finds_its_place_in_the_step(cluster: Path) -> None:
    """The chain to its end: a mistyped flag is the launcher's answer, on each node."""
    script = str(ROOT / "examples" / "train_drpo_gpt.sh")
    (cluster / "examples" / "train_drpo_gpt.sh").write_text(f'exec bash {script} "$@"\n')
    flags = ["--hf-model", "m", "--prompts", "p", "--lr", "fast"]
    given = {"PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
    done = submit(cluster, *flags, **given)
    assert done.returncode == 2
    assert done.stderr.count("error: --lr") == 2
    wrong = submit(cluster, *flags, **given, NNODES="3")
    assert wrong.stderr.count("error: NNODES 3: this srun step has 2 nodes") == 2
    assert not lines(cluster / "scontrol.txt"), "a mistake is not tried again"


def test_the_batch_script_uses_a_container_if_it_is_given_one(cluster: Path) -> None:
    output = cluster.parent / "elsewhere"
    submit(cluster, IMAGE="/images/drpo.sqsh", MOUNTS="/data:/data", OUTPUT_DIR=str(output))
    given = lines(cluster / "srun.txt")
    assert "--container-image=/images/drpo.sqsh" in given
    assert f"--container-mounts={cluster}:{cluster},{output}:{output},/data:/data" in given
    assert f"--container-workdir={cluster}" in given


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(STOPPED, "", True), (STOPPED, "99", True), (STOPPED, "100", False)]
    + [(status, "", False) for status in (0, 1, 2, 130, 137, 143)],
)
def test_a_stopped_run_goes_back_into_the_queue(
    cluster: Path, status: int, restarts: str, requeued: bool
) -> None:
    done = submit(cluster, STATUS=str(status), SLURM_RESTART_COUNT=restarts)
    assert done.returncode == status
    assert lines(cluster / "scontrol.txt") == (["requeue 4242"] if requeued else [])
    assert ("MAX_REQUEUES" in done.stderr) == (status == STOPPED and not requeued)


def test_the_batch_script_continues_where_there_is_a_checkpoint(cluster: Path) -> None:
    def resumes(**given: str) -> bool:
        assert submit(cluster, **given).returncode == 0
        return all(line.endswith(" --resume") for line in lines(cluster / "python.txt"))

    assert not resumes(OUTPUT_DIR="runs/mine")
    checkpoints = cluster / "runs" / "mine" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert not resumes(OUTPUT_DIR="runs/mine"), "none is whole yet"
    (checkpoints / "latest").write_text("step-000003")
    assert resumes(OUTPUT_DIR="runs/mine")
    assert not resumes()


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir=runs/x"])
def test_the_run_directory_is_named_where_the_batch_script_sees_it(
    cluster: Path, flag: str
) -> None:
    done = submit(cluster, flag, "runs/x")
    assert done.returncode == 2 and "OUTPUT_DIR=DIR" in done.stderr
    assert not lines(cluster / "srun.txt")


def test_slurm_is_asked_for_notice_and_to_take_the_job_back() -> None:
    directives = [
        line.removeprefix("#SBATCH ")
        for line in SBATCH.read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    # To the steps (no B:), as the batch shell would not pass it on.
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(directives)
    assert "--ntasks-per-node=1" in directives
    first = SBATCH.read_text().splitlines().index("set -euo pipefail")
    assert "#SBATCH" not in "\n".join(SBATCH.read_text().splitlines()[first:])


# Kubernetes.


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    text = (ROOT / "examples" / "kubernetes" / "pytorchjob.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def _container(manifests: dict[str, Any], replica: str) -> dict[str, Any]:
    template = manifests["PyTorchJob"]["spec"]["pytorchReplicaSpecs"][replica]["template"]
    (container,) = template["spec"]["containers"]
    return container


def test_all_pods_are_alike_and_have_what_ranks_need(manifests: dict[str, Any]) -> None:
    specs = manifests["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert specs["Master"]["replicas"] == 1
    assert specs["Master"]["template"] == specs["Worker"]["template"]
    # The operator looks for a container of this name, and starts pods again by their status.
    assert {spec["restartPolicy"] for spec in specs.values()} == {"ExitCode"}
    container = _container(manifests, "Worker")
    assert container["name"] == "pytorch"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert manifests["PyTorchJob"]["spec"]["nprocPerNode"] == str(gpus)
    pod = specs["Worker"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
    assert claim == manifests["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in (ROOT / "Dockerfile").read_text()


def test_the_pods_command_is_the_launcher_itself(manifests: dict[str, Any], tmp_path: Path) -> None:
    """It replaces the shell, so that signals reach it, and continues where there is something."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "train_drpo_gpt.sh", tmp_path / "examples")
    python = tmp_path / "python"
    report = "import json, os, sys; print(json.dumps([os.getpid(), sys.argv[1:]]))"
    python.write_text(f"#!{sys.executable}\n{report}\n")
    python.chmod(0o755)
    container = _container(manifests, "Worker")
    (text,) = container["args"]
    command = [*container["command"], text.replace("/data/", f"{tmp_path}/data/")]

    def start() -> list[str]:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(**POD, PYTHON=str(python)),
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        pid, argv = json.loads(process.communicate(timeout=60)[0])
        assert (process.returncode, pid) == (0, process.pid)
        return argv

    first = start()
    assert first[0] == "examples/train_drpo_gpt.sh" and "--resume" not in first
    output = Path(first[first.index("--output-dir") + 1])
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "latest").touch()
    assert start() == [*first, "--resume"]


def test_a_pod_that_goes_asks_its_launcher_to_stop(manifests: dict[str, Any]) -> None:
    container = _container(manifests, "Master")
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["bash", "-c"] and command[2].startswith("kill -USR1 1;")
    specs = manifests["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert specs["Master"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 300
