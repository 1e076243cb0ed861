"""The frequencies of rotary embeddings, plain or stretched for a longer context.

In: an `Architecture`. Out: one table, which `mcore` puts into every model it builds, since Megatron
knows of these scalings only Llama 3's, and that for an original length of 8192 alone.
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
    smooth passage is that of the published code); yarn: arXiv 2309.00071, section 3.2.
    """
    channels = torch.arange(0, architecture.kv_channels, 2, dtype=torch.float32)
    frequencies = 1.0 / architecture.rotary_base ** (channels / architecture.kv_channels)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(architecture, scaling)
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


def _yarn(architecture: Architecture, scaling: RopeScaling) -> Tensor:
    """Channels that turn often kept, those that turn seldom / factor, between them a mean of both.

    The passage is linear in the number of the pair of channels, out of kv_channels / 2.
    """
    size, base = architecture.kv_channels, architecture.rotary_base

    def pair(turns: float) -> float:
        """The pair that turns so often over the original length."""
        length = scaling.original_max_position_embeddings
        return (size * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(base))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    numbers = torch.arange(size // 2, dtype=torch.float32)
    kept = 1 - ((numbers - first) / (last - first)).clamp(0, 1)
    radians = base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return 1.0 / (scaling.factor * radians) * (1 - kept) + 1.0 / radians * kept


def yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """What YaRN multiplies rotated queries and keys by (arXiv 2309.00071, section 3.4).

    Args:
        factor: the context is stretched by it.
        mscale, mscale_all_dim: DeepSeek's refinement, the quotient of two such factors; without
            effect if either is 0.
    """

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    return float(of(mscale) / of(mscale_all_dim)) if mscale and mscale_all_dim else of(1)
