"""Weights into and out of model chunks in one process: transforms against loops, real models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_drpo.checkpoint.families import FAMILIES, Architecture, family_of, read_architecture
from megatron_drpo.checkpoint.hf import HfWeights, verify_checkpoint
from megatron_drpo.checkpoint.manifest import check_manifest, describe_architecture, read_manifest
from megatron_drpo.checkpoint.model_weights import Places, export_hf, load_weights
from megatron_drpo.errors import CheckpointError
from tests.plain_chunks import plain_chunk
from tests.tiny_models import VOCAB, reference_shard, save_tiny, tiny_model

CASES = [(family.name, tie) for family in FAMILIES for tie in (False, True)]


# --- A real Megatron model on one rank ----------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`build(architecture, bf16)`: the chunks of a one-rank model, as the trainer builds them."""
    from megatron_drpo.config import ModelConfig, ParallelConfig
    from megatron_drpo.device import Device
    from megatron_drpo.mcore import model, parallel

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    device = Device("cpu", "gloo", 0, "test")
    layout = parallel.initialize(ParallelConfig(), device, seed=1)

    def make(architecture: Architecture, bf16: bool = False) -> list[Any]:
        config = ModelConfig(hf_model="unused", bf16=bf16, transformer_impl="local")
        return model.build_model(architecture, config, layout, device)

    yield make
    parallel.destroy(layout)
    dist.destroy_process_group()


def load_directory(directory: Path, architecture: Architecture, chunks: list[Any]) -> None:
    with HfWeights(directory, architecture) as weights:
        load_weights(weights, architecture, chunks, Places())


def megatron_logits(chunk: Any, tokens: Tensor) -> Tensor:
    """[S, V] of one sequence."""
    from megatron_drpo.mcore.attention import row_layout
    from megatron_drpo.vocab_parallel import project

    layout = row_layout(torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    positions = torch.arange(len(tokens))
    with torch.no_grad():
        hidden = chunk(tokens, positions, layout)[:, 0]
        return project(hidden, chunk.output_weight())[:, :VOCAB]


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_logits_are_those_of_transformers(
    tmp_path: Path, build: Callable[..., list[Any]], family: str, tie: bool
) -> None:
    save_tiny(tmp_path, family, tie=tie)
    architecture = read_architecture(tmp_path)
    chunks = build(architecture)
    load_directory(tmp_path, architecture, chunks)
    tokens = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = tiny_model(family, tie=tie)(tokens[None]).logits[0]
    assert expected.std() > 0.5  # else the tolerance would say little
    assert (megatron_logits(chunks[0], tokens) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("family", "tie"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_and_export_is_bit_exact(
    tmp_path: Path, build: Callable[..., list[Any]], family: str, tie: bool, dtype: torch.dtype
) -> None:
    source, out = tmp_path / "in", tmp_path / "new" / "out"
    save_tiny(source, family, tie=tie, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    architecture = read_architecture(source)
    chunks = build(architecture, bf16=dtype == torch.bfloat16)
    load_directory(source, architecture, chunks)
    export_hf(out, source, architecture, chunks, Places())

    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], value), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert list(out.parent.iterdir()) == [out]
    reloaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    expected = tiny_model(family, tie=tie, dtype=dtype).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())


def test_the_manifest_of_an_export_says_what_it_holds_and_whence(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "qwen3")
    architecture = read_architecture(source)
    chunks = build(architecture, bf16=True)
    load_directory(source, architecture, chunks)
    export_hf(out, source, architecture, chunks, Places(), run="runs/sums, step 40")
    manifest = read_manifest(out)
    assert manifest is not None and manifest.kind == "hf" and manifest.verified is None
    assert (manifest.source.kind, manifest.source.path) == ("training run", "runs/sums, step 40")
    config = (source / "config.json").read_bytes()
    assert manifest.source.config_sha256 == hashlib.sha256(config).hexdigest()
    assert manifest.architecture == describe_architecture(read_architecture(out))
    with HfWeights(out, architecture) as weights:
        assert check_manifest(weights, manifest) == []
    for name, value in load_file(out / "model.safetensors").items():
        raw = value.view(torch.uint8).numpy().tobytes()
        assert manifest.tensors[name].sha256 == hashlib.sha256(raw).hexdigest()

    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with HfWeights(out, architecture) as weights:
        assert len(check_manifest(weights, manifest)) == 1


def test_export_has_the_dtype_of_the_parameters(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    hf = save_tiny(source, "qwen3")
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as transformers 4 wrote it
    (source / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(source)
    chunks = build(architecture, bf16=True)
    load_directory(source, architecture, chunks)
    export_hf(out, source, architecture, chunks, Places())
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], value.bfloat16()) for name, value in hf.items())
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    assert read_architecture(out) == dataclasses.replace(architecture, hf_dtype="bfloat16")


@pytest.mark.parametrize("stored", ["embedding only", "lm_head only", "both"])
def test_a_tied_weight_is_found_under_either_name(
    tmp_path: Path, build: Callable[..., list[Any]], stored: str
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "llama", tie=True)
    tensors = load_file(source / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    if stored != "lm_head only":
        tensors["model.embed_tokens.weight"] = weight
    if stored != "embedding only":
        tensors["lm_head.weight"] = weight.clone()
    save_file(tensors, source / "model.safetensors")
    architecture = read_architecture(source)
    chunks = build(architecture)
    load_directory(source, architecture, chunks)
    assert torch.equal(chunks[0].embedding.word_embeddings.weight[:VOCAB], weight)
    export_hf(out, source, architecture, chunks, Places())
    exported = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in exported
    assert torch.equal(exported["model.embed_tokens.weight"], weight)


def test_a_tied_weight_stored_twice_must_be_the_same(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    tensors = save_tiny(tmp_path, "llama", tie=True)
    save_file(tensors | {"lm_head.weight": torch.zeros(VOCAB, 32)}, tmp_path / "model.safetensors")
    architecture = read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight and lm_head.weight differ"):
        load_directory(tmp_path, architecture, build(architecture))


def test_loads_several_files_into_wrapped_chunks(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    architecture = read_architecture(tmp_path)
    chunks = build(architecture)
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = chunks[0]
    load_directory(tmp_path, architecture, [wrapped])
    hf = model.state_dict()
    for name, parameter in chunks[0].named_parameters():
        assert torch.equal(parameter, reference_shard(hf, name, 0, 1, len(parameter))), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, build: Callable[..., list[Any]], value: float, dtype: torch.dtype
) -> None:
    tensors = save_tiny(tmp_path, "qwen2", dtype=dtype)
    damaged = "model.layers.2.self_attn.v_proj.bias"
    tensors[damaged][-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    architecture = read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match=f"{damaged} holds NaN or infinity"):
        load_directory(tmp_path, architecture, build(architecture))


def test_transformer_engine_names_are_the_same_parameters(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    hf = save_tiny(tmp_path, "qwen3")
    architecture = read_architecture(tmp_path)
    chunks = build(architecture)
    for layer in chunks[0].decoder.layers:  # the layout of Transformer Engine's fused layers
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
        del layer.input_layernorm, layer.pre_mlp_layernorm
    load_directory(tmp_path, architecture, chunks)
    layer = chunks[0].decoder.layers[2]
    qkv_norm, fc1_norm = (
        layer.self_attention.linear_qkv.layer_norm_weight,
        layer.mlp.linear_fc1.layer_norm_weight,
    )
    assert torch.equal(qkv_norm, hf["model.layers.2.input_layernorm.weight"])
    assert torch.equal(fc1_norm, hf["model.layers.2.post_attention_layernorm.weight"])


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_grouped_experts_are_numbered_from_the_rank_s_first(tmp_path: Path, ep_rank: int) -> None:
    hf = save_tiny(tmp_path, "qwen3_moe")
    architecture = read_architecture(tmp_path)
    expected: dict[str, Tensor] = {}
    for layer in (2, 3):  # the second of two stages
        whole, local = f"decoder.layers.{layer}.", f"decoder.layers.{layer - 2}."
        for entry in family_of(architecture).of_layer(architecture, layer):
            name = entry.megatron[-1]  # Transformer Engine's, which has a module for all experts
            number = None
            if entry.is_expert:
                name, number = re.match(r"(.*weight)(\d+)$", name).groups()  # type: ignore
                name, number = f"{name}{int(number) - 2 * ep_rank}", int(number)
            if number is None or number // 2 == ep_rank:
                shard = reference_shard(hf, entry.megatron[0], 0, 1, 0)
                expected[name.replace(whole, local)] = shard
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight1" in expected
    expected["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    expected["output_layer.weight"] = reference_shard(hf, "output_layer.weight", 0, 1, 64)
    chunk = plain_chunk(
        {name: torch.full(value.shape, float("nan")) for name, value in expected.items()},
        num_layers=2,
        first_layer=2,
        pre_process=False,
    )
    with HfWeights(tmp_path, architecture) as weights:
        load_weights(weights, architecture, [chunk], Places(ep_rank=ep_rank, ep_size=2))
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_layernorm": False}, "layers.0.self_attention.q_layernorm.weight must be one"),
        ({"tie_word_embeddings": True}, "output_layer.weight must be one .* found 0"),
        ({"vocab_size": 40}, "vocabulary of 48 rows, the checkpoint has 61"),
        ({"ffn_hidden_size": 48}, r"gate_proj.* shape \[80, 32\] on .* model has \[96, 32\]"),
    ],
)
def test_a_model_of_another_architecture_is_refused(
    tmp_path: Path, build: Callable[..., list[Any]], changes: dict[str, Any], message: str
) -> None:
    save_tiny(tmp_path, "qwen3")
    architecture = read_architecture(tmp_path)
    chunks = build(dataclasses.replace(architecture, **changes))
    with pytest.raises(CheckpointError, match=message):
        load_directory(tmp_path, architecture, chunks)


def test_stages_that_leave_out_a_layer_are_not_exported(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "qwen3")
    architecture = read_architecture(source)
    chunks = build(dataclasses.replace(architecture, num_layers=3))
    load_directory(source, architecture, chunks)  # as if layer 3 were elsewhere
    with pytest.raises(CheckpointError, match=r"model.layers.3.\S* \[\d+.*\] is missing"):
        export_hf(out, source, architecture, chunks, Places())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_untied_parameters_of_a_tied_model_are_refused(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    save_tiny(tmp_path, "llama", tie=True)
    architecture = read_architecture(tmp_path)
    chunks = build(dataclasses.replace(architecture, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="output_layer.weight is a parameter that llama"):
        load_directory(tmp_path, architecture, chunks)


def test_export_replaces_a_checkpoint_and_nothing_else(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "llama")
    architecture = read_architecture(source)
    chunks = build(architecture)
    load_directory(source, architecture, chunks)

    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="out: exists and is no checkpoint"):
        export_hf(out, source, architecture, chunks, Places())
    assert (out / "thesis.tex").read_text() == "years of work"
    for path in (source, tmp_path):
        with pytest.raises(CheckpointError, match="holds the checkpoint the run started from"):
            export_hf(path, source, architecture, chunks, Places())
    verify_checkpoint(source, architecture)

    (out / "thesis.tex").unlink()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").write_text("of an export that was killed")
    for value in (1.0, 2.0):
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.fill_(value)
        export_hf(out, source, architecture, chunks, Places())
        norm = load_file(out / "model.safetensors")["model.norm.weight"]
        assert torch.equal(norm, torch.full_like(norm, value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
