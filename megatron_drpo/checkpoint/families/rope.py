"""The frequencies of rotary embeddings, plain or stretched for a longer context.

In: an `Architecture`. Out: one table, which `mcore` puts into every model it builds, since Megatron
knows neither linear scaling nor Llama 3's with any other original length than 8192.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_drpo.checkpoint.families.table import Architecture, RopeScaling


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """Radians per position for each pair of channels: fp32 [kv_channels / 2], on the CPU.

    The operations and their order are those of transformers, so that the table is the same to the
    last bit: at position 100,000 a last bit is up to 0.006 radian.

    Sources: RoFormer (arXiv 2104.09864, section 3.2.2); linear: position interpolation
    (arXiv 2306.15595, equation 4); llama3: Llama 3.1 (arXiv 2407.21783 names the base only; the
    smooth passage is that of the published code).
    """
    channels = torch.arange(0, architecture.kv_channels, 2, dtype=torch.float32)
    frequencies = 1.0 / architecture.rotary_base ** (channels / architecture.kv_channels)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths / factor, short ones kept, and between them a mean of both."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    kept = (length / wavelengths - low) / (high - low)
    passage = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    stretched = torch.where(wavelengths > length / low, frequencies / scaling.factor, passage)
    return torch.where(wavelengths < length / high, frequencies, stretched)
