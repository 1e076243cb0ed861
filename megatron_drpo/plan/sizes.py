"""Parameters: of the whole model, and of a rank of each pipeline stage.

Read off the table that converts the family's weights, so that nothing is listed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_drpo.checkpoint.families import (
    Architecture,
    Entry,
    family_of,
    padded_vocab_size,
)
from megatron_drpo.checkpoint.families.table import Vocab
from megatron_drpo.plan.layouts import Shape


@dataclass(frozen=True)
class Parameters:
    """Of one rank. Example: Parameters(dense=98304, experts=0, embedding=8192, output=8192,
    largest=8192)."""

    dense: int
    """All but experts, embedding and output layer included."""
    experts: int
    embedding: int
    """Of `dense`: the embedding's rows on this rank; 0 on stages without it."""
    output: int
    """Of `dense`: the output layer's, where it is a parameter of its own: not where it is the
    embedding of the same rank."""
    largest: int
    """The biggest single one."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def count(architecture: Architecture, *, active: bool = False) -> int:
    """Parameters of the whole model, a tied embedding once, padding of the vocabulary left out.

    Args:
        active: of the experts only as many as a token is routed to.
    """
    family, experts = family_of(architecture), architecture.num_experts
    if active:
        experts = architecture.num_experts_per_token
    layer = sum(_size(e, architecture, 1) * (experts if e.is_expert else 1) for e in family.layer)
    tied = architecture.tie_word_embeddings
    ends = [*family.first, *(e for e in family.last if not (tied and _is_output(e)))]
    whole = sum(math.prod(entry.transform.megatron_shape(architecture)) for entry in ends)
    return architecture.num_layers * layer + whole


def parameters(
    architecture: Architecture, shape: Shape, stage_layers: Iterable[int]
) -> tuple[Parameters, ...]:
    """Of a rank of each pipeline stage; all ranks of a stage have equally many.

    Args:
        stage_layers: layers of each stage.
    """
    family, layers = family_of(architecture), tuple(stage_layers)
    split = [entry for entry in family.layer if not entry.is_expert]
    own = [entry for entry in family.layer if entry.is_expert]
    sizes = [_size(entry, architecture, shape.tp) for entry in split]
    expert_sizes = [_size(entry, architecture, shape.etp) for entry in own]
    num_experts = architecture.num_experts // shape.ep
    first = sum(_size(entry, architecture, shape.tp) for entry in family.first)
    output = sum(_size(e, architecture, shape.tp) for e in family.last if _is_output(e))
    norm = sum(_size(e, architecture, shape.tp) for e in family.last if not _is_output(e))
    stages = []
    for number, count_ in enumerate(layers):
        starts, ends = number == 0, number == len(layers) - 1
        # A tied output layer is a copy of the embedding where another stage has that.
        copied = architecture.tie_word_embeddings and starts
        embedding, out = first if starts else 0, output if ends and not copied else 0
        stages.append(
            Parameters(
                dense=count_ * sum(sizes) + embedding + out + (norm if ends else 0),
                experts=count_ * num_experts * sum(expert_sizes),
                embedding=embedding,
                output=out,
                largest=max(*sizes, *expert_sizes, embedding, out),
            )
        )
    return tuple(stages)


def _size(entry: Entry, architecture: Architecture, ranks: int) -> int:
    """Parameters of an entry on one of the ranks that split it."""
    shape = entry.transform.megatron_shape(architecture)
    if isinstance(entry.transform, Vocab):
        rows = padded_vocab_size(architecture.vocab_size, ranks)
        return rows // ranks * math.prod(shape[1:])
    return math.prod(shape) // (ranks if entry.transform.sharded else 1)


def _is_output(entry: Entry) -> bool:
    return isinstance(entry.transform, Vocab)
