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
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_drpo.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary embeddings are stretched for a longer context.

    Examples: Llama 3.1's RopeScaling("llama3", 8.0, original_max_position_embeddings=8192), and
    what Qwen2.5 and Qwen3 recommend for long texts: RopeScaling("yarn", 4.0,
    original_max_position_embeddings=32768, attention_factor=1.138629436111989)
    """

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all frequencies / factor; llama3, yarn: the low ones, with a passage to the others
    that is smooth in the frequency (llama3) or linear in the channel (yarn)."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this stay."""
    original_max_position_embeddings: int = 8192
    """llama3, yarn: the context length before stretching."""
    beta_fast: float = 32
    """yarn: channels that turn at least this often over the original length stay."""
    beta_slow: float = 1
    """yarn: channels that turn at most this often over the original length are divided."""
    truncate: bool = True
    """yarn: the passage begins and ends at whole channels."""
    attention_factor: float = 1.0
    """yarn: what the rotated queries and keys are multiplied by."""


@dataclass(frozen=True)
class Architecture:
    """Everything that the model's computation depends on, from config.json alone.

    Example (a Qwen3): Architecture(family="qwen3", num_layers=28, hidden_size=1024,
        ffn_hidden_size=3072, num_attention_heads=16, num_query_groups=8, kv_channels=128,
        vocab_size=151936, max_position_embeddings=40960, norm_epsilon=1e-6, rotary_base=1e6,
        tie_word_embeddings=True, qk_layernorm=True, add_qkv_bias=False, hf_dtype="bfloat16")
    """

    family: str
    """`model_type` of config.json: which table converts the weights."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Size of the MLP's inner layer; of each expert's in a mixture of experts."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Size of one head."""
    vocab_size: int
    """Rows of the embedding as stored; Megatron may pad them."""
    max_position_embeddings: int
    """Longest sequence; the stretched length where YaRN stretches."""
    norm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    """The output layer is the embedding."""
    qk_layernorm: bool
    """RMS norm over the channels of each query and key head."""
    add_qkv_bias: bool
    """Biases in the query, key and value projections."""
    hf_dtype: str
    """dtype named by config.json: `float32`, `bfloat16` or `float16`."""
    rope_scaling: RopeScaling | None = None
    num_experts: int = 0
    """Experts of each layer; 0: a dense model."""
    num_experts_per_token: int = 0
    """Experts that each token is routed to."""
    normalize_router_weights: bool = False
    """A token's router weights sum to 1 over its experts, not over all experts."""
    sliding_window: int | None = None
    """Tokens that a token sees in a layer that slides, itself included; None: no layer does."""
    sliding_layers: tuple[int, ...] = ()
    """Numbers of the layers that slide, from 0, ascending; in the others attention is full."""
    add_bias_linear: bool = False
    """Biases in all projections of attention and MLP."""

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token sees in a layer (from 0, in the whole model), itself included.

        None: all those before it. Position q sees k where q - window < k <= q.
        """
        return self.sliding_window if layer in self.sliding_layers else None

    @property
    def softmax_scale_factor(self) -> float:
        """What the scores of attention are multiplied by, besides kv_channels ** -0.5.

        YaRN's factor of queries and keys, squared (arXiv 2309.00071, section 3.4); else 1.
        """
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor**2

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.kv_channels


VOCAB_MULTIPLE = 16
"""Rows of the embedding on each tensor-parallel rank are a multiple of this."""


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding over all ranks; rows from `vocab_size` on are padding."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


class Transform(Protocol):
    """How some Hugging Face tensors become one Megatron parameter, and back."""

    @property
    def sharded(self) -> bool:
        """Whether tensor parallelism splits the parameter (else every rank holds all of it)."""
        ...

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        """Shape of each Hugging Face tensor."""
        ...

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        """Shape of the whole parameter, without padding of the vocabulary."""
        ...

    def cuts(self, arch: Architecture, tp_size: int) -> tuple[int, list[int]]:
        """(dim, bounds): where TP of this size cuts the whole parameter.

        `bounds` begin with 0 and end with the dim's size; each piece between two of them belongs to
        one rank, and a rank may hold several.
        """
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
        """The Hugging Face tensors from the parameter's shards, in the order of the ranks.

        Like `to_megatron`, it copies only what it has to: they may be views of what was given.
        """
        ...


def _share(total: int, rank: int, size: int) -> slice:
    return slice(total * rank // size, total * (rank + 1) // size)


def _join(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The shards in order; a single one is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _bounds(total: int, size: int) -> list[int]:
    return [total * rank // size for rank in range(size + 1)]


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
        return (self.megatron_shape(arch),)

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        return tuple(getattr(arch, dim) for dim in self.dims)

    def cuts(self, arch: Architecture, tp_size: int) -> tuple[int, list[int]]:
        shape = self.megatron_shape(arch)
        return (
            (0, [0, shape[0]])
            if self.split is None
            else (self.split, _bounds(shape[self.split], tp_size))
        )

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
        return (shards[0] if self.split is None else _join(shards, self.split),)


@dataclass(frozen=True)
class QueryKeyValue:
    """q, k, v <-> rows `[q..q k v]` of each query group, groups in order, rows split over TP."""

    bias: bool = False
    """The vector of biases instead of the matrix."""
    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        sizes = (arch.query_size, arch.key_value_size, arch.key_value_size)
        return tuple((size, *self._columns(arch)) for size in sizes)

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        return (arch.query_size + 2 * arch.key_value_size, *self._columns(arch))

    def cuts(self, arch: Architecture, tp_size: int) -> tuple[int, list[int]]:
        return 0, _bounds(self.megatron_shape(arch)[0], tp_size)

    def _columns(self, arch: Architecture) -> tuple[int, ...]:
        return () if self.bias else (arch.hidden_size,)

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
        group_rows = self.megatron_shape(arch)[0] // arch.num_query_groups
        rows = _share(group_rows * arch.num_query_groups, tp_rank, tp_size)
        first, last = rows.start // group_rows, -(-rows.stop // group_rows)
        parts = []
        for source, (size, *columns) in zip(hf, self.hf_shapes(arch), strict=True):
            per_group = size // arch.num_query_groups
            part = source[first * per_group : last * per_group]
            parts.append(part.reshape(last - first, per_group, *columns))
        groups = torch.cat(parts, dim=1).flatten(0, 1)
        return groups[rows.start - first * group_rows : rows.stop - first * group_rows]

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        shapes = self.hf_shapes(arch)
        groups = _join(shards).unflatten(0, (arch.num_query_groups, -1))
        parts = groups.split([size // arch.num_query_groups for size, *_ in shapes], dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


@dataclass(frozen=True)
class GatedMLP:
    """gate, up <-> `[gate_r; up_r]` on each TP rank r: every rank multiplies its own halves."""

    bias: bool = False
    """The vector of biases instead of the matrix."""
    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return ((arch.ffn_hidden_size, *self._columns(arch)),) * 2

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        return (2 * arch.ffn_hidden_size, *self._columns(arch))

    def _columns(self, arch: Architecture) -> tuple[int, ...]:
        return () if self.bias else (arch.hidden_size,)

    def cuts(self, arch: Architecture, tp_size: int) -> tuple[int, list[int]]:
        # The whole parameter is [gate; up], each cut for itself.
        bounds = _bounds(arch.ffn_hidden_size, tp_size)
        return 0, bounds + [arch.ffn_hidden_size + bound for bound in bounds[1:]]

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
        return tuple(_join(rows) for rows in zip(*halves, strict=True))


@dataclass(frozen=True)
class Vocab:
    """[V, H] <-> rows split over TP and padded at the end with zeros; export cuts the padding."""

    sharded = True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return (self.megatron_shape(arch),)

    def megatron_shape(self, arch: Architecture) -> tuple[int, ...]:
        return (arch.vocab_size, arch.hidden_size)

    def cuts(self, arch: Architecture, tp_size: int) -> tuple[int, list[int]]:
        rows = padded_vocab_size(arch.vocab_size, tp_size) // tp_size
        return 0, [*range(0, arch.vocab_size, rows), arch.vocab_size]

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
        part = hf[0][start:stop]
        if stop - start == rows:
            return part
        return torch.nn.functional.pad(part, (0, 0, 0, rows - (stop - start)))

    def to_hf(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (_join(shards)[: arch.vocab_size],)


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    As declared, `{layer}` stands for the layer's number in the whole model and `{expert}` for the
    expert's in its layer, both from 0; `at` fills them in.
    """

    megatron: tuple[str, ...]
    """The local layer spec's name, then what other specs call the same parameter."""
    hf: tuple[str, ...]
    transform: Transform
    key: str
    """Name in Megatron's distributed checkpoints, which stack the layers (and within them the
    experts) of a parameter along leading dims of one tensor."""
    index: tuple[int, ...] = ()
    """Place along those leading dims: (), (layer,) or (layer, expert)."""

    @property
    def name(self) -> str:
        """For people and manifests. Example: `decoder.layers.mlp.linear_fc1.weight[3]`."""
        return self.key + (f"[{','.join(map(str, self.index))}]" if self.index else "")

    @property
    def is_expert(self) -> bool:
        """One of a layer's experts: split over expert-parallel ranks."""
        return len(self.index) == 2 or any("{expert}" in name for name in self.hf)

    def at(self, layer: int, expert: int | None = None) -> Entry:
        """This entry with the numbers of layer and expert filled in."""
        places = {"layer": layer, "expert": expert}
        return Entry(
            tuple(name.format(**places) for name in self.megatron),
            tuple(name.format(**places) for name in self.hf),
            self.transform,
            self.key,
            (layer,) if expert is None else (layer, expert),
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
    biases: tuple[Entry, ...] = ()
    """Further parameters of every layer of an architecture with `add_bias_linear`."""
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    norm_epsilon: float = 1e-6
    """What transformers takes where config.json names none; as are the next two."""
    rotary_base: float = 10000.0
    normalize_router_weights: bool = False
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Fields of `Architecture` and their keys in config.json, where they are not Llama's."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Further keys that are read, and what transformers takes where one is missing."""
    only: Mapping[str, object] = field(default_factory=dict)
    """Keys that would change the computation, and the one value that is implemented."""
    harmless: frozenset[str] = frozenset()
    """Keys that change nothing that is computed, besides those of every family."""
    tied: tuple[str, str] = ("model.embed_tokens.weight", "lm_head.weight")
    """The two names of a tied weight, the one that is exported first."""
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of stored tensors that follow from config.json and are not read."""

    def entries(self, arch: Architecture) -> list[Entry]:
        """Every entry of the whole model, in the order of the forward pass."""
        layers = range(arch.num_layers)
        return [*self.first, *(e for n in layers for e in self.of_layer(arch, n)), *self.last]

    def of_layer(self, arch: Architecture, layer: int) -> list[Entry]:
        """Every entry of one layer, its experts in order."""
        return [
            entry.at(layer, expert)
            for entry in self.layer
            for expert in (range(arch.num_experts) if entry.is_expert else (None,))
        ]
