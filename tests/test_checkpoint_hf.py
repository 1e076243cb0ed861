"""HF <-> Megatron in one process: transforms against loops, real models, damaged checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_drpo.checkpoint.families import FAMILIES, Architecture, read_architecture
from megatron_drpo.checkpoint.hf import export_hf, load_hf, verify_checkpoint
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import VOCAB, reference_shard, save_tiny, tiny_model

CASES = [(family, tie) for family in ("llama", "qwen3") for tie in (False, True)]
ONE_RANK = {"tp_group": None, "pp_group": None, "dp_rank": 0}


# --- Transforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_every_entry_shards_as_written_out_and_comes_back(
    tmp_path: Path, family: Any, tp_size: int
) -> None:
    hf = save_tiny(tmp_path, family.name)
    architecture = read_architecture(tmp_path)
    padded = 64  # of 61: the last rank of 8 holds 5 real rows
    for template in family.first + family.layer + family.last:
        entry = template.at(1)
        name = entry.megatron[0]
        tensors = [hf[source] for source in entry.hf]
        assert entry.transform.hf_shapes(architecture) == tuple(t.shape for t in tensors)
        shards = []
        for rank in range(tp_size):
            expected = reference_shard(hf, name, rank, tp_size, padded // tp_size)
            shard = entry.transform.to_megatron(
                tensors, expected.shape, rank, tp_size, architecture
            )
            assert torch.equal(shard, expected), f"{name} on rank {rank} of {tp_size}"
            assert entry.transform.sharded or torch.equal(shard, tensors[0])
            shards.append(shard)
        back = entry.transform.to_hf(shards, architecture)
        assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True)), name


def test_a_rank_with_nothing_but_padding_is_zero(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    architecture = read_architecture(tmp_path)
    vocab = FAMILIES[0].first[0].transform
    source = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    shards = [vocab.to_megatron([source], (40, 32), rank, 3, architecture) for rank in range(3)]
    assert torch.equal(torch.cat(shards)[:VOCAB], source)
    assert not torch.cat(shards)[VOCAB:].any()


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
    load_hf(tmp_path, architecture, chunks, tp_rank=0, tp_size=1)
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
    load_hf(source, architecture, chunks, tp_rank=0, tp_size=1)
    export_hf(out, source, architecture, chunks, **ONE_RANK)

    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], value), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert list(out.parent.iterdir()) == [out]
    reloaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    expected = tiny_model(family, tie=tie, dtype=dtype).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())


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
    load_hf(source, architecture, chunks, tp_rank=0, tp_size=1)
    export_hf(out, source, architecture, chunks, **ONE_RANK)
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
    load_hf(source, architecture, chunks, tp_rank=0, tp_size=1)
    assert torch.equal(chunks[0].embedding.word_embeddings.weight[:VOCAB], weight)
    export_hf(out, source, architecture, chunks, **ONE_RANK)
    exported = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in exported
    assert torch.equal(exported["model.embed_tokens.weight"], weight)


def test_two_different_tied_weights_are_refused(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    save_tiny(tmp_path, "llama", tie=True)
    edit_weights(tmp_path, **{"lm_head.weight": torch.zeros(VOCAB, 32)})
    architecture = read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight and lm_head.weight differ"):
        load_hf(tmp_path, architecture, build(architecture), tp_rank=0, tp_size=1)


def test_loads_several_files_wrapped_chunks_and_cached_frequencies(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    # Old checkpoints store a table that follows from rope_theta.
    cached = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(files[0]) | {cached: torch.ones(4)}, files[0])
    index["weight_map"][cached] = files[0].name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    architecture = read_architecture(tmp_path)
    verify_checkpoint(tmp_path, architecture)
    chunks = build(architecture)
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = chunks[0]
    load_hf(tmp_path, architecture, [wrapped], tp_rank=0, tp_size=1)
    hf = model.state_dict()
    for name, parameter in chunks[0].named_parameters():
        assert torch.equal(parameter, reference_shard(hf, name, 0, 1, len(parameter))), name


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
    load_hf(tmp_path, architecture, chunks, tp_rank=0, tp_size=1)
    layer = chunks[0].decoder.layers[2]
    qkv_norm, fc1_norm = (
        layer.self_attention.linear_qkv.layer_norm_weight,
        layer.mlp.linear_fc1.layer_norm_weight,
    )
    assert torch.equal(qkv_norm, hf["model.layers.2.input_layernorm.weight"])
    assert torch.equal(fc1_norm, hf["model.layers.2.post_attention_layernorm.weight"])


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
        load_hf(tmp_path, architecture, chunks, tp_rank=0, tp_size=1)


def test_stages_that_leave_out_a_layer_are_not_exported(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "qwen3")
    architecture = read_architecture(source)
    chunks = build(dataclasses.replace(architecture, num_layers=3))
    load_hf(source, architecture, chunks, tp_rank=0, tp_size=1)  # as if layer 3 were elsewhere
    with pytest.raises(CheckpointError, match=r"model.layers.3.\S* \[\d+.*\] is missing"):
        export_hf(out, source, architecture, chunks, **ONE_RANK)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_untied_parameters_of_a_tied_model_are_refused(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    save_tiny(tmp_path, "llama", tie=True)
    architecture = read_architecture(tmp_path)
    chunks = build(dataclasses.replace(architecture, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="output_layer.weight is a parameter that llama"):
        load_hf(tmp_path, architecture, chunks, tp_rank=0, tp_size=1)


def test_export_replaces_a_checkpoint_and_nothing_else(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_tiny(source, "llama")
    architecture = read_architecture(source)
    chunks = build(architecture)
    load_hf(source, architecture, chunks, tp_rank=0, tp_size=1)

    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="out: exists and is no checkpoint"):
        export_hf(out, source, architecture, chunks, **ONE_RANK)
    assert (out / "thesis.tex").read_text() == "years of work"
    for path in (source, tmp_path):
        with pytest.raises(CheckpointError, match="holds the checkpoint the run started from"):
            export_hf(path, source, architecture, chunks, **ONE_RANK)
    verify_checkpoint(source, architecture)

    (out / "thesis.tex").unlink()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").write_text("of an export that was killed")
    for value in (1.0, 2.0):
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.fill_(value)
        export_hf(out, source, architecture, chunks, **ONE_RANK)
        norm = load_file(out / "model.safetensors")["model.norm.weight"]
        assert torch.equal(norm, torch.full_like(norm, value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_other_data_parallel_replicas_write_nothing(
    tmp_path: Path, build: Callable[..., list[Any]]
) -> None:
    save_tiny(tmp_path / "in", "llama")
    architecture = read_architecture(tmp_path / "in")
    out = tmp_path / "out"
    export_hf(out, tmp_path / "in", architecture, build(architecture), **ONE_RANK | {"dp_rank": 1})
    assert not out.exists()


# --- Damaged checkpoints ------------------------------------------------------------------------


def edit_weights(directory: Path, drop: tuple[str, ...] = (), **add: Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    save_file(tensors | add, path)


def problem(directory: Path) -> str:
    """The message of the error that verification must raise."""
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(directory, read_architecture(directory))
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_tiny(tmp_path, "qwen3")
    verify_checkpoint(tmp_path, read_architecture(tmp_path))
    return tmp_path


def test_all_wrong_tensors_are_reported_with_file_and_both_shapes(saved: Path) -> None:
    edit_weights(
        saved,
        drop=("model.layers.3.mlp.up_proj.weight", "lm_head.weight"),
        **{
            "model.norm.weight": torch.zeros(31),
            "model.layers.4.mlp.up_proj.weight": torch.zeros(40, 32),
            "model.layers.0.self_attn.q_norm.weight": torch.zeros(8, dtype=torch.int8),
        },
    )
    lines = problem(saved).splitlines()
    file = saved / "model.safetensors"
    assert sorted(lines[1:]) == sorted(
        [
            f"  model.layers.3.mlp.up_proj.weight [40, 32] is missing from {saved}",
            f"  lm_head.weight [61, 32] is missing from {saved}",
            f"  {file}: model.norm.weight has shape [31], config.json makes it [32]",
            f"  {file}: model.layers.4.mlp.up_proj.weight [40, 32] is left over: qwen3 with 4 "
            "layers has no such tensor",
            f"  {file}: model.layers.0.self_attn.q_norm.weight has dtype I8, must be one of BF16, "
            "F16, F32",
        ]
    )


def test_a_truncated_file_is_reported_with_both_sizes(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert f"{path}: is cut off or damaged: {len(data) - 100} bytes, its header says" in problem(
        saved
    )
    assert str(len(data)) in problem(saved)
    path.write_bytes(data[:50])
    header = 8 + int.from_bytes(data[:8], "little")
    assert f"{path}: is cut off: 50 bytes, its header needs {header}" in problem(saved)


def test_other_contents_are_no_safetensors_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert f"{path}: is not a safetensors file" in problem(saved)
    assert "git lfs pull" in problem(saved)
    path.write_bytes(b"")
    assert f"{path}: is not a safetensors file" in problem(saved)
    path.write_bytes(b"\x05" + b"\0" * 7 + b"hello")
    assert f"{path}: is not a safetensors file" in problem(saved)


def test_a_pickled_checkpoint_is_not_opened(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json is there" in problem(saved)


def test_problems_of_several_files(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    index_path = tmp_path / "model.safetensors.index.json"
    files[0].unlink()
    save_file(load_file(files[1]) | {"stray": torch.zeros(1)}, files[1])
    message = problem(tmp_path)
    assert f"{files[0]}: cannot be read (No such file" in message
    assert f"{files[1]}: stray is not placed there by {index_path.name}" in message

    index_path.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    assert "'../secret.safetensors' is not the name of a file beside it" in problem(tmp_path)
    index_path.write_text("{}")
    assert f"{index_path}: is not a safetensors index" in problem(tmp_path)


def test_load_verifies_first(saved: Path, build: Callable[..., list[Any]]) -> None:
    edit_weights(saved, drop=("model.norm.weight",))
    architecture = read_architecture(saved)
    chunks = build(architecture)
    before = [parameter.clone() for parameter in chunks[0].parameters()]
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        load_hf(saved, architecture, chunks, tp_rank=0, tp_size=1)
    assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
