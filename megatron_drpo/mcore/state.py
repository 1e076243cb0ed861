"""Training state: everything that a resumed run needs to continue as if it had never stopped.

A checkpoint is a directory `step-NNNNNN` that appears by one rename when all of it is on disk:
Megatron's `dist_checkpointing` shards (model, optimizer), `state.json` (progress, schedule, layout
and configuration) and one safetensors file of random states per rank. The file `latest` beside it
names the newest. Nothing is ever overwritten in place, so a killed save leaves the previous one.

Resuming reads Megatron's own shard index, which is a pickle: only resume from directories that you
trust as you trust the program.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_drpo.checkpoint.hf import copy_settings
from megatron_drpo.checkpoint.resume import (
    LATEST,
    STATE,
    Progress,
    damaged_files,
    digests,
    read_state,
    step_name,
)
from megatron_drpo.config import Config
from megatron_drpo.disk import sync_path, write_atomically
from megatron_drpo.errors import CheckpointError
from megatron_drpo.mcore.policy import Policy
from megatron_drpo.mcore.weights import raise_everywhere


def save_checkpoint(
    directory: Path,
    policy: Policy,
    progress: Progress,
    config: Config,
    settings: Path,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of step `progress.step`; collective over all ranks.

    Args:
        directory: receives `step-NNNNNN` and the file `latest`.
        settings: where config.json and the tokenizer are copied from, so that a checkpoint can be
            converted and loaded by itself.
        keep: newest checkpoints that stay, 0 keeps all.
    """
    layout = policy.layout
    final = directory / step_name(progress.step)
    staging = directory / f".{final.name}.tmp"
    if layout.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while saving
        staging.mkdir(parents=True)
    layout.barrier()
    with _reported(f"{staging}: saving failed; free or mend the disk, then --resume"):
        if policy.num_updates == 0:
            _make_optimizer_state(policy)
        dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(staging))
        save_file(_random_states(), staging / f"random-{layout.rank:05d}.safetensors")
        if layout.rank == 0:
            copy_settings(settings, staging, policy.models[0].config.params_dtype)
    layout.barrier()
    shares = layout.gather_objects(digests(staging, layout.rank, layout.world_size))
    if layout.rank == 0:
        state = {
            "progress": vars(progress),
            "scheduler": policy.scheduler.state_dict(),
            "world_size": layout.world_size,
            "megatron_core": megatron.core.__version__,
            "files": {name: sha256 for share in shares for name, sha256 in share.items()},
            "config": config.flat(),
        }
        (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    layout.barrier()
    if layout.rank == 0:
        # To disk, so that the rename cannot come before them.
        for path in [*staging.rglob("*"), staging]:
            sync_path(path)
        if final.exists():  # the same step again, after resuming from an earlier one
            shutil.rmtree(final)
        staging.rename(final)
        write_atomically(directory / LATEST, final.name)
        if keep:
            # Later steps than this one are those of an abandoned future: not ours to delete.
            past = sorted(old for old in directory.glob("step-*") if old.name <= final.name)
            for old in past[:-keep]:
                shutil.rmtree(old)
    layout.barrier()
    return final


def load_checkpoint(path: Path, policy: Policy) -> Progress:
    """Put a checkpoint's state into `policy`; any layout can read any other's. Collective."""
    state, layout = read_state(path), policy.layout
    raise_everywhere(
        layout,
        lambda: damaged_files(path, state, layout.rank, layout.world_size),
        f"write the name of another checkpoint into {path.parent / LATEST}",
    )
    unreadable = (
        f"{path}: was saved by megatron-core {state['megatron_core']} and cannot be loaded by "
        f"{megatron.core.__version__}; use no older megatron-core than that, or start again in "
        "another --output-dir"
    )
    with torch.no_grad():
        sharded = _sharded_state(policy, is_loading=True)
        with _reported(unreadable):
            # A Path: 0.16 wants one to say that it cannot read what 0.19 has written.
            loaded: Any = dist_checkpointing.load(sharded, path)  # type: ignore[arg-type]
        for number, chunk in enumerate(policy.models):
            chunk.load_state_dict(loaded[f"model{number}"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.scheduler.num_steps = 0  # what is loaded is added to it
    policy.scheduler.load_state_dict(state["scheduler"])
    if state["world_size"] == policy.layout.world_size:
        with _reported(unreadable):
            states = load_file(path / f"random-{policy.layout.rank:05d}.safetensors")
        _set_random_states(states)
    progress = Progress(**state["progress"])
    policy.num_updates = progress.num_updates
    return progress


@contextmanager
def _reported(message: str) -> Iterator[None]:
    """Whatever is raised inside, torch's and Megatron's own or the disk's, as a CheckpointError."""
    try:
        yield
    # torch's CheckpointException is a BaseException.
    except (Exception, CheckpointException) as error:
        reason = (str(error).splitlines() or [""])[-1]  # before it may come whole tracebacks
        raise CheckpointError(f"{message} ({type(error).__name__}: {reason})") from error


def _make_optimizer_state(policy: Policy) -> None:
    """The moments of an optimizer that has made no update yet (each one was skipped): zeros."""
    chained: Any = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    for optimizer in chained:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    # Megatron fills defaults into the metadata it is given: a fresh one for each call. The experts'
    # optimizer is told from the others' by their names, as in Megatron-LM: no prefix for each.
    def metadata() -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
        }

    state: dict[str, Any] = {
        f"model{number}": model.sharded_state_dict(metadata=metadata())
        for number, model in enumerate(policy.models)
    }
    # Megatron wants the parameters of a single chunk without the level of chunks.
    models = state["model0"] if len(policy.models) == 1 else dict(state)
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=metadata()
    )
    return state


def _random_states() -> dict[str, Tensor]:
    """Generator states of this rank. Sampling needs none (it counts); Megatron's dropout does."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    states |= {f"megatron.{name}": value for name, value in tracker.get_states().items()}
    return {name: value.cpu().clone() for name, value in states.items()}


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "megatron."
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(
        {name[len(prefix) :]: value for name, value in states.items() if name.startswith(prefix)}
    )
