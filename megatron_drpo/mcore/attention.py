"""Core attention for packed rows and for the KV cache: one function for training and generation.

Where it fits: named in the layer spec as the core attention. What a forward pass looks like travels
in `packed_seq_params`, Megatron's own argument for it: `RowLayout` (sequences laid end to end),
`PrefillLayout` (pieces of prompts, which fill the cache) or `DecodeLayout` (one new token for each
active response). Transformer Engine's attention keeps training rows (`qkv_format="thd"`) and hands
the other layouts to the function here.

Generation has training's bits (docs/notes.md) as long as no GEMM takes another kernel or another
order of summation: at least `MIN_ROWS` rows everywhere, key lengths in steps of `KEY_BLOCK`, and
sums over keys in pieces of `SUM_BLOCK`. Keys that a token does not see then add zeros to its sums.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_drpo.vocab_parallel.gemm import KEY_BLOCK, MIN_ROWS, round_up

SUM_BLOCK = 128
"""GEMMs that sum over more keys than this split them in ways that depend on their number."""


@dataclass
class KVCache:
    """Keys and values of the active responses, one pair of tensors per local layer.

    `layers[n]`: (keys, values), each [slots, query groups / tp, length, head dim]: the first slots
    of a cache, and the first positions of these, are the operands of a GEMM without a copy.
    """

    num_slots: int
    length: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of one layer, made at first use with the dtype and heads of `like` [..., D]."""
        if number not in self.layers:
            groups, dim = like.shape[-2:]
            shape = (self.num_slots, groups, self.length, dim)
            self.layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[number]

    def copy(self, source: Tensor, target: Tensor, length: int | None = None) -> None:
        """Copy slots `source` onto slots `target` (int64 indices, disjoint): all, or `length`."""
        for layer in self.layers.values():
            for part in layer:
                part[target, :, :length] = part[source, :, :length]

    def resize(self, num_slots: int, length: int) -> None:
        """Make room for so many slots and positions; what is cached there stays."""
        slots, positions = min(num_slots, self.num_slots), min(length, self.length)
        self.num_slots, self.length = num_slots, length
        for number, layer in self.layers.items():
            groups, dim = layer[0].size(1), layer[0].size(3)
            new = [part.new_zeros((num_slots, groups, length, dim)) for part in layer]
            for part, old in zip(new, layer, strict=True):
                part[:slots, :, :positions] = old[:slots, :, :positions]
            self.layers[number] = (new[0], new[1])


class Piece(NamedTuple):
    """Consecutive tokens of a sequence. Example: Piece(slot=3, start=512, length=100)."""

    slot: int
    start: int
    """Tokens of the sequence that are in the cache already."""
    length: int


class Bucket(NamedTuple):
    """Pieces of a row whose queries see about as many keys, and so are computed together."""

    index: Tensor
    """int64 [n, L]: the row's token at place l of piece n; any token beyond its length."""
    key_length: int
    """Positions that any of the tokens sees, rounded up to KEY_BLOCK."""
    slots: Tensor
    """int64 [n], in the cache."""
    starts: Tensor
    """int64 [n]."""


@dataclass
class RowLayout(PackedSeqParams):
    """Sequences laid end to end in a row of S tokens, each attending to itself causally.

    `qkv_format` stays "sbhd" for Megatron, which then applies rotary embeddings by token.
    """

    buckets: Sequence[Bucket] = ()
    inverse: Tensor = None  # type: ignore[assignment]
    """int64 [S]: where each token is in all buckets laid end to end; 0 at padding."""


@dataclass
class PrefillLayout(RowLayout):
    """As a row, of pieces of prompts; keys and values are written to the cache and read there."""

    cache: KVCache = None  # type: ignore[assignment]
    slots: Tensor = None  # type: ignore[assignment]
    """int64 [S], of each token."""
    positions: Tensor = None  # type: ignore[assignment]
    """int64 [S]."""


@dataclass
class DecodeLayout(PackedSeqParams):
    """One token for each of the first B slots of the cache, whose keys its query then sees."""

    cache: KVCache = None  # type: ignore[assignment]
    slots: Tensor = None  # type: ignore[assignment]
    """int64 [B]: 0 to B - 1."""
    positions: Tensor = None  # type: ignore[assignment]
    """int64 [B]."""
    hidden: Tensor = None  # type: ignore[assignment]
    """bool [B, 1, 1, 1, Lk]: cached positions that each token does not see."""
    exact: bool = True
    """Spend equal rows on having the bits of training."""


def row_layout(cu_seqlens: Tensor, num_tokens: int) -> RowLayout:
    """The layout of a row of `num_tokens` whose sequences begin at `cu_seqlens` [N + 1]."""
    bounds = cu_seqlens.tolist()
    if len(bounds) == 1:  # padding only: treat it as one sequence
        bounds = [0, num_tokens]
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    pieces = [Piece(0, 0, length) for length in lengths]
    return RowLayout(qkv_format="sbhd", **_buckets(pieces, num_tokens, cu_seqlens.device))


def prefill_layout(
    pieces: Sequence[Piece], num_tokens: int, cache: KVCache, device: torch.device
) -> PrefillLayout:
    """The layout of a row of `num_tokens` that begins with the tokens of `pieces`, end to end.

    Tokens beyond them are padding, and repeat the first token.
    """
    missing = num_tokens - sum(piece.length for piece in pieces)
    padding = [Piece(pieces[0].slot, pieces[0].start, 1)] * missing
    every = [*pieces, *padding]
    return PrefillLayout(
        qkv_format="sbhd",
        cache=cache,
        slots=torch.tensor([piece.slot for piece in every for _ in range(piece.length)]).to(device),
        positions=torch.cat(
            [torch.arange(piece.start, piece.start + piece.length) for piece in every]
        ).to(device),
        **_buckets(pieces, num_tokens, device),
    )


def _buckets(pieces: Sequence[Piece], num_tokens: int, device: torch.device) -> dict:
    """`buckets` and `inverse` of a row: pieces apart whose numbers of keys are far apart, so that
    a long one costs the short ones nothing."""
    by_length: dict[int, list[tuple[int, Piece]]] = {}
    offset = 0
    for piece in pieces:
        key_length = round_up(piece.start + piece.length, KEY_BLOCK)
        by_length.setdefault(key_length, []).append((offset, piece))
        offset += piece.length
    buckets, before = [], 0
    inverse = torch.zeros(num_tokens, dtype=torch.long)
    for key_length, members in by_length.items():
        longest = round_up(max(piece.length for _, piece in members), MIN_ROWS)
        offsets = torch.tensor([offset for offset, _ in members])
        lengths = torch.tensor([piece.length for _, piece in members])
        place = torch.arange(longest)
        index = offsets[:, None] + place
        real = place < lengths[:, None]
        inverse[index[real]] = before + torch.arange(index.numel())[real.flatten()]
        before += index.numel()
        slots = torch.tensor([piece.slot for _, piece in members])
        starts = torch.tensor([piece.start for _, piece in members])
        buckets.append(
            Bucket(
                index.clamp(max=num_tokens - 1).to(device),
                key_length,
                slots.to(device),
                starts.to(device),
            )
        )
    return {"buckets": buckets, "inverse": inverse.to(device)}


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Softmax attention with grouped queries, softmax in fp32.

    Args:
        query: [B, groups, heads / groups, Lq, D].
        key, value: [B, groups, Lk, D].
        hidden: bool, broadcastable to [B, groups, heads / groups, Lq, Lk]: the keys that a query
            does not see, not all of them.
        scale: factor of the scores.

    Returns:
        As `query`.
    """
    scores = query.flatten(2, 3) @ key.transpose(-1, -2)
    scores = scores.float().view(*query.shape[:-1], -1)
    probs = scores.mul_(scale).masked_fill_(hidden, -torch.inf).softmax(-1)
    return _weighted_sum(probs.to(value.dtype).flatten(2, 3), value).view(query.shape)


def _weighted_sum(probs: Tensor, value: Tensor) -> Tensor:
    """probs [B, groups, n, Lk] @ value [B, groups, Lk, D], in an order that zeros do not change."""
    if probs.size(-1) <= SUM_BLOCK:
        return probs @ value
    parts = zip(probs.split(SUM_BLOCK, -1), value.split(SUM_BLOCK, -2), strict=True)
    first, second = next(parts)
    total = (first @ second).float()
    for first, second in parts:
        total = total + (first @ second)
    return total.to(value.dtype)


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
    tokens, groups = key.shape[:2]
    query = query.view(tokens, groups, -1, query.size(-1))
    if isinstance(layout, DecodeLayout):
        return _decode(query, key, value, layout, layer_number, scale).reshape(tokens, 1, -1)
    cached = None
    if isinstance(layout, PrefillLayout):
        cached = layout.cache.layer(layer_number, key)
        for part, new in zip(cached, (key, value), strict=True):
            part[layout.slots, :, layout.positions] = new
    outs = []
    for bucket in layout.buckets:
        length, key_length = bucket.index.size(1), bucket.key_length
        if cached is None:
            keys, values = (_pad_length(x[bucket.index], key_length) for x in (key, value))
        else:
            keys, values = (part[bucket.slots, :, :key_length] for part in cached)
        place = torch.arange(max(length, key_length), device=query.device)
        last = (place[:length] + bucket.starts[:, None])[:, None, None, :, None]
        out = attend(
            query[bucket.index].permute(0, 2, 3, 1, 4),
            keys,
            values,
            place[:key_length] > last,
            scale,
        )
        outs.append(out.permute(0, 3, 1, 2, 4).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.flatten(1)[layout.inverse].unsqueeze(1)


def _pad_length(tensor: Tensor, length: int) -> Tensor:
    """[n, groups, length, D] of [n, L, groups, D]: zeros after L."""
    missing = length - tensor.size(1)
    if missing:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing))
    return tensor.transpose(1, 2).contiguous()


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DecodeLayout,
    layer_number: int,
    scale: float,
) -> Tensor:
    """[B, groups, heads / groups, D], of query in this shape."""
    keys, values = layout.cache.layer(layer_number, key)
    keys[layout.slots, :, layout.positions] = key
    values[layout.slots, :, layout.positions] = value
    batch, length = layout.positions.numel(), layout.hidden.size(-1)
    # Equal rows up to MIN_ROWS, for the same GEMM kernel as in training.
    rows = -(-MIN_ROWS // query.size(2)) if layout.exact else 1
    out = attend(
        query[:, :, :, None].expand(-1, -1, -1, rows, -1),
        keys[:batch, :, :length],
        values[:batch, :, :length],
        layout.hidden,
        scale,
    )
    return out[:, :, :, 0]


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
