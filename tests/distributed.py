"""Several gloo processes for one test: started, bounded in time, and cleaned up, here only.

They are forked off a process that has imported torch, transformers and Megatron once for all tests:
each would spend ten seconds with that, and several of them together more.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["transformers", "megatron_drpo.mcore.policy"])


def run_distributed(
    fn: Callable[..., None],
    world_size: int,
    *args: Any,
    timeout: float = 600.0,
    new_processes: bool = False,
) -> None:
    """Call `fn(rank, world_size, *args)` in `world_size` fresh processes with gloo initialised.

    Args:
        fn: a function at the top level of its module, so that a fresh process can import it.
        timeout: seconds after which every process is killed.
        new_processes: start each as a program of its own, which sees environment variables from
            its beginning, as the C library wants them.

    Raises:
        AssertionError: a process failed (with its traceback) or did not end in time (with the
            stacks of those that hung).
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read as torch is imported: no thread is forked
    context = multiprocessing.get_context("spawn") if new_processes else _CONTEXT
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            context.Process(
                target=_child,
                args=(fn, rank, world_size, Path(scratch), timeout, dict(os.environ), args),
            )
            for rank in range(world_size)
        ]
        # Not daemons: saving a checkpoint starts processes of its own.
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            running = list(processes)
            # One failure ends the wait: its peers would only wait for it.
            while running and not any(process.exitcode for process in processes):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                connection.wait([process.sentinel for process in running], timeout=left)
                running = [process for process in running if process.exitcode is None]
        finally:
            for process in processes:
                process.join(2 if any(other.exitcode for other in processes) else 0)
                process.kill()
                process.join()
        if any(process.exitcode != 0 for process in processes):
            notes = [
                f"rank {rank}: exit code {process.exitcode}\n{_read(Path(scratch) / str(rank))}"
                for rank, process in enumerate(processes)
            ]
            raise AssertionError(f"{fn.__name__} failed:\n" + "\n".join(notes))


_worlds = itertools.count(1)


def renew_world(directory: Path) -> None:
    """End every process group of this process and start a new world; collective.

    For a test that goes through many layouts: the groups of each keep some sixty threads.

    Args:
        directory: where all processes can write.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    _init_gloo(directory / f"store-{next(_worlds)}", rank, world_size)


def _init_gloo(store: Path, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _child(
    fn: Callable[..., None],
    rank: int,
    world_size: int,
    scratch: Path,
    timeout: float,
    environment: dict[str, str],
    args: Any,
) -> None:
    os.environ.clear()  # of the server, which may be older than what a test has set
    os.environ |= environment
    torch.set_num_threads(1)
    with (scratch / str(rank)).open("w") as note:
        faulthandler.dump_traceback_later(max(timeout - 5, 1), file=note)
        try:
            from megatron_drpo.mcore import cpu

            cpu.install()
            _init_gloo(scratch / "store", rank, world_size)
            fn(rank, world_size, *args)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=note)
            note.flush()
            os._exit(1)  # an ordinary exit may wait for peers inside gloo
        finally:
            faulthandler.cancel_dump_traceback_later()
