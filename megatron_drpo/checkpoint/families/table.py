"""The words in which a model family is declared: architecture, transforms, entries, family.

An entry pairs Megatron parameter names with Hugging Face tensor names and a transform that is read
in both directions. The transforms know tensors only: no process group, no file, no megatron import.
Sources handed to `to_megatron` are indexed with slices and nothing else, so that a lazy safetensors
slice serves as well as a tensor.

Dims: H hidden, V vocabulary, F feed-forward, `tp` the tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_drpo.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """Everything that the model's computation depends on, from config.json alone.

    Example (a Qwen3): Architecture(family="qwen3", num_layers=28, hidden_size=1024,
        ffn_hidden_size=3072, num_attention_heads=16, num_query_groups=8, kv_channels=128,
        vocab_size=151936, max_position_embeddings=40960, norm_epsilon=1e-6, rotary_base=1e6,
        tie_word_embeddings=True, qk_layernorm=True, add_qkv_bias=False, hf_dtype="bfloat16")
    """

    family: str
    """`llama` or `qwen3`: which table converts the weights."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Size of one head."""
    vocab_size: int
    """Rows of the embedding as stored; Megatron may pad them."""
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    """The output layer is the embedding."""
    qk_layernorm: bool
    """RMS norm over the channels of each query and key head."""
    add_qkv_bias: bool
    hf_dtype: str
    """dtype named by config.json: `float32`, `bfloat16` or `float16`."""

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.kv_channels


class Transform(Protocol):
    """How some Hugging Face tensors become one Megatron parameter, and back."""

    @property
    def sharded(self) -> bool:
        """Whether tensor parallelism splits the parameter (else every rank holds all of it)."""
        ...

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        """Shape of each Hugging Face tensor."""
        ...

    def to_megatron(
        self,
        hf: Sequence[Any],
        shape: Sequence[int],
        tp_rank: int,
        tp_size: int,
        arch: Architecture,
    ) -> Tensor:
        """The parameter of one rank; `shape` is what that rank's model expects."""
        ...

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        """The Hugging Face tensors from the parameter's shards, in the order of the ranks."""
        ...


def _share(total: int, rank: int, size: int) -> slice:
    return slice(total * rank // size, total * (rank + 1) // size)


@dataclass(frozen=True)
class Copy:
    """The same tensor in both, split over TP along one dim or held whole by every rank."""

    dims: tuple[str, ...]
    """Attributes of `Architecture` that give the Hugging Face shape."""
    split: int | None = None
    """0: rows (column-parallel layers); 1: columns (row-parallel layers); None: replicated."""

    @property
    def sharded(self) -> bool:
        return self.split is not None

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return (tuple(getattr(arch, dim) for dim in self.dims),)

    def to_megatron(
        self,
        hf: Sequence[Any],
        shape: Sequence[int],
        tp_rank: int,
        tp_size: int,
        arch: Architecture,
    ) -> Tensor:
        index = [slice(None)] * len(self.dims)
        if self.split is not None:
            total = getattr(arch, self.dims[self.split])
            index[self.split] = _share(total, tp_rank, tp_size)
        return hf[0][tuple(index)]

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (shards[0] if self.split is None else torch.cat(list(shards), dim=self.split),)


@dataclass(frozen=True)
class QueryKeyValue:
    """q, k, v <-> rows `[q..q k v]` of each query group, groups in order, rows split over TP."""

    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        sizes = (arch.query_size, arch.key_value_size, arch.key_value_size)
        return tuple((size, arch.hidden_size) for size in sizes)

    def to_megatron(
        self,
        hf: Sequence[Any],
        shape: Sequence[int],
        tp_rank: int,
        tp_size: int,
        arch: Architecture,
    ) -> Tensor:
        # A rank may hold part of a group (tp above the number of groups): read the groups that
        # its rows touch, then cut.
        group_rows = (arch.query_size + 2 * arch.key_value_size) // arch.num_query_groups
        rows = _share(group_rows * arch.num_query_groups, tp_rank, tp_size)
        first, last = rows.start // group_rows, -(-rows.stop // group_rows)
        parts = []
        for source, (size, hidden) in zip(hf, self.hf_shapes(arch), strict=True):
            per_group = size // arch.num_query_groups
            part = source[first * per_group : last * per_group]
            parts.append(part.reshape(last - first, per_group, hidden))
        groups = torch.cat(parts, dim=1).flatten(0, 1)
        return groups[rows.start - first * group_rows : rows.stop - first * group_rows]

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        shapes = self.hf_shapes(arch)
        groups = torch.cat(list(shards)).unflatten(0, (arch.num_query_groups, -1))
        parts = groups.split([size // arch.num_query_groups for size, _ in shapes], dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


@dataclass(frozen=True)
class GatedMLP:
    """gate, up <-> `[gate_r; up_r]` on each TP rank r: every rank multiplies its own halves."""

    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return ((arch.ffn_hidden_size, arch.hidden_size),) * 2

    def to_megatron(
        self,
        hf: Sequence[Any],
        shape: Sequence[int],
        tp_rank: int,
        tp_size: int,
        arch: Architecture,
    ) -> Tensor:
        rows = _share(arch.ffn_hidden_size, tp_rank, tp_size)
        return torch.cat([source[rows] for source in hf])

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(torch.cat(list(rows)) for rows in zip(*halves, strict=True))


@dataclass(frozen=True)
class Vocab:
    """[V, H] <-> rows split over TP and padded at the end with zeros; export cuts the padding."""

    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return ((arch.vocab_size, arch.hidden_size),)

    def to_megatron(
        self,
        hf: Sequence[Any],
        shape: Sequence[int],
        tp_rank: int,
        tp_size: int,
        arch: Architecture,
    ) -> Tensor:
        rows = shape[0]
        if rows * tp_size < arch.vocab_size:
            raise CheckpointError(
                f"the model was built for a vocabulary of {rows * tp_size} rows, the checkpoint "
                f"has {arch.vocab_size}: build it from the checkpoint's config.json"
            )
        start = min(rows * tp_rank, arch.vocab_size)
        stop = min(start + rows, arch.vocab_size)
        if start == stop:  # nothing but padding; safetensors refuses empty slices
            return torch.zeros(rows, arch.hidden_size)
        return torch.nn.functional.pad(hf[0][start:stop], (0, 0, 0, rows - (stop - start)))

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: arch.vocab_size],)


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    `{layer}` stands for the layer's number in the whole model, from 0.
    """

    megatron: tuple[str, ...]
    """The local layer spec's name, then what other specs call the same parameter."""
    hf: tuple[str, ...]
    transform: Transform

    def of_layer(self, layer: int) -> Entry:
        """This entry with the layer's number filled in."""
        return Entry(
            tuple(name.format(layer=layer) for name in self.megatron),
            tuple(name.format(layer=layer) for name in self.hf),
            self.transform,
        )


@dataclass(frozen=True)
class Family:
    """What distinguishes one family: how its config.json reads and its table of weights."""

    name: str
    hf_architecture: str
    """`architectures[0]` of config.json."""
    first: tuple[Entry, ...]
    """Parameters of the first pipeline stage."""
    layer: tuple[Entry, ...]
    """Parameters of every layer."""
    last: tuple[Entry, ...]
    """Parameters of the last pipeline stage."""
    qk_layernorm: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What transformers takes for a missing key where that is not derived from other keys."""
    only: Mapping[str, object] = field(default_factory=dict)
    """Keys that would change the computation, and the one value that is implemented."""
    harmless: frozenset[str] = frozenset()
    """Keys that change nothing that is computed, besides those of every family."""
    tied: tuple[str, str] = ("model.embed_tokens.weight", "lm_head.weight")
    """The two names of a tied weight, the one that is exported first."""
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of stored tensors that follow from config.json and are not read."""
