"""The norm of the local layer spec, where Megatron's own refuses sequence parallelism.

Where it fits: named in the layer spec wherever a layer, the end of the model, or the heads of
queries and keys are normalised without Transformer Engine. It is torch's RMSNorm, whose bits the
generator's own passes rely on (`mcore/dense.py`).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) over the last dimension.

    Args:
        config: under its sequence parallelism each rank normalises other tokens, so Megatron is
            told to add up the ranks' gradients of the weight.
        hidden_size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        # Read by Megatron under this name.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
