"""Megatron's settings of precision, recomputation and offloading, from ours.

In: the groups of the configuration. Out: arguments of Megatron's configurations of model, gradient
buffers and optimizer, and what has to be done for them while a run goes on. What a machine cannot
do was refused before (`megatron_drpo.hardware`); docs/precision.md says what was run and where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_drpo.config import Config, MemoryConfig, PrecisionConfig


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
    full = config.recompute_granularity == "full"
    return dict(
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method if full else None,
        recompute_num_layers=config.recompute_num_layers if full else None,
        recompute_modules=list(config.recompute_modules),
        fine_grained_activation_offloading=config.fine_grained_activation_offloading,
        offload_modules=list(config.offload_modules),
    )


def of_gradients(config: Config) -> dict[str, Any]:
    """Of the buffers of weights and gradients: arguments of `DistributedDataParallelConfig`."""
    return dict(grad_reduce_in_fp32=True, fp8_param_gather=config.precision.fp8_param_gather)


def of_optimizer(config: Config) -> dict[str, Any]:
    """Of FP8 weights and of offloading: arguments of Megatron's `OptimizerConfig`."""
    arguments: dict[str, Any] = {}
    if config.precision.fp8_param_gather:
        arguments["fp8_recipe"] = config.precision.fp8_recipe
    if config.optimizer.optimizer_cpu_offload:
        arguments |= dict(
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=config.optimizer.optimizer_offload_fraction,
            # Megatron offloads along this flag's path: the inner optimizer owns the fp32 masters.
            use_precision_aware_optimizer=True,
        )
    return arguments


def begin_microbatch(model: Any) -> None:
    """Tell Megatron's offloading that a chunk of the model begins to train on a micro-batch."""
    if model.config.fine_grained_activation_offloading and model.training:
        model.preprocess_for_fine_grained_offloading()


class ActivationOffloading:
    """Megatron's offloading of activations, for steps whose numbers of micro-batches differ.

    Megatron records the order of forward and backward passes in its first step and relies on it
    from then on. So it starts afresh where a step has another number of micro-batches, and it is
    off outside of training: scoring and generation save nothing that could be moved.

    Args:
        config: without --fine-grained-activation-offloading nothing is done.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self._manager: Any = None
        self._num_rows: int | None = None
        if config.fine_grained_activation_offloading:
            # Transformer Engine is there, or the flag would have been refused.
            from megatron.core.pipeline_parallel import fine_grained_activation_offload as megatron

            self._manager = megatron.PipelineOffloadManager
            self._manager.get_instance().disable_offload()

    @contextmanager
    def step(self, num_rows: int) -> Iterator[None]:
        """Around the forward and backward passes of a step of `num_rows` micro-batches."""
        if self._manager is None:
            yield
            return
        if num_rows != self._num_rows:
            self._manager.reset_instance()
            self._num_rows = num_rows
        self._manager.get_instance().enable_offload()
        try:
            yield
        finally:
            self._manager.get_instance().disable_offload()
