"""Core attention for packed rows and for the KV cache: one function for training and generation.

Where it fits: named in the layer spec as the core attention. What a forward pass looks like travels
in `packed_seq_params`, Megatron's own argument for it: `RowLayout` (sequences laid end to end),
`PrefillLayout` (pieces of prompts, which fill the cache) or `DecodeLayout` (one new token for each
active response). Transformer Engine's attention keeps training rows (`qkv_format="thd"`) and hands
the other layouts to the function here.

Generation has training's bits (docs/notes.md) as long as no GEMM takes another kernel or another
order of summation: at least `MIN_ROWS` rows everywhere, key lengths in steps of `KEY_BLOCK`, and
sums over keys in pieces of `SUM_BLOCK`. Keys that a token does not see then add zeros to its sums.

Under context parallelism a rank has pieces of a row's sequences. It gathers the keys and values of
the whole row, and its queries attend to them as they would in the whole row, with the same bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_drpo.context_parallel import pieces as pieces_of_rank
from megatron_drpo.context_parallel import sequence_bounds, share_index
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
    experts: Tensor | None = None
    """int16 [slots, length, layers of the model, k]: where each token was routed to, as far as the
    layers are here; None: not recorded."""

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
        if self.experts is not None:
            self.experts[target, :length] = self.experts[source, :length]

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
        if self.experts is not None:
            old = self.experts
            self.experts = old.new_zeros((num_slots, length, *old.shape[2:]))
            self.experts[:slots, :positions] = old[:slots, :positions]


class Piece(NamedTuple):
    """Consecutive tokens of a sequence. Example: Piece(slot=3, start=512, length=100)."""

    slot: int
    """Of the cache; in a row, the number of the sequence."""
    start: int
    """Tokens of the sequence before these: in the cache already, or on other ranks as well."""
    length: int


class Bucket(NamedTuple):
    """Pieces of a row whose queries see about as many keys, and so are computed together."""

    index: Tensor
    """int64 [n, L]: the row's token at place l of piece n; any token beyond its length."""
    keys: Tensor
    """int64 [n, L']: where the key at position l of the sequence of piece n is; any key beyond the
    piece's end. A cache needs none."""
    key_length: int
    """Positions that any of the tokens sees, rounded up to KEY_BLOCK."""
    slots: Tensor
    """int64 [n], in the cache."""
    starts: Tensor
    """int64 [n]."""


@dataclass
class RowLayout(PackedSeqParams):
    """Sequences laid end to end in a row of S tokens, each attending to itself causally; or the
    pieces of them that a context-parallel rank has.

    `qkv_format` stays "sbhd" for Megatron, which then applies rotary embeddings by token.
    """

    buckets: Sequence[Bucket] = ()
    inverse: Tensor = None  # type: ignore[assignment]
    """int64 [S]: where each token is in all buckets laid end to end; 0 at padding."""
    context_group: dist.ProcessGroup | None = None
    """The ranks that share the row out; its keys are theirs, laid end to end in their order."""


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


def row_layout(
    cu_seqlens: Tensor, num_tokens: int, context_group: dist.ProcessGroup | None = None
) -> RowLayout:
    """The layout of a row whose sequences begin at `cu_seqlens` [N + 1].

    Args:
        num_tokens: of the row, or of this rank's share of it.
        context_group: the ranks that share the row out (`context_parallel.share_row`).
    """
    rank, size = (0, 1) if context_group is None else (context_group.rank(), context_group.size())
    bounds = cu_seqlens.tolist()
    if len(bounds) == 1:  # padding only: treat it as one sequence
        bounds = [0, num_tokens * size]
    mine = [
        Piece(number, first, count)
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        for first, count in pieces_of_rank(end - start, rank, size)
    ]
    begins, places = torch.tensor(bounds[:-1]), None
    if size > 1:
        every = sequence_bounds(cu_seqlens, num_tokens * size)
        places = torch.cat([share_index(every, other, size) for other in range(size)]).argsort()
    buckets = _buckets(mine, num_tokens, cu_seqlens.device, begins, places)
    return RowLayout(qkv_format="sbhd", context_group=context_group, **buckets)


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


def _buckets(
    pieces: Sequence[Piece],
    num_tokens: int,
    device: torch.device,
    begins: Tensor | None = None,
    places: Tensor | None = None,
) -> dict:
    """`buckets` and `inverse` of a row: pieces apart whose numbers of keys are far apart, so that
    a long one costs the short ones nothing.

    Args:
        begins: int64 [N], where each sequence begins in the whole row; None: keys are in a cache.
        places: int64 [tokens of the whole row], where each of them has its key; None: in order.
    """
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
        index, keys = index.clamp(max=num_tokens - 1), index[:, :0]
        if begins is not None:
            end = round_up(max(piece.start + piece.length for _, piece in members), MIN_ROWS)
            last = num_tokens - 1 if places is None else places.numel() - 1
            keys = (begins[slots][:, None] + torch.arange(end)).clamp(max=last)
            keys = keys if places is None else places[keys]
        tensors = (tensor.to(device) for tensor in (index, keys, slots, starts))
        index, keys, slots, starts = tensors
        buckets.append(Bucket(index, keys, key_length, slots, starts))
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
    # Not in place on the view: autograd would copy the gradient of all scores for that.
    scores = scores.float().mul_(scale).view(*query.shape[:-1], -1)
    probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
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
    window: int | None = None,
) -> Tensor:
    """Attention of one layer under `layout`.

    Args:
        query: [S, 1, heads / tp, D] with key, value: [S, 1, groups / tp, D].
        window: tokens that a token sees, itself and those before it; None: all of these.

    Returns:
        [S, 1, heads / tp * D].
    """
    query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
    tokens, groups = key.shape[:2]
    query = query.view(tokens, groups, -1, query.size(-1))
    if isinstance(layout, DecodeLayout):
        out = _decode(query, key, value, layout, layer_number, scale, window)
        return out.reshape(tokens, 1, -1)
    if layout.context_group is not None:
        # In the backward pass each rank gets its part of the sum of the ranks' gradients.
        both = gather_from_sequence_parallel_region(
            torch.stack([key, value], 1), group=layout.context_group
        )
        key, value = both.unbind(1)
    cached = None
    if isinstance(layout, PrefillLayout):
        cached = layout.cache.layer(layer_number, key)
        for part, new in zip(cached, (key, value), strict=True):
            part[layout.slots, :, layout.positions] = new
    outs = []
    for bucket in layout.buckets:
        length, key_length = bucket.index.size(1), bucket.key_length
        if cached is None:
            keys, values = (_pad_length(x[bucket.keys], key_length) for x in (key, value))
        else:
            keys, values = (part[bucket.slots, :, :key_length] for part in cached)
        place = torch.arange(max(length, key_length), device=query.device)
        # What lies beyond a piece's end sees something as well: it must not become NaN.
        last = (place[:length] + bucket.starts[:, None]).clamp(max=key_length - 1)
        hidden = _hidden(last[:, None, None, :, None], place[:key_length], window)
        out = attend(query[bucket.index].permute(0, 2, 3, 1, 4), keys, values, hidden, scale)
        outs.append(out.permute(0, 3, 1, 2, 4).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.flatten(1)[layout.inverse].unsqueeze(1)


def _hidden(position: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """bool, of both broadcast: the positions `keys` that a token at `position` does not see."""
    hidden = keys > position
    return hidden if window is None else hidden | (keys <= position - window)


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
    window: int | None,
) -> Tensor:
    """[B, groups, heads / groups, D], of query in this shape."""
    keys, values = layout.cache.layer(layer_number, key)
    keys[layout.slots, :, layout.positions] = key
    values[layout.slots, :, layout.positions] = value
    batch, length = layout.positions.numel(), layout.hidden.size(-1)
    # Equal rows up to MIN_ROWS, for the same GEMM kernel as in training.
    rows = -(-MIN_ROWS // query.size(2)) if layout.exact else 1
    hidden = layout.hidden
    if window is not None:
        place = torch.arange(length, device=query.device)
        hidden = _hidden(layout.positions[:, None, None, None, None], place, window)
    out = attend(
        query[:, :, :, None].expand(-1, -1, -1, rows, -1),
        keys[:batch, :, :length],
        values[:batch, :, :length],
        hidden,
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
        **kwargs: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale, self.window = scale_of(config), window_of(config, layer_number)

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
        return attend_layout(
            query, key, value, packed_seq_params, self.layer_number, self.scale, self.window
        )


def scale_of(config: TransformerConfig) -> float:
    """Factor of the scores of attention."""
    return config.softmax_scale or (config.kv_channels or 1) ** -0.5


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a token sees in a layer, itself included; None: all before it as well.

    Args:
        layer_number: in the whole model, from 1.
    """
    sizes, skips = config.window_size, config.window_attn_skip_freq
    if sizes is None or not is_layer_window_attention(sizes, skips, layer_number):  # type: ignore[arg-type]
        return None
    return sizes[0] + 1


HAVE_TE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
"""Asked for here once; without it `--transformer-impl transformer_engine` is refused."""

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TECoreAttention(TEDotProductAttention):
        """Transformer Engine's attention for training rows, `attend_layout` for generation."""

        def forward(self, query, key, value, *args, packed_seq_params=None, **kwargs):  # type: ignore[no-untyped-def]
            if isinstance(packed_seq_params, RowLayout | DecodeLayout):
                number, config = self.layer_number, self.config
                scale, window = scale_of(config), window_of(config, number)
                return attend_layout(query, key, value, packed_seq_params, number, scale, window)
            return super().forward(
                query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs
            )
