"""Megatron's settings of precision, recomputation and offloading, from ours.

In: the groups of the configuration. Out: arguments of Megatron's configurations of model and
optimizer.
"""

from __future__ import annotations

from typing import Any

from megatron_drpo.config import MemoryConfig, OptimizerConfig, PrecisionConfig


def of_products(config: PrecisionConfig) -> dict[str, Any]:
    """Of FP8: arguments of `TransformerConfig`."""
    if config.fp8_format is None:
        return {}
    return dict(
        fp8=config.fp8_format,
        fp8_recipe=config.fp8_recipe,
        fp8_margin=config.fp8_margin,
        fp8_amax_history_len=config.fp8_amax_history_len,
        fp8_amax_compute_algo=config.fp8_amax_compute_algo,
        fp8_param=config.fp8_param_gather,
        first_last_layers_bf16=config.first_last_layers_bf16,
        num_layers_at_start_in_bf16=config.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=config.num_layers_at_end_in_bf16,
    )


def of_activations(config: MemoryConfig) -> dict[str, Any]:
    """Of recomputation and offloading: arguments of `TransformerConfig`."""
    return dict(
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        recompute_modules=list(config.recompute_modules),
        fine_grained_activation_offloading=config.fine_grained_activation_offloading,
        offload_modules=list(config.offload_modules),
    )


def of_optimizer(config: OptimizerConfig) -> dict[str, Any]:
    """Of offloading: arguments of Megatron's `OptimizerConfig`."""
    if not config.optimizer_cpu_offload:
        return {}
    return dict(
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=config.optimizer_offload_fraction,
    )
