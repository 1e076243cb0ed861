"""Floating-point operations of the model, from its architecture alone.

Where it fits: L2, no tensors. Counts are of one forward pass over the whole model, on all ranks
together; a backward pass does twice as many of each kind. A product of [m, k] and [k, n] counts
2 * m * k * n; norms, softmax and rotary embeddings are left out.
"""

from __future__ import annotations

from megatron_drpo.checkpoint.families import Architecture
from megatron_drpo.packing import AttentionCost


def linear_flops(architecture: Architecture) -> float:
    """Of a token: the products with weights in every layer, and with the output layer's.

    Of a mixture of experts the router counts, and the experts that a token is routed to.
    """
    hidden, query = architecture.hidden_size, architecture.query_size
    attention = hidden * (query + 2 * architecture.key_value_size) + query * hidden
    mlp = 3 * hidden * architecture.ffn_hidden_size  # gate, up and down
    if architecture.num_experts:
        mlp = architecture.num_experts_per_token * mlp + hidden * architecture.num_experts
    layers = architecture.num_layers * (attention + mlp)
    return 2.0 * (layers + hidden * architecture.vocab_size)


def attention_cost(architecture: Architecture) -> AttentionCost:
    """What attention costs a sequence, in units of `linear_flops`.

    Token number i of a sequence sees i keys: over L tokens, scores and weighted sums are two
    products of L^2 / 2 pairs with the channels of all query heads, in each layer.
    """
    layer = 2 * 2 * architecture.query_size / 2 / linear_flops(architecture)
    sliding = len(architecture.sliding_layers)
    return AttentionCost(
        full=layer * (architecture.num_layers - sliding),
        sliding=layer * sliding,
        window=architecture.sliding_window or 0,
    )
