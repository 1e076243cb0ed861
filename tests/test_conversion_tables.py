"""The conversion tables: every entry of every family against loops, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_drpo.checkpoint.families import (
    FAMILIES,
    Architecture,
    Entry,
    family_of,
    padded_vocab_size,
    read_architecture,
)
from megatron_drpo.checkpoint.families.table import Vocab
from tests.tiny_models import EXPERTS, LAYERS, MOE, VOCAB, reference_shard, save_tiny

NAMES = [family.name for family in FAMILIES]


@pytest.fixture(scope="module", params=[*NAMES, "llama with biases"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A tiny checkpoint of each family, and its tensors."""
    directory = tmp_path_factory.mktemp(request.param)
    family, *biased = request.param.split(" with ")
    changes = dict.fromkeys(("attention_bias", "mlp_bias"), True) if biased else {}
    return directory, save_tiny(directory, family, **changes)


def entries(architecture: Architecture) -> list[Entry]:
    """Every entry outside the layers, and those of layer 1."""
    family = family_of(architecture)
    return [*family.first, *family.of_layer(architecture, 1), *family.last]


def test_every_stored_tensor_has_one_entry(saved: tuple[Path, dict[str, Tensor]]) -> None:
    directory, hf = saved
    architecture = read_architecture(directory)
    table = family_of(architecture).entries(architecture)
    assert sorted(name for entry in table for name in entry.hf) == sorted(hf)
    for of_one in (lambda entry: entry.name, lambda entry: entry.megatron[0]):
        assert len({of_one(entry) for entry in table}) == len(table)
    # A distributed checkpoint stacks what has one key: all of it must have the same form.
    by_key: dict[str, list[Entry]] = {}
    for entry in table:
        by_key.setdefault(entry.key, []).append(entry)
    for key, stacked in by_key.items():
        assert {entry.transform for entry in stacked} == {stacked[0].transform}, key
        layers, experts = range(LAYERS), range(EXPERTS)
        if not stacked[0].index:
            assert len(stacked) == 1
        elif stacked[0].is_expert:
            assert [e.index for e in stacked] == [(n, x) for n in layers for x in experts]
        else:
            assert [entry.index for entry in stacked] == [(n,) for n in layers]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_every_entry_shards_as_written_out_and_comes_back(
    saved: tuple[Path, dict[str, Tensor]], tp_size: int
) -> None:
    directory, hf = saved
    architecture = read_architecture(directory)
    rows = padded_vocab_size(VOCAB, tp_size) // tp_size
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for entry in entries(architecture):
            name, transform = entry.megatron[0], entry.transform
            stored = [hf[source] for source in entry.hf]
            lazy = [file.get_slice(source) for source in entry.hf]
            assert transform.hf_shapes(architecture) == tuple(t.shape for t in stored)
            shards = []
            for rank in range(tp_size):
                expected = reference_shard(hf, name, rank, tp_size, rows)
                shard = transform.to_megatron(lazy, expected.shape, rank, tp_size, architecture)
                assert torch.equal(shard, expected), f"{name} on rank {rank} of {tp_size}"
                assert transform.sharded or torch.equal(shard, stored[0])
                shards.append(shard)
            back = transform.to_hf(shards, architecture)
            assert all(torch.equal(a, b) for a, b in zip(back, stored, strict=True)), name


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_cuts_of_the_whole_parameter_are_what_the_ranks_hold(
    saved: tuple[Path, dict[str, Tensor]], tp_size: int
) -> None:
    directory, hf = saved
    architecture = read_architecture(directory)
    rows = padded_vocab_size(VOCAB, tp_size) // tp_size
    for entry in entries(architecture):
        name, transform = entry.megatron[0], entry.transform
        stored = [hf[source] for source in entry.hf]
        shape = transform.megatron_shape(architecture)
        whole = transform.to_megatron(stored, shape, 0, 1, architecture)
        assert whole.shape == shape, name
        back = transform.to_hf([whole], architecture)
        assert all(torch.equal(a, b) for a, b in zip(back, stored, strict=True)), name

        dim, bounds = transform.cuts(architecture, tp_size)
        assert (bounds[0], bounds[-1]) == (0, shape[dim]) and bounds == sorted(set(bounds)), name
        pieces = [
            whole.narrow(dim, start, stop - start)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]
        for rank in range(tp_size):
            held = pieces[rank::tp_size] if transform.sharded else pieces
            shard = reference_shard(hf, name, rank, tp_size, rows)
            filled = sum(piece.shape[dim] for piece in held)
            assert not shard.narrow(dim, filled, shard.shape[dim] - filled).any(), name
            if held:  # else it holds nothing but padding of the vocabulary
                assert torch.equal(shard.narrow(dim, 0, filled), torch.cat(held, dim)), name
            if not isinstance(transform, Vocab):
                assert filled == shard.shape[dim], name


def test_a_rank_with_nothing_but_padding_is_zero(saved: tuple[Path, dict[str, Tensor]]) -> None:
    directory, hf = saved
    architecture = read_architecture(directory)
    embedding = family_of(architecture).first[0]
    source = hf[embedding.hf[0]]
    shards = [
        embedding.transform.to_megatron([source], (40, 32), rank, 3, architecture)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(shards)[:VOCAB], source)
    assert not torch.cat(shards)[VOCAB:].any()


@pytest.mark.parametrize("name", NAMES)
def test_megatron_names_of_both_layer_specs(tmp_path: Path, name: str) -> None:
    """Transformer Engine fuses norms and groups experts, and is not there to be asked."""
    save_tiny(tmp_path, name)
    architecture = read_architecture(tmp_path)
    names = {names[0]: names[1:] for names in (e.megatron for e in entries(architecture))}
    layer = "decoder.layers.1."
    second = {layer + "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    if name in MOE:
        for expert in range(EXPERTS):
            for linear in ("linear_fc1", "linear_fc2"):
                local = f"{layer}mlp.experts.local_experts.{expert}.{linear}.weight"
                second[local] = f"mlp.experts.{linear}.weight{expert}"
    else:
        second[layer + "pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    assert {local: other for local, other in names.items() if other} == {
        local: (layer + other,) for local, other in second.items()
    }
