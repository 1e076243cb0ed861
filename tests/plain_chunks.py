"""Model chunks without Megatron: bare modules with the names, numbers and shapes of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def plain_chunk(
    parameters: Mapping[str, Tensor],
    num_layers: int,
    *,
    first_layer: int = 0,
    pre_process: bool = True,
    post_process: bool = True,
) -> Any:
    """A chunk of `num_layers` layers with these parameters, by name within the chunk."""
    chunk: Any = nn.Module()
    chunk.pre_process, chunk.post_process = pre_process, post_process
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList(nn.Module() for _ in range(num_layers))
    for number, layer in enumerate(chunk.decoder.layers):
        layer.layer_number = first_layer + number + 1
    for name, value in parameters.items():
        *path, last = name.split(".")
        module = chunk
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(value))
    return chunk
