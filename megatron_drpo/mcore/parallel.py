"""Process groups: torch.distributed and Megatron's parallel_state, started and ended in one place.

Out: `Layout`, the frozen record that everybody above asks for ranks, sizes and groups.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_drpo.config import ParallelConfig
from megatron_drpo.device import Device
from megatron_drpo.errors import DrpoError, ServersError


@dataclass(frozen=True)
class Layout:
    """Where this rank stands. tp: tensor, pp: pipeline, vp: chunks per stage, cp: context, dp: data
    parallel; ep, etp: expert and expert tensor parallel.

    Number the ranks of a pipeline stage by g = tp_rank + tp_size * (cp_rank + cp_size * dp_rank).
    The experts' own layout covers the same ranks: etp_rank = g % etp_size, ep_rank = g // etp_size
    % ep_size, edp_rank = g // (etp_size * ep_size), so that those with edp_rank 0 have every expert
    once.

    Generation has no use for context parallelism: there the ranks of a context-parallel group are
    replicas of the model like those of data parallelism.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    replica_rank: int
    """cp_rank + cp_size * dp_rank, of `num_replicas`: whose prompts this rank generates for."""
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    edp_rank: int
    sequence_parallel: bool
    first_stage_layers: int | None
    """Layers of the first pipeline stage, if its number is given."""
    last_stage_layers: int | None
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    draw_group: dist.ProcessGroup
    """The ranks of `pp_group`, for what the last stage tells the others while hidden states travel
    in that one."""
    cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    """Ranks that hold all experts of a layer together, if each holds whole ones."""
    etp_group: dist.ProcessGroup
    """Ranks that hold the parts of the same experts."""
    expert_peers: dist.ProcessGroup
    """All ranks that compute a layer's experts together: their passes go in step."""
    replica_group: dist.ProcessGroup
    """The tensor- and pipeline-parallel ranks of this replica, gloo whatever the device."""
    control_group: dist.ProcessGroup
    """All ranks, gloo whatever the device: for objects and decisions."""
    owns_world: bool
    """True if `initialize` started torch.distributed, so that `destroy` ends it."""

    @property
    def num_replicas(self) -> int:
        """Copies of the dense layers, which generate for themselves."""
        return self.cp_size * self.dp_size

    @property
    def shares_experts(self) -> bool:
        """True if several replicas hold the experts together, so that their passes go in step."""
        return self.ep_size * self.etp_size > self.tp_size

    @property
    def is_replica_source(self) -> bool:
        """True on the one rank that speaks for its replica."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the logits are."""
        return self.pp_rank == self.pp_size - 1

    def gather_objects(self, value: Any) -> list[Any]:
        """On every rank, each rank's `value` that is not None, in rank order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return [value for value in values if value is not None]

    def all_agree(self, holds: bool) -> bool:
        """True if `holds` on every rank: one decision for all, so that no rank acts alone."""
        flag = torch.tensor(int(holds))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.control_group)
        return bool(flag)

    def gather_to_main(self, value: Any) -> list[Any]:
        """The values of all ranks that are not None, in the order of ranks; [] but on rank 0."""
        received: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, received, group=self.control_group)
        return [entry for entry in received or () if entry is not None]

    def any_expert_peer(self, holds: bool, device: torch.device) -> bool:
        """True if `holds` on this rank, or on one that it shares the experts of a layer with."""
        if not self.shares_experts:
            return holds
        flag = torch.tensor(int(holds), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.expert_peers)
        return bool(flag)

    def share(self, value: Any) -> Any:
        """The `value` of the replica's source, on all of its ranks."""
        values = [value]
        dist.broadcast_object_list(values, group=self.replica_group, group_src=0)
        return values[0]

    def raise_together(
        self, problems: Sequence[str], kind: type[DrpoError], remedy: str | None = None
    ) -> None:
        """Raise the problems of all ranks on every rank, if there are any; collective.

        Args:
            problems: of this rank.
            remedy: a last line of the message.
        """
        found = [problem for each in self.gather_objects(problems) for problem in each]
        if found:
            raise kind("\n".join([*dict.fromkeys(found), *([remedy] if remedy else [])]))

    def wait_for(self, future: Future[Any] | None, seconds: float = 0.2) -> None:
        """Return once the futures of all ranks are done, however long that takes.

        Ranks that only wait keep talking, so that no collective comes near its time limit.

        Args:
            future: of this rank, if it has one.

        Raises:
            ServersError: on every rank, as soon as one of the futures has failed.
        """
        while True:
            done = future is None or future.done()
            error = future.exception() if future is not None and done else None
            state = torch.tensor([int(done), int(error is None)])
            dist.all_reduce(state, dist.ReduceOp.MIN, group=self.control_group)
            if not state[1]:
                break
            if state[0]:
                return
            time.sleep(seconds)
        if error is not None and not isinstance(error, DrpoError):
            raise error  # a defect: with its traceback, where it is
        self.raise_together([] if error is None else [str(error)], ServersError)

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def __str__(self) -> str:
        chunks = f" x {self.vp_size} chunks" if self.vp_size > 1 else ""
        sequence = " with SP" if self.sequence_parallel else ""
        context = f"CP {self.cp_size}, " if self.cp_size > 1 else ""
        experts = f", EP {self.ep_size}" if self.ep_size > 1 else ""
        if self.etp_size != self.tp_size:
            experts += f", expert TP {self.etp_size}"
        return (
            f"{self.world_size} rank(s): TP {self.tp_size}{sequence}, PP {self.pp_size}{chunks}, "
            f"{context}DP {self.dp_size}{experts}"
        )


def initialize(config: ParallelConfig, device: Device, seed: int) -> Layout:
    """Start the process groups; rank and world size come from torchrun's environment."""
    minutes = config.distributed_timeout_minutes
    timeout = timedelta(minutes=minutes)
    owns_world = not dist.is_initialized()
    if owns_world:
        dist.init_process_group(device.backend, timeout=timeout)
    vp_size = config.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vp_size if vp_size > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=minutes,  # type: ignore[arg-type]  # a timedelta's minutes
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    control: Any = dist.new_group(backend="gloo", timeout=timeout)
    groups: Any = parallel_state  # Megatron's annotations allow for ranks outside a group
    # Sorted, so that the replica's source comes first.
    replica = _twin(groups.get_model_parallel_group(), control, timeout, "gloo")
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vp_size=vp_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        replica_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=groups.get_expert_tensor_parallel_rank(),
        etp_size=groups.get_expert_tensor_parallel_world_size(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        sequence_parallel=config.sequence_parallel,
        first_stage_layers=config.decoder_first_pipeline_num_layers,
        last_stage_layers=config.decoder_last_pipeline_num_layers,
        tp_group=groups.get_tensor_model_parallel_group(),
        pp_group=groups.get_pipeline_model_parallel_group(),
        draw_group=_twin(groups.get_pipeline_model_parallel_group(), control, timeout),
        cp_group=groups.get_context_parallel_group(),
        ep_group=groups.get_expert_model_parallel_group(),
        etp_group=groups.get_expert_tensor_parallel_group(),
        expert_peers=groups.get_expert_tensor_and_model_parallel_group(),
        replica_group=replica,
        control_group=control,
        owns_world=owns_world,
    )


def _twin(
    group: dist.ProcessGroup,
    control: dist.ProcessGroup,
    timeout: timedelta,
    backend: str | None = None,
) -> Any:
    """Another group of the ranks of `group`; collective over all ranks, who form such groups."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, tuple(dist.get_process_group_ranks(group)), group=control)
    # All ranks have to make all groups, in the same order.
    twins: dict[Any, Any] = {
        ranks: dist.new_group(list(ranks), timeout=timeout, backend=backend)
        for ranks in sorted(set(every))
    }
    return twins[every[dist.get_rank()]]


def destroy(layout: Layout) -> None:
    """End what `initialize` started."""
    parallel_state.destroy_model_parallel()
    if layout.owns_world:
        dist.destroy_process_group()
