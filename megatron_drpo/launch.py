"""How the processes of a run start, on one machine or many: from an environment to ranks.

L3, in front of the command line. In: the environment that a person, Slurm, Kubernetes or torchrun
left, and flags, which pass through untouched. Out: this process as one rank, or as the agent that
starts the ranks of its node by torchrun; the exit status of a run. Contradictions are refused
before anything starts. Only the standard library is imported until torch is needed, so that a
Python without torch can be told so.

| variable | meaning | otherwise |
|---|---|---|
| `NNODES` | machines | nodes of the srun step, `PET_NNODES`, or 1 |
| `NODE_RANK` | which of them this is, from 0 | `SLURM_NODEID`, `PET_NODE_RANK` |
| `MASTER_ADDR` | host name or address of node 0 | first host of the step, `PET_MASTER_ADDR` |
| `MASTER_PORT` | a free port there | `PET_MASTER_PORT`, 20000 + job id mod 10000, or 29500 |
| `GPUS_PER_NODE`, `NPROC_PER_NODE` | ranks of this node | `PET_NPROC_PER_NODE`, its GPUs, or 2 |

Ranks that are there already are not started again: processes with `RANK`, `WORLD_SIZE` and
`LOCAL_RANK`, as torchrun sets them, and tasks of an srun step that has more tasks than nodes.
`PET_*` are Kubeflow's; beside them its `RANK` counts pods, and without `LOCAL_RANK` makes none of
them a rank.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_drpo.errors import ConfigError

STOP = signal.SIGUSR1
"""Sent to a launcher or to a rank, it asks for a checkpoint and an early end (`train.Run`)."""

_PORT = 29500
_HELP = {"--help", "-h"}

Prepare = Callable[[list[str], int], list[str]]
"""(flags, number of ranks of the run) -> flags; has nothing left to do for what it returned."""


@dataclass(frozen=True)
class Rank:
    """This process is one rank of a run.

    Example: Rank(world_size=16, environment={"RANK": "9", "WORLD_SIZE": "16", ...}).
    """

    world_size: int
    environment: Mapping[str, str]
    """What torchrun would have set; empty where somebody has."""


@dataclass(frozen=True)
class Agent:
    """This process starts the ranks of one node.

    Example: Agent(num_nodes=2, node_rank=1, num_ranks=8, address="node003", port=29500).
    """

    num_nodes: int
    node_rank: int
    num_ranks: int
    """Of this node, and of every other."""
    address: str | None
    """Of node 0, where ranks find each other; None on a single node."""
    port: int

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.num_nodes * self.num_ranks

    @property
    def arguments(self) -> list[str]:
        """What to tell torchrun, before the program and its flags."""
        ranks = ["--nproc-per-node", str(self.num_ranks)]
        if self.address is None:
            return ["--standalone", "--nnodes", "1", *ranks]
        where = ["--nnodes", str(self.num_nodes), "--node-rank", str(self.node_rank)]
        return [*where, "--master-addr", self.address, "--master-port", str(self.port), *ranks]


def plan(environment: Mapping[str, str], count_gpus: Callable[[], int]) -> Agent | Rank:
    """What this process is, by its environment.

    Args:
        count_gpus: of this node; called only if the answer depends on it.

    Raises:
        ConfigError: the environment contradicts itself or leaves something open; lists it all.
    """
    read = _Reader(environment)
    if all(read.text(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        world_size = read.number("WORLD_SIZE", 1)
        read.raise_all()
        return Rank(world_size or 1, {})
    step = _read_step(read)
    if step is not None and step.num_tasks > step.num_nodes and not read.text("NODE_RANK"):
        return _rank_of_step(read, step)
    return _agent(read, step, count_gpus)


@dataclass(frozen=True)
class _Step:
    """What srun started, and this process's place in it."""

    num_nodes: int
    num_tasks: int
    node: int
    task: int
    task_on_node: int
    hosts: str


class _Reader:
    """The environment, with the problems found in it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._problems: list[str] = []

    def text(self, *names: str) -> str:
        """The value of the first of these variables that has one, or nothing."""
        return next(filter(None, (self._environment.get(name) for name in names)), "")

    def number(self, name: str, least: int) -> int | None:
        """A whole number, or None if the variable is not set or holds something else."""
        text = self.text(name)
        if not text:
            return None
        if not text.isdecimal() or int(text) < least:
            self.refuse(f"{name} {text}: must be a whole number of at least {least}; mend or unset")
            return None
        return int(text)

    def first_number(self, least: int, *names: str) -> int | None:
        """The number that the first of these variables holds, of those that are set."""
        return next((self.number(name, least) for name in names if self.text(name)), None)

    def refuse(self, problem: str) -> None:
        self._problems.append(problem)

    def raise_all(self) -> None:
        if self._problems:
            raise ConfigError("\n".join(dict.fromkeys(self._problems)))


def _read_step(read: _Reader) -> _Step | None:
    """The srun step that this process belongs to; a batch script has variables of its job only."""
    if not read.text("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"):
        nodes = read.first_number(1, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
        if nodes and nodes > 1 and not read.text("NNODES"):
            read.refuse(
                f"SLURM_JOB_NUM_NODES {nodes}: this process was not started by srun, and would "
                "train on one node; start it with srun (examples/slurm/train.sbatch), or set "
                "NNODES=1 for this node alone"
            )
        return None
    return _Step(
        read.first_number(1, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1,
        read.first_number(1, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1,
        read.number("SLURM_NODEID", 0) or 0,
        read.number("SLURM_PROCID", 0) or 0,
        read.number("SLURM_LOCALID", 0) or 0,
        read.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    )


def first_host(hosts: str) -> str:
    """The first of a list of hosts as Slurm writes them: "gpu[007-009,012],login1" -> "gpu007".

    `scontrol show hostnames` says the same, but containers have none.
    """
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts)
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0] if first else "")


def _rank_of_step(read: _Reader, step: _Step) -> Rank:
    """One task is one rank."""
    on_node, uneven = divmod(step.num_tasks, step.num_nodes)
    if uneven:
        read.refuse(
            f"SLURM_STEP_NUM_TASKS {step.num_tasks}: are not the same number on each of "
            f"SLURM_STEP_NUM_NODES {step.num_nodes}; start srun with --ntasks-per-node"
        )
    nodes = read.number("NNODES", 1)
    if nodes and nodes != step.num_nodes:
        _refuse_nodes(read, nodes, step)
    ranks = read.first_number(1, "NPROC_PER_NODE", "GPUS_PER_NODE")
    if ranks and ranks != on_node:
        read.refuse(
            f"{'NPROC_PER_NODE' if read.text('NPROC_PER_NODE') else 'GPUS_PER_NODE'} {ranks}: "
            f"srun has started {on_node} tasks per node, and each of them is a rank; unset it, or "
            "start srun with --ntasks-per-node=1 for one task that starts the ranks of its node"
        )
    address = read.text("MASTER_ADDR") or first_host(step.hosts)
    if not address:
        _refuse_no_address(read, f"SLURM_STEP_NUM_NODES {step.num_nodes}")
    port = _port(read)
    # Slurm may show each task its own GPU alone, which then is the first one there.
    devices = read.text("CUDA_VISIBLE_DEVICES")
    gpus = read.number("SLURM_GPUS_ON_NODE", 0) or 0
    bound = bool(devices) and "," not in devices and gpus >= on_node
    read.raise_all()
    return Rank(
        step.num_tasks,
        {
            "RANK": str(step.task),
            "WORLD_SIZE": str(step.num_tasks),
            "LOCAL_RANK": "0" if bound else str(step.task_on_node),
            "LOCAL_WORLD_SIZE": str(on_node),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        },
    )


def _agent(read: _Reader, step: _Step | None, count_gpus: Callable[[], int]) -> Agent:
    nodes = read.number("NNODES", 1)
    in_step = step is not None and not read.text("NODE_RANK")
    if nodes and step and in_step and nodes not in (1, step.num_nodes):
        _refuse_nodes(read, nodes, step)
    if re.fullmatch(r"\d+:\d+", read.text("PET_NNODES")) and not read.text("NNODES"):
        low, high = read.text("PET_NNODES").split(":")
        read.refuse(
            f"PET_NNODES {low}:{high}: the number of nodes may not change during a run; take the "
            "elasticPolicy out of the PyTorchJob"
        )
        nodes = 1
    if nodes is None:
        nodes = step.num_nodes if step else read.number("PET_NNODES", 1) or 1
    rank = read.first_number(0, "NODE_RANK", *(["SLURM_NODEID"] if step else ["PET_NODE_RANK"]))
    if nodes == 1 and in_step:
        rank = 0  # NNODES=1: every node of the step is by itself
    elif rank is None:
        rank = 0
        if nodes > 1 and not read.text("NODE_RANK"):
            read.refuse(
                f"NNODES {nodes}: NODE_RANK is not set; give each node its own, from 0 to "
                f"{nodes - 1}"
            )
        elif read.text("RANK") and not read.text("PET_NNODES"):
            read.refuse(
                f"RANK {read.text('RANK')}: LOCAL_RANK is not set, so this may count ranks or "
                "nodes; set LOCAL_RANK and WORLD_SIZE if this process is a rank, or NODE_RANK and "
                "NNODES if it is to start the ranks of its node, or unset it"
            )
    if rank >= nodes:
        read.refuse(
            f"NODE_RANK {rank}: with NNODES {nodes} the nodes are 0 to {nodes - 1}; mend one of "
            "them"
        )
    address = None
    if nodes > 1:
        address = read.text("MASTER_ADDR") or (first_host(step.hosts) if step else "")
        address = address or read.text("PET_MASTER_ADDR")
        if not address:
            _refuse_no_address(read, f"NNODES {nodes}")
    port = _port(read)
    ranks = _num_ranks(read, count_gpus)
    read.raise_all()
    return Agent(nodes, rank, ranks, address, port)


def _refuse_nodes(read: _Reader, nodes: int, step: _Step) -> None:
    read.refuse(
        f"NNODES {nodes}: this srun step has {step.num_nodes} nodes; unset NNODES, which Slurm "
        f"tells, or start srun with --nodes={nodes}"
    )


def _refuse_no_address(read: _Reader, nodes: str) -> None:
    read.refuse(f"{nodes}: MASTER_ADDR is not set; give every node the host name of node 0")


def _port(read: _Reader) -> int:
    job = read.number("SLURM_JOB_ID", 0)
    # Jobs that share a node must not meet; below the ports that the kernel gives out.
    default = _PORT if job is None else 20000 + job % 10000
    port = read.first_number(1, "MASTER_PORT", "PET_MASTER_PORT") or default
    if port > 65535:
        read.refuse(f"MASTER_PORT {port}: ports end at 65535; take another")
    return port


def _num_ranks(read: _Reader, count_gpus: Callable[[], int]) -> int:
    """Ranks of this node: as many as asked for, or as it has GPUs, or 2 on a CPU."""
    ranks, gpus = read.number("NPROC_PER_NODE", 1), read.number("GPUS_PER_NODE", 1)
    if ranks and gpus and ranks != gpus:
        read.refuse(
            f"NPROC_PER_NODE {ranks}: GPUS_PER_NODE is {gpus}, and both say how many ranks to "
            "start here; unset one"
        )
    if gpus and 0 < count_gpus() < gpus:
        read.refuse(
            f"GPUS_PER_NODE {gpus}: torch sees {count_gpus()} GPUs on this node; use at most "
            f"{count_gpus()}, or NPROC_PER_NODE={gpus} with --device cpu"
        )
    wanted = ranks or gpus
    if not wanted and read.text("PET_NPROC_PER_NODE") not in ("auto", "gpu", "cpu"):
        wanted = read.number("PET_NPROC_PER_NODE", 1)
    return wanted or count_gpus() or 2


def main(
    argv: Sequence[str] | None = None,
    *,
    program: Sequence[str] = ("--module", "megatron_drpo"),
    prepare: Prepare = lambda argv, world_size: argv,
) -> int:
    """Run this process as what `plan` finds it to be; the exit status.

    Args:
        argv: flags; by default those of this process.
        program: what torchrun starts on each rank, before the flags: a file, or a module.
        prepare: completes the flags, in the launcher or in ranks that somebody else has started.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # Blocked, it waits to be looked at and ends nobody: neither this process while it starts, nor
    # ranks or what they start, which all inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})
    # On a CPU the threads of several ranks would wait for each other by spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("torch") is None:
        print(
            f"error: {sys.executable} has no torch; run: make env, then: . .venv/bin/activate",
            file=sys.stderr,
        )
        return 2
    from megatron_drpo import cli

    return cli.exit_status(lambda: _start(given, program, prepare))


def _start(argv: list[str], program: Sequence[str], prepare: Prepare) -> int:
    from megatron_drpo import arguments, cli

    if _HELP & set(argv):
        return cli.start(argv)
    found = plan(os.environ, _count_gpus)
    if isinstance(found, Rank):
        if found.environment and os.isatty(0):
            raise ConfigError(
                f"SLURM_STEP_NUM_TASKS {found.world_size}: in a shell of srun --pty this process "
                "would wait for the other tasks, which are shells; set NNODES=1 NODE_RANK=0 to "
                "start the ranks here"
            )
        os.environ.update(found.environment)
    argv = prepare(argv, found.world_size)
    if isinstance(found, Rank):
        return cli.start(argv)
    # What is mistyped is answered at once, and what starts nothing is answered here.
    _, options = arguments.parse(argv)
    if options.dry_run:
        os.environ["RANK"] = "0"
        if _is_told(found):
            os.environ["WORLD_SIZE"] = str(found.world_size)
        return cli.start(argv)
    return _run_agent(found, [*found.arguments, *program, *argv])


def _is_told(agent: Agent) -> bool:
    """Whether the number of ranks is more than the guess for a machine without GPUs."""
    names = ("NPROC_PER_NODE", "GPUS_PER_NODE", "PET_NPROC_PER_NODE")
    return agent.num_nodes > 1 or _count_gpus() > 0 or any(map(os.environ.get, names))


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _pass_on_stop() -> None:
    """Wait for `STOP` and then send it to the ranks, also to those that start later."""
    import psutil

    signal.sigwait({STOP})
    print(f"{STOP.name}: the run will be saved and end after this step", file=sys.stderr)
    while True:
        for child in psutil.Process().children():
            try:
                child.send_signal(STOP)  # again and again, as it is held once
            except psutil.NoSuchProcess:
                continue
        time.sleep(1)


def _run_agent(agent: Agent, arguments: list[str]) -> int:
    """Start torchrun in this process; the exit status of the rank that failed first, or 0.

    Raises:
        ConfigError: the nodes did not find each other.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from megatron_drpo.cli import STOPPED

    threading.Thread(target=_pass_on_stop, daemon=True).start()
    # torchrun's log and traceback would bury what the failing rank has said.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        # Once one rank has stopped, torchrun ends those that are not quite as far.
        if any(failure.exitcode == STOPPED for failure in error.failures.values()):
            return STOPPED
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            ended = f"error: rank {rank} was ended by {failure.signal_name()}"
            print(f"{ended} (SIGKILL often means: out of memory)", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except (DistNetworkError, DistStoreError) as error:
        where = f"MASTER_ADDR {agent.address} MASTER_PORT {agent.port}"
        raise ConfigError(
            f"{where}: the {agent.num_nodes} nodes did not find each other "
            f"({str(error).splitlines()[0]}); start all of them within ten minutes, with the "
            "address of node 0 and a port there that is free and reachable"
        ) from error
    except SignalException as stop:  # Ctrl-C, or a scheduler's SIGTERM; the ranks have ended
        print(f"error: ended by {stop.sigval.name}", file=sys.stderr)
        return 128 + stop.sigval
    return 0
