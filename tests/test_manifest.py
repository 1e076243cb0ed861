"""Manifests: what they say of a tensor, that they come back as written, and what they notice."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.checkpoint.convert import hf_to_megatron
from megatron_drpo.checkpoint.families import read_architecture
from megatron_drpo.checkpoint.manifest import (
    Manifest,
    Source,
    TensorRecord,
    check_manifest,
    digest,
    read_manifest,
    write_manifest,
)
from megatron_drpo.checkpoint.torch_dist import open_weights
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import save_tiny

RECORD = TensorRecord((2, 3), "bfloat16", "0" * 64)
MANIFEST = Manifest(
    kind="megatron",
    architecture={"family": "llama", "rope_scaling": None, "rotary_base": 1e4},
    config_sha256="1" * 64,
    source=Source("hf", "/models/x", "2" * 64, {"a.weight": RECORD}, {"a.weight": "tied"}),
    tensors={"b.weight[0,1]": RECORD, "scalar": TensorRecord((), "float32", "3" * 64)},
    versions={"torch": "2"},
    verified={"logits": 1e-6},
)


def test_digest_is_of_the_values_in_row_major_order() -> None:
    values = [1.5, -2.0, 0.25, 8.0, -0.0, 3.0]
    matrix = torch.tensor(values).reshape(2, 3)
    assert digest(matrix) == hashlib.sha256(struct.pack("<6f", *values)).hexdigest()
    columns = [values[index] for index in (0, 3, 1, 4, 2, 5)]
    assert digest(matrix.t()) == hashlib.sha256(struct.pack("<6f", *columns)).hexdigest()
    assert digest(matrix[1]) == hashlib.sha256(struct.pack("<3f", *values[3:])).hexdigest()
    halves = b"".join(struct.pack("<f", value)[2:] for value in values)  # bf16: the upper half
    assert digest(matrix.bfloat16()) == hashlib.sha256(halves).hexdigest()
    assert digest(torch.tensor(1.5)) == hashlib.sha256(struct.pack("<f", 1.5)).hexdigest()


def test_comes_back_as_written(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format="megatron-drpo-manifest/2"),
        lambda c: c.pop("format"),
        lambda c: c.pop("tensors"),
        lambda c: c.update(surprise=1),
        lambda c: c["source"].pop("tensors"),
        lambda c: c["tensors"]["scalar"].pop("sha256"),
        lambda c: c.update(tensors=[1]),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, change: Any) -> None:
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    for text in (json.dumps(content), "{", "[]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"{path}: is not a manifest .*convert"):
            read_manifest(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    save_tiny(root / "hf", "qwen3")
    hf_to_megatron(root / "hf", root / "megatron")
    return root


def _check(directory: Path, manifest: Manifest, num_ranks: int = 1) -> list[list[str]]:
    with open_weights(directory, read_architecture(directory)) as weights:
        return [
            check_manifest(weights, manifest, rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]


def _manifest(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    assert manifest is not None
    return manifest


def test_a_checkpoint_as_it_was_written_has_no_problems(pair: Path) -> None:
    assert _check(pair / "megatron", _manifest(pair / "megatron")) == [[]]
    assert _check(pair / "megatron", _manifest(pair / "megatron"), 3) == [[], [], []]


def test_names_each_difference_and_shares_the_work(pair: Path, tmp_path: Path) -> None:
    """A Hugging Face directory against the manifest of what was converted from it, and changes."""
    source = _manifest(pair / "megatron").source
    manifest = Manifest("hf", {}, source.config_sha256, source, source.tensors, {})
    assert _check(pair / "hf", manifest) == [[]]

    tensors = load_file(pair / "hf" / "model.safetensors")
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    for name in names[:2]:
        tensors[name].view(torch.int32).view(-1)[-1] ^= 1  # the last bit
    tensors[names[2]] = tensors[names[2]].double().float().bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((pair / "hf" / "config.json").read_text() + "\n")
    missing = TensorRecord((1,), "float32", "4" * 64)
    more = Manifest(
        "megatron", {}, source.config_sha256, source, {**source.tensors, "x": missing}, {}
    )
    del more.tensors["model.embed_tokens.weight"]  # type: ignore[attr-defined]
    config = hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()
    for num_ranks in (1, 3):
        found = _check(tmp_path, more, num_ranks)
        problems = [problem for part in found for problem in part]
        assert len(problems) == 7
        assert all(p.startswith(f"{tmp_path}: ") and "convert or copy" in p for p in problems)
        for name in names[:2]:
            (said,) = [p for p in problems if f" {name} " in p]
            assert source.tensors[name].sha256[:12] in said
            assert digest(tensors[name])[:12] in said
        for words in (
            "is of kind hf, its manifest.json of kind megatron",
            f"config.json has SHA-256 {config[:12]}",
            "lm_head.weight is bfloat16 [61, 32], manifest.json says float32 [61, 32]",
            "model.embed_tokens.weight is not in manifest.json",
            "x is missing",
        ):
            assert sum(words in p for p in problems) == 1, words


def test_ranks_read_every_tensor_once_between_them(pair: Path) -> None:
    manifest = _manifest(pair / "megatron")
    read: list[set[str]] = []
    with open_weights(pair / "megatron", read_architecture(pair / "megatron")) as weights:
        load = weights.load

        def counted(name: str) -> torch.Tensor:
            assert not any(name in part for part in read)
            read[-1].add(name)
            return load(name)

        weights.load = counted
        for rank in range(3):
            read.append(set())
            assert check_manifest(weights, manifest, rank=rank, num_ranks=3) == []
    assert set().union(*read) == manifest.tensors.keys()
    assert max(map(len, read)) - min(map(len, read)) <= 1
