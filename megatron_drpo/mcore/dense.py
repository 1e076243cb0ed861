"""Dense layers without the modules around their operations: a faster forward pass to generate with.

Where it fits: the in-process engine runs a chunk of the model through `forward_of`. A pass over a
few dozen tokens of a small model spends a third of its time in Python, between operations. These
are the operations of `PolicyModel.forward` on the same weights, in the same order and so with the
same bits, called one after the other. What they are not written for (experts, Transformer Engine,
biases everywhere, fused operations) goes through Megatron's modules. Sequence parallelism stays
inside these: a pass of few tokens has nothing to win by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_drpo.mcore.attention import (
    CoreAttention,
    DecodeLayout,
    RowLayout,
    attend_layout,
)
from megatron_drpo.mcore.model import PolicyModel

Forward = Callable[[Tensor, Tensor, RowLayout | DecodeLayout, Tensor | None], Tensor]
"""(tokens int64 [S], positions int64 [S], layout, hidden states [S, 1, H] of the chunk before or
None) -> hidden states [S, 1, H], as `PolicyModel.forward`; without gradient. They are those of all
tokens on every tensor-parallel rank; under sequence parallelism S is a multiple of these."""


def forward_of(model: PolicyModel) -> Forward:
    """The fastest forward pass that there is for `model`, with its weights as they are now."""
    config: Any = model.config
    layers: Any = model.decoder.layers
    other = config.bias_activation_fusion or config.bias_dropout_fusion or config.add_bias_linear
    plain = not other and all(
        type(layer.mlp) is MLP and isinstance(layer.self_attention.core_attention, CoreAttention)
        for layer in layers
    )
    return _Dense(model) if plain else _through_modules(model)


def _through_modules(model: PolicyModel) -> Forward:
    split = model.config.sequence_parallel
    # Transformer Engine keeps FP8 copies of the weights from one pass to the next.
    model.set_is_first_microbatch()

    def forward(
        tokens: Tensor, positions: Tensor, layout: RowLayout | DecodeLayout, hidden: Tensor | None
    ) -> Tensor:
        if hidden is not None:
            model.set_input_tensor(scatter_to_sequence_parallel_region(hidden) if split else hidden)
        out = model(tokens, positions, layout)
        return gather_from_sequence_parallel_region(out) if split else out

    return forward


class _Layer(NamedTuple):
    """Weights as the right-hand sides of products; norms of queries and keys, biases: if any."""

    number: int
    scale: float
    window: int | None
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor


class _Dense:
    def __init__(self, model: PolicyModel) -> None:
        self._model = model
        config: Any = model.config
        self._epsilon, self._dim = config.layernorm_epsilon, config.kv_channels
        self._activation, self._split = config.activation_func, config.sequence_parallel
        decoder: Any = model.decoder
        norm = decoder.final_layernorm
        self._final_norm = None if norm is None else norm.weight
        self._layers = [_weights(layer) for layer in decoder.layers]
        attention = decoder.layers[0].self_attention
        self._groups: int = attention.num_query_groups_per_partition
        self._heads: int = attention.num_attention_heads_per_partition
        self._group = attention.linear_proj.tp_group

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: RowLayout | DecodeLayout,
        hidden: Tensor | None,
    ) -> Tensor:
        model: Any = self._model
        x = self._embedded(tokens, positions) if hidden is None else hidden
        angles = model._rotary(positions, layout)
        turn = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self._layers:
            x = x + self._attention(layer, x, turn, layout)
            gate, up = (self._norm(x, layer.mlp_norm) @ layer.up).chunk(2, -1)
            x = x + self._sum((self._activation(gate) * up) @ layer.down)
        return x if self._final_norm is None else self._norm(x, self._final_norm)

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self._model.embedding(tokens[None], positions[None])
        return gather_from_sequence_parallel_region(x) if self._split else x

    def _attention(
        self,
        layer: _Layer,
        hidden: Tensor,
        turn: tuple[Tensor, Tensor],
        layout: RowLayout | DecodeLayout,
    ) -> Tensor:
        mixed = self._norm(hidden, layer.norm) @ layer.qkv
        if layer.qkv_bias is not None:
            mixed = mixed + layer.qkv_bias
        dim, (size, one) = self._dim, hidden.shape[:2]
        mixed = mixed.view(size, one, self._groups, -1)
        query, key, value = mixed.split([mixed.size(-1) - 2 * dim, dim, dim], -1)
        query = query.reshape(size, one, self._heads, dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
        query, key = _rotate(query, turn), _rotate(key, turn)
        out = attend_layout(query, key, value, layout, layer.number, layer.scale, layer.window)
        return self._sum(out @ layer.out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.rms_norm(x, weight.shape, weight, self._epsilon)

    def _sum(self, x: Tensor) -> Tensor:
        """Over the ranks of the tensor-parallel group."""
        if self._group.size() > 1:
            dist.all_reduce(x, group=self._group)
        return x


def _weights(layer: Any) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    return _Layer(
        number=layer.layer_number,
        scale=attention.core_attention.scale,
        window=attention.core_attention.window,
        norm=layer.input_layernorm.weight,
        qkv=attention.linear_qkv.weight.t(),
        qkv_bias=attention.linear_qkv.bias,
        query_norm=getattr(attention.q_layernorm, "weight", None),
        key_norm=getattr(attention.k_layernorm, "weight", None),
        out=attention.linear_proj.weight.t(),
        mlp_norm=layer.pre_mlp_layernorm.weight,
        up=mlp.linear_fc1.weight.t(),
        down=mlp.linear_fc2.weight.t(),
    )


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
