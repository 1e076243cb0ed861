"""Core attention for packed rows and for the KV cache: one function for training and generation.

Where it fits: named in the layer spec as the core attention. What a forward pass looks like travels
in `packed_seq_params`, Megatron's own argument for it: `RowLayout` (sequences laid end to end) or
`DecodeLayout` (one new token for each active response). Transformer Engine's attention keeps
training rows (`qkv_format="thd"`) and hands the other two layouts to the function here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_drpo.vocab_parallel.gemm import MIN_ROWS

KEY_BLOCK = 64
"""Key lengths are rounded up to this, so that training and generation sum in the same order."""


@dataclass
class KVCache:
    """Keys and values of the active responses, one pair of tensors per local layer.

    `layers[n]`: (keys, values), each [slots, length, query groups / tp, head dim].
    """

    num_slots: int
    length: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of one layer, made at first use with the dtype and heads of `like`."""
        if number not in self.layers:
            shape = (self.num_slots, self.length, *like.shape[-2:])
            self.layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[number]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` onto slots `target` (int64 indices, disjoint)."""
        for keys, values in self.layers.values():
            keys[target] = keys[source]
            values[target] = values[source]


@dataclass
class RowLayout(PackedSeqParams):
    """Sequences laid end to end in a row of S tokens, each attending to itself causally.

    `qkv_format` stays "sbhd" for Megatron, which then applies rotary embeddings by token.
    """

    index: Tensor = None  # type: ignore[assignment]
    """int64 [N, L]: the row's token at position l of sequence n; any token beyond its length."""
    inverse: Tensor = None  # type: ignore[assignment]
    """int64 [S]: n * L + l of each token; 0 at padding."""
    cache: KVCache | None = None
    """Where a prefill also writes keys and values, at `slots` and `positions` of each token."""
    slots: Tensor | None = None
    """int64 [S], only with `cache`."""
    positions: Tensor | None = None
    """int64 [S], only with `cache`."""


@dataclass
class DecodeLayout(PackedSeqParams):
    """One token for each of the first B slots of the cache, at `positions` int64 [B]."""

    cache: KVCache = None  # type: ignore[assignment]
    positions: Tensor = None  # type: ignore[assignment]
    key_length: int = 0
    """Cached positions that any of the B tokens can see, rounded up to KEY_BLOCK."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def row_layout(cu_seqlens: Tensor, num_tokens: int) -> RowLayout:
    """The layout of a row of `num_tokens` whose sequences begin at `cu_seqlens` [N + 1]."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if starts.numel() == 0:  # padding only: treat it as one sequence
        starts, ends = starts.new_zeros(1), starts.new_full((1,), num_tokens)
    longest = round_up(int((ends - starts).max()), MIN_ROWS)
    offsets = torch.arange(longest, device=starts.device)
    index = starts[:, None] + offsets
    real = index < ends[:, None]
    inverse = starts.new_zeros(num_tokens)
    inverse[index[real]] = torch.arange(index.numel(), device=starts.device)[real.flatten()]
    return RowLayout(qkv_format="sbhd", index=index.clamp(max=num_tokens - 1), inverse=inverse)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention with grouped queries, softmax in fp32.

    Args:
        query: [B, Lq, heads, D].
        key, value: [B, Lk, groups, D]; heads are `heads / groups` consecutive ones per group.
        visible: bool, broadcastable to [B, Lq, Lk]: the keys that a query sees, at least one.
        scale: factor of the scores.

    Returns:
        [B, Lq, heads * D].
    """
    batch, queries, heads, dim = query.shape
    groups = key.size(2)
    q = query.view(batch, queries, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    scores = q.reshape(batch, groups, -1, dim) @ key.permute(0, 2, 3, 1)
    scores = scores.view(batch, groups, heads // groups, queries, -1).float() * scale
    visible = visible.expand(batch, queries, -1)[:, None, None]
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype)
    out = probs.view(batch, groups, -1, probs.size(-1)) @ value.permute(0, 2, 1, 3)
    out = out.view(batch, groups, heads // groups, queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads * dim)


def _pad_length(tensor: Tensor, length: int) -> Tensor:
    """Zeros after dim 1 up to `length`."""
    missing = length - tensor.size(1)
    return torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor


def attend_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout | DecodeLayout,
    layer_number: int,
    scale: float,
) -> Tensor:
    """Attention of one layer under `layout`.

    Args:
        query: [S, 1, heads / tp, D] with key, value: [S, 1, groups / tp, D].

    Returns:
        [S, 1, heads / tp * D].
    """
    query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
    if isinstance(layout, RowLayout):
        if layout.cache is not None:
            keys, values = layout.cache.layer(layer_number, key)
            keys[layout.slots, layout.positions] = key
            values[layout.slots, layout.positions] = value
        index = layout.index
        length = index.size(1)
        key_length = round_up(length, KEY_BLOCK)
        steps = torch.arange(key_length, device=query.device)
        out = attend(
            query[index],
            _pad_length(key[index], key_length),
            _pad_length(value[index], key_length),
            steps <= steps[:length, None],
            scale,
        )
        return out.flatten(0, 1)[layout.inverse].unsqueeze(1)
    batch = layout.positions.numel()
    keys, values = layout.cache.layer(layer_number, key)
    slots = torch.arange(batch, device=query.device)
    keys[slots, layout.positions] = key
    values[slots, layout.positions] = value
    steps = torch.arange(layout.key_length, device=query.device)
    # Equal query rows up to MIN_ROWS, for the same GEMM kernel as in training.
    rows = -(-MIN_ROWS * key.size(1) // query.size(1))
    out = attend(
        query[:, None].expand(-1, rows, -1, -1).contiguous(),
        keys[:batch, : layout.key_length],
        values[:batch, : layout.key_length],
        (steps <= layout.positions[:, None])[:, None],
        scale,
    )
    return out[:, :1].transpose(0, 1).reshape(batch, 1, -1)


class CoreAttention(MegatronModule):
    """Core attention of the local layer spec; takes only the layouts of this module."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or (config.kv_channels or 1) ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert isinstance(packed_seq_params, RowLayout | DecodeLayout)
        return attend_layout(query, key, value, packed_seq_params, self.layer_number, self.scale)


HAVE_TE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
"""Asked for here once; without it `--transformer-impl transformer_engine` is refused."""

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(TEDotProductAttention):
        """Transformer Engine's attention for training rows, `attend_layout` for generation."""

        def forward(self, query, key, value, *args, packed_seq_params=None, **kwargs):  # type: ignore[no-untyped-def]
            if isinstance(packed_seq_params, RowLayout | DecodeLayout):
                scale = (self.config.kv_channels or 1) ** -0.5
                return attend_layout(query, key, value, packed_seq_params, self.layer_number, scale)
            return super().forward(
                query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs
            )
