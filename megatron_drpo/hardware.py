"""What the settings of precision and memory need of the machine, its libraries and the model.

L3, called by `preflight`. In: the configuration, the model's architecture and a `Machine`. Out:
what cannot be, one message each, all at once. The rules are those of Transformer Engine and of
megatron-core 0.16 to 0.19, which would stop a run much later, or not at all; what needs neither
machine nor model is checked by the groups of `config` themselves.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.config import Config, RecomputeModule
from megatron_drpo.device import Device
from megatron_drpo.plan.layouts import stage_layers

Version = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """Example: Machine(device, "NVIDIA H100", (9, 0), cuda=(12, 9), transformer_engine=(2, 9))."""

    device: Device
    gpu: str | None = None
    """Name of this rank's GPU."""
    capability: Version | None = None
    """Compute capability of this rank's GPU."""
    cuda: Version | None = None
    """Of torch."""
    transformer_engine: Version | None = None
    """None: it is not installed."""
    keeps_weights_on_device: bool = False
    """Transformer Engine from 2.10 on is told so by NVTE_CPU_OFFLOAD_V1=1 in the environment."""


def look(device: Device) -> Machine:
    """The machine that this process runs on."""
    keeps = os.environ.get("NVTE_CPU_OFFLOAD_V1", "0") == "1"
    engine = _installed("transformer-engine")
    cuda = None if torch.version.cuda is None else _version(torch.version.cuda)
    if device.kind == "cpu":
        return Machine(device, None, None, cuda, engine, keeps)
    gpu, capability = (
        torch.cuda.get_device_name(device.index),
        torch.cuda.get_device_capability(device.index),
    )
    return Machine(device, gpu, capability, cuda, engine, keeps)


def problems(config: Config, architecture: Architecture | None, machine: Machine) -> list[str]:
    """What the machine, its libraries or the model do not allow; each names flag and remedy.

    Args:
        architecture: None if it could not be read; then only the rest is checked.
    """
    found = [*_fp8(config, machine), *_offloading(config, machine)]
    found += _layernorm_and_act(config, machine)
    if architecture is not None:
        found += [*_output_layer(config, architecture), *_fp8_sizes(config, architecture)]
        found += _recomputed_layers(config, architecture)
        found += _modules_of(config, architecture, machine)
    return found


# --- FP8 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """Where Transformer Engine computes a recipe."""

    least: Version
    """Compute capability."""
    below: Version | None
    cuda: Version | None
    engine: Version
    """Of Transformer Engine."""


_RECIPES = {
    "delayed": _Recipe((8, 9), None, None, (2, 1)),
    "tensorwise": _Recipe((8, 9), None, None, (2, 2)),
    "blockwise": _Recipe((9, 0), None, (12, 9), (2, 3)),
    "mxfp8": _Recipe((10, 0), (12, 0), None, (2, 1)),
}
_ADA_CUDA = (12, 1)
"""Which GPUs of capability 8.9 need."""


def _fp8(config: Config, machine: Machine) -> Iterator[str]:
    numbers, impl = config.precision, config.model.transformer_impl
    if numbers.fp8_format is None:
        return
    name = f"--fp8-format {numbers.fp8_format}"
    both = f"{name} --fp8-recipe {numbers.fp8_recipe}"
    needs, engine = _RECIPES[numbers.fp8_recipe], machine.transformer_engine
    if machine.device.kind == "cpu":
        yield (
            f"{name}: needs a GPU with Transformer Engine, but this run is on the CPU "
            f"({machine.device.reason}); drop it"
        )
    elif engine is None:
        yield (
            f"{name}: needs Transformer Engine, which is not installed; use an NGC PyTorch "
            "container, or drop it"
        )
    elif engine < needs.engine:
        yield (
            f"{both}: needs Transformer Engine {_text(needs.engine)}, but {_text(engine)} is "
            "installed; use a newer NGC PyTorch container, or another recipe"
        )
    if machine.device.kind != "cpu":
        yield from _fp8_gpu(both, needs, machine)
    if impl == "local":
        yield (
            f"{name} --transformer-impl local: Megatron's own layers compute no FP8; use "
            "transformer_engine or auto"
        )
    if not config.model.bf16:
        yield f"{name}: needs --bf16, for what is not computed in FP8; add it"
    if numbers.first_last_layers_bf16 and numbers.fp8_recipe == "delayed":
        yield (
            "--first-last-layers-bf16 --fp8-recipe delayed: Megatron reduces the largest values of "
            "all layers together, so none can be left out; use another recipe"
        )
    if numbers.fp8_param_gather:
        if numbers.fp8_recipe == "mxfp8":
            yield (
                "--fp8-param-gather --fp8-recipe mxfp8: Megatron gathers such weights through the "
                "gradients' memory, which is not set up here; drop --fp8-param-gather"
            )
        if not config.optimizer.use_distributed_optimizer:
            yield (
                "--fp8-param-gather --no-use-distributed-optimizer: it is the distributed "
                "optimizer that gathers; drop one of both"
            )
        if config.optimizer.optimizer_cpu_offload and numbers.fp8_recipe != "delayed":
            yield (
                f"--fp8-param-gather --fp8-recipe {numbers.fp8_recipe} --optimizer-cpu-offload: "
                "Megatron updates FP8 weights from the host with delayed scaling only; drop one"
            )


def _fp8_gpu(name: str, needs: _Recipe, machine: Machine) -> Iterator[str]:
    have, cuda = machine.capability or (), machine.cuda or ()
    if have < needs.least or (needs.below and have >= needs.below):
        below = f" and below {_text(needs.below)}" if needs.below else ""
        fitting = [
            recipe
            for recipe, other in _RECIPES.items()
            if have >= other.least and not (other.below and have >= other.below)
        ]
        remedy = f"use --fp8-recipe {' or '.join(fitting)}" if fitting else "drop --fp8-format"
        yield (
            f"{name}: needs a GPU of compute capability {_text(needs.least)} or more{below}, but "
            f"{machine.gpu} has {_text(have)}; {remedy}"
        )
        return
    least = needs.cuda or (_ADA_CUDA if have == (8, 9) else None)
    if least and cuda < least:
        yield (
            f"{name}: needs CUDA {_text(least)} on {machine.gpu}, but torch was built for "
            f"{_text(cuda)}; use a newer NGC PyTorch container, or another recipe"
        )


def _fp8_sizes(config: Config, architecture: Architecture) -> Iterator[str]:
    """Every side of a product in FP8 is a multiple of 16 or 32; rows of tokens are padded to it."""
    numbers, parallel = config.precision, config.parallel
    if numbers.fp8_format is None:
        return
    multiple, tp = numbers.row_multiple, parallel.tensor_model_parallel_size
    experts = bool(architecture.num_experts)
    ffn_tp = parallel.expert_tensor_size if experts else tp
    sides = {
        "hidden_size": (architecture.hidden_size, 1),
        "query size": (architecture.query_size, tp),
        "query, key and value size": (
            architecture.query_size + 2 * architecture.key_value_size,
            tp,
        ),
        "ffn_hidden_size": (architecture.ffn_hidden_size, ffn_tp),
    }
    uneven = [
        f"{name} {size}" + (f" / {ranks} ranks" if ranks > 1 else "")
        for name, (size, ranks) in sides.items()
        if size % ranks == 0 and size // ranks % multiple  # that ranks divide it is said elsewhere
    ]
    if uneven:
        yield (
            f"--fp8-format {numbers.fp8_format} --fp8-recipe {numbers.fp8_recipe}: the sides of "
            f"each product must be multiples of {multiple} on every rank, but the model "
            f"(config.json) has {', '.join(uneven)}; use fewer tensor-parallel ranks, or drop "
            "--fp8-format"
        )
    if numbers.first_last_layers_bf16:
        most = architecture.num_layers // parallel.pipeline_model_parallel_size
        for side in ("start", "end"):
            count = getattr(numbers, f"num_layers_at_{side}_in_bf16")
            if count > most:
                yield (
                    f"--num-layers-at-{side}-in-bf16 {count}: one pipeline stage has {most} layers "
                    f"({architecture.num_layers} / {parallel.pipeline_model_parallel_size}); use "
                    "at most as many"
                )


def _output_layer(config: Config, architecture: Architecture) -> Iterator[str]:
    if config.precision.fp32_output_layer and architecture.tie_word_embeddings:
        yield (
            "--fp32-output-layer: the model's output layer is its embedding (tie_word_embeddings "
            "in config.json), which is computed in bf16; drop it"
        )


# --- Activations and optimizer ------------------------------------------------------------------


def _recomputed_layers(config: Config, architecture: Architecture) -> Iterator[str]:
    memory, parallel = config.memory, config.parallel
    count = memory.recompute_num_layers
    if memory.recompute_granularity != "full" or count is None:
        return
    try:
        of_stages = stage_layers(parallel, architecture.num_layers)
    except ValueError:  # which is said elsewhere
        return
    sizes = {layers // parallel.num_virtual_stages_per_pipeline_rank for layers in of_stages}
    name = (
        f"--recompute-granularity full --recompute-method {memory.recompute_method} "
        f"--recompute-num-layers {count}"
    )
    if count > min(sizes):
        yield f"{name}: a stage of the model has {min(sizes)} layers; use at most as many"
    elif memory.recompute_method == "uniform" and any(size % count for size in sizes):
        text = " and ".join(map(str, sorted(sizes)))
        fitting = [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]
        yield (
            f"{name}: does not divide the {text} layers of a stage; use one of "
            + ", ".join(map(str, fitting))
        )


def _layernorm_and_act(config: Config, machine: Machine) -> Iterator[str]:
    """Two modules whose results Megatron frees and restores, with Transformer Engine's help."""
    memory, numbers = config.memory, config.precision
    if memory.recompute_granularity != "selective":
        return
    engine = machine.transformer_engine
    for module in sorted({"layernorm", "moe_act"} & set(memory.recompute_modules)):
        name = f"--recompute-modules {module}"
        if not uses_engine(config, machine):
            others = [each for each in get_args(RecomputeModule) if each not in _WITH_ENGINE]
            yield (
                f"{name}: Megatron computes it again with Transformer Engine's layers on a GPU "
                f"only; use {', '.join(others)}"
            )
        if numbers.fp8_format is not None and numbers.fp8_recipe == "delayed":
            yield (
                f"{name} --fp8-recipe delayed: delayed scaling would see its values twice; use "
                "another recipe, or recompute something else"
            )
        elif numbers.fp8_format is not None and engine is not None and engine < (2, 6):
            yield (
                f"{name} --fp8-format {numbers.fp8_format}: needs Transformer Engine 2.6, but "
                f"{_text(engine)} is installed; use a newer NGC PyTorch container"
            )


_WITH_ENGINE = ("layernorm", "moe_act")
_OF_EXPERTS = {"moe", "moe_act", "expert_fc1"}


def _modules_of(config: Config, architecture: Architecture, machine: Machine) -> Iterator[str]:
    """Modules that this model does not have: recomputing or moving them would do nothing."""
    memory, experts = config.memory, bool(architecture.num_experts)
    named = {
        "recompute_modules": memory.recompute_modules
        if memory.recompute_granularity == "selective"
        else (),
        "offload_modules": memory.offload_modules
        if memory.fine_grained_activation_offloading
        else (),
    }
    # Transformer Engine's linear layers hold the norm in front of them; a router has its own.
    fused = {"attn_norm"} | (set() if experts else {"layernorm", "mlp_norm"})
    for name, modules in named.items():
        for module in modules:
            text = f"--{name.replace('_', '-')} {module}"
            if module in _OF_EXPERTS and not experts:
                yield f"{text}: the model has no experts (config.json); drop it"
            elif name == "offload_modules" and module == "core_attn" and architecture.qk_layernorm:
                yield (
                    f"{text}: Megatron frees the memory of queries, keys and values with it, which "
                    f"the norms of queries and keys of this model ({architecture.family}) need "
                    "again; drop it (and attn_proj), or use --recompute-modules core_attn"
                )
            elif module == "mlp" and experts:
                yield f"{text}: every layer of the model has experts (config.json); use moe"
            elif module in fused and uses_engine(config, machine):
                yield (
                    f"{text}: Transformer Engine computes this norm inside the linear layer that "
                    "follows, which keeps its input only; drop it"
                )


def _offloading(config: Config, machine: Machine) -> Iterator[str]:
    memory, optimizer = config.memory, config.optimizer
    on_cpu = machine.device.kind == "cpu"
    if memory.fine_grained_activation_offloading:
        name = "--fine-grained-activation-offloading"
        engine = machine.transformer_engine
        if on_cpu:
            yield (
                f"{name}: moves activations from a GPU to the host, but this run is on the CPU "
                f"({machine.device.reason}); drop it"
            )
        elif not uses_engine(config, machine):
            yield (
                f"{name} --transformer-impl {config.model.transformer_impl}: Megatron does it with "
                "Transformer Engine's layers only; use them (an NGC PyTorch container), or drop it"
            )
        elif engine is not None and engine >= (2, 10) and not machine.keeps_weights_on_device:
            yield (
                f"{name}: Transformer Engine {_text(engine)} would move weights, too; start with "
                "NVTE_CPU_OFFLOAD_V1=1 in the environment"
            )
    if optimizer.optimizer_cpu_offload:
        if on_cpu:
            yield (
                "--optimizer-cpu-offload: this run is on the CPU "
                f"({machine.device.reason}), where the optimizer's state is already; drop it"
            )
        elif machine.transformer_engine is None:
            yield (
                "--optimizer-cpu-offload: Megatron's path of it asks Transformer Engine, which is "
                "not installed; use an NGC PyTorch container, or drop it"
            )
        if not config.model.bf16 or config.precision.fp32_output_layer:
            fp32 = "--fp32-output-layer" if config.model.bf16 else "without --bf16"
            yield (
                f"--optimizer-cpu-offload {fp32}: Megatron cannot load the offloaded state of "
                "weights that are fp32 themselves, so the run could not be resumed; drop one, or "
                "use --bf16"
            )
        if not optimizer.use_distributed_optimizer:
            yield (
                "--optimizer-cpu-offload --no-use-distributed-optimizer: Megatron offloads the "
                "distributed optimizer only; drop one of both"
            )


# --- Versions -----------------------------------------------------------------------------------


def uses_engine(config: Config, machine: Machine) -> bool:
    """Whether the layers are Transformer Engine's rather than Megatron's local ones."""
    return (
        config.model.transformer_impl != "local"
        and machine.device.kind == "cuda"
        and machine.transformer_engine is not None
    )


def _installed(package: str) -> Version | None:
    try:
        return _version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(text: str) -> Version:
    """ "2.9.0+70f53666" -> (2, 9)."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _text(version: Version) -> str:
    return ".".join(map(str, version))
