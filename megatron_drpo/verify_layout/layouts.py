"""Which layout the run's is compared with: the smallest that holds the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config, MemoryConfig, OptimizerConfig, ParallelConfig
from megatron_drpo.device import Device
from megatron_drpo.dry_run import job_of
from megatron_drpo.errors import ConfigError
from megatron_drpo.mcore.parallel import Layout
from megatron_drpo.plan import layouts
from megatron_drpo.plan.memory import memory
from megatron_drpo.preflight import Inputs

_MOMENTS = 8
"""Bytes of a parameter that Adam keeps once it has made an update, which is never made here."""


def shorten(architecture: Architecture, num_layers: int | None) -> Architecture:
    """The architecture of the model's first layers; of all, if None."""
    if num_layers is None:
        return architecture
    sliding = tuple(n for n in architecture.sliding_layers if n < num_layers)
    return replace(architecture, num_layers=num_layers, sliding_layers=sliding)


def check_depth(config: Config, inputs: Inputs, num_layers: int | None) -> None:
    """Refuse a `--verify-layout-num-layers` that the run's layout cannot have.

    Raises:
        ConfigError: names the numbers that it can.
    """
    possible = _depths(config.parallel, inputs)
    if num_layers is not None and num_layers not in possible:
        raise ConfigError(
            f"--verify-layout-num-layers {num_layers}: the model has "
            f"{inputs.architecture.num_layers} layers, and a pipeline of "
            f"{config.parallel.pipeline_model_parallel_size} stages of "
            f"{config.parallel.num_virtual_stages_per_pipeline_rank} chunk(s), with the layers "
            f"given to its ends, can share out {_listed(possible)} of them"
        )


def _depths(parallel: ParallelConfig, inputs: Inputs) -> list[int]:
    """Numbers of first layers that a layout can have, ascending."""
    models = [inputs.architecture, *(inputs.reference or ())[:1]]
    most = min(model.num_layers for model in models)
    return [number for number in range(1, most + 1) if _can_share_out(parallel, number)]


def _can_share_out(parallel: ParallelConfig, num_layers: int) -> bool:
    try:
        return min(layouts.stage_layers(parallel, num_layers)) > 0
    except ValueError:
        return False


def reference_of(config: Config, inputs: Inputs, layout: Layout, num_layers: int | None) -> Config:
    """The run's configuration under the smallest layout that fits; the same on every rank.

    Pipeline stages before tensor parallelism: they compute what one rank would.

    Raises:
        ConfigError: none fits on fewer ranks than the run's.
    """
    room = min(layout.gather_objects(_room(inputs.device)))
    for size in range(1, max(layout.world_size, 2)):
        found = _fitting(config, inputs, size, room, num_layers)
        if found is not None:
            return found
    depths = [n for n in _depths(config.parallel, inputs) if _fitting(config, inputs, 1, room, n)]
    raise ConfigError(
        f"--verify-layout: no layout of fewer than {layout.world_size} ranks with "
        f"{room / 2**30:.1f} GiB each holds the model, so there is none to compare with; "
        + (
            f"compare its first layers: --verify-layout-num-layers {depths[-1]}"
            if depths
            else "use devices with more memory"
        )
    )


def _fitting(
    config: Config, inputs: Inputs, size: int, room: int, num_layers: int | None
) -> Config | None:
    """The configuration on `size` ranks, if some layout of as many fits into `room` bytes."""
    reference = inputs.reference
    if reference is not None:
        reference = (shorten(reference[0], num_layers), reference[1])
    shortened = replace(
        inputs, architecture=shorten(inputs.architecture, num_layers), reference=reference
    )
    whole = job_of(config, shortened, size)
    if inputs.device.kind == "cpu":  # whose memory they share
        room //= size
    for pp in (pp for pp in range(size, 0, -1) if size % pp == 0):
        candidate = _simple(config, ParallelConfig(size // pp, pp), whole.longest)
        if layouts.problems(candidate, size, whole.architecture, whole.reference):
            continue
        stages = memory(replace(whole, config=candidate, generates=False))
        if max(s.training - _MOMENTS * s.parameters.total for s in stages) <= room:
            return candidate
    return None


def _simple(config: Config, parallel: ParallelConfig, longest: int) -> Config:
    """The configuration with nothing that can be done without, and rows for one sequence."""
    return replace(
        config,
        parallel=replace(
            parallel,
            device=config.parallel.device,
            distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
        ),
        model=replace(config.model, verify_weights=False),  # they were, when the run's layout read
        memory=MemoryConfig(),
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        train=replace(config.train, max_tokens_per_microbatch=longest),
    )


def _room(device: Device) -> int:
    """Bytes that a rank, or on a CPU all ranks of its machine, can still take."""
    if device.kind == "cuda":
        return torch.cuda.mem_get_info(device.torch)[0]
    return psutil.virtual_memory().available


def _listed(numbers: Sequence[int]) -> str:
    """A few numbers for people, the largest among them."""
    return ", ".join(map(str, [*numbers[:3], "...", numbers[-1]] if len(numbers) > 4 else numbers))
