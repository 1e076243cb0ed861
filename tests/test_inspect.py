"""`describe`: what a person reads about any checkpoint, checked against what was put there."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_drpo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_drpo.checkpoint.inspect import Row, Stored, collapse, describe, size, table
from megatron_drpo.checkpoint.resume import LATEST, STATE
from megatron_drpo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import save_tiny


def facts(text: str) -> dict[str, str]:
    """The lines above the table."""
    lines = [line for line in text.partition("\n\n")[0].splitlines() if not line.startswith(" ")]
    return {key: value.strip() for key, _, value in (line.partition("  ") for line in lines)}


def rows(text: str) -> list[list[str]]:
    """The table: fields that two or more spaces separate, whatever their width."""
    lines = text.partition("\n\n")[2].splitlines()
    return [[field.strip() for field in line.split("  ") if field] for line in lines]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "qwen", "qwen3", dtype=torch.bfloat16)
    return tmp_path / "qwen"


# --- The table ----------------------------------------------------------------------------------


def test_layers_and_experts_collapse() -> None:
    matrix, other = Stored("bfloat16", (4, 8), 64), Stored("bfloat16", (2, 8), 32)
    tensors = {"model.embed.weight": Stored("float32", (16, 8), 512)}
    for layer in range(12):
        for expert in range(3):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.w1.weight"] = matrix
    tensors["model.layers.7.mlp.experts.0.w1.weight"] = other
    assert collapse(tensors) == [
        Row("model.embed.weight", 1, "float32", (16, 8), 512),
        Row("model.layers.{0..11}.mlp.experts.{0..2}.w1.weight", 35, "bfloat16", (4, 8), 35 * 64),
        Row("model.layers.7.mlp.experts.0.w1.weight", 1, "bfloat16", (2, 8), 32),
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.1.w", "a.2.w", "a.5.w", "a.8.w", "a.9.w"], "a.{0..2,5,8..9}.w"),
        (["a.10.w", "a.9.w"], "a.{9..10}.w"),
        (["a.3.w"], "a.3.w"),
        (["x.linear_fc1.weight0", "x.linear_fc1.weight1"], "x.linear_fc1.weight{0..1}"),
        (["a.w.3", "a.w.4"], "a.w.{3..4}"),
    ],
)
def test_numbers_collapse_to_ranges(names: list[str], expected: str) -> None:
    (row,) = collapse(dict.fromkeys(names, Stored("float32", (1,), 4)))
    assert (row.name, row.count, row.num_bytes) == (expected, len(names), 4 * len(names))


def test_numbers_inside_words_stay() -> None:
    names = ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "conv1d.w", "conv2d.w"]
    assert [row.name for row in collapse(dict.fromkeys(names, Stored("float32", (1,), 4)))] == names


def test_another_dtype_is_another_row() -> None:
    tensors = {"l.0.w": Stored("float32", (2,), 8), "l.1.w": Stored("bfloat16", (2,), 4)}
    assert [(row.name, row.dtype) for row in collapse(tensors)] == [
        ("l.0.w", "float32"),
        ("l.1.w", "bfloat16"),
    ]


def test_columns_are_aligned_and_summed() -> None:
    lines = table(
        [
            Row("layers.{0..27}.q.weight", 28, "bfloat16", (2048, 1024), 28 * 2**22),
            Row("norm", 1, "float32", (7,), 28),
        ]
    )
    assert lines == [
        "layers.{0..27}.q.weight  28 x [2048, 1024]        bfloat16  112.0 MiB",
        "norm                      1 x [7]                 float32        28 B",
        "total                    29 x 58,720,263 numbers            112.0 MiB",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1,024.0 KiB"),
        (2**20, "1.0 MiB"),
        (2**30 * 3, "3.0 GiB"),
        (2**40 * 2, "2,048.0 GiB"),
    ],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


# --- Kinds of checkpoints -----------------------------------------------------------------------


def test_a_hugging_face_directory(qwen: Path) -> None:
    text = describe(qwen)
    stored = load_file(qwen / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in stored.values())
    assert facts(text)["kind"] == "Hugging Face"
    line = facts(text)["architecture"]
    for fact in ("qwen3", "4 layers", "hidden 32", "8 heads of 8 over 4 groups", "MLP 40"):
        assert fact in line
    assert facts(text)["complete"].startswith("yes")
    assert f"{numbers:,} numbers" in facts(text)["weights"] and "bfloat16" in facts(text)["weights"]
    assert facts(text)["manifest"] == "none"
    found = {name: rest for name, *rest in rows(text)}
    assert found["model.layers.{0..3}.self_attn.q_proj.weight"][0] == "4 x [64, 32]"
    assert f"{len(stored)} x {numbers:,} numbers" in found["total"][0]


def test_what_is_special_in_an_architecture_is_told(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "mistral", sliding_window=12)
    assert facts(describe(tmp_path / "m"))["architecture"].endswith("window 12 in 4 layers")
    biases = {"attention_bias": True, "mlp_bias": True}
    yarn = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0}
    save_tiny(tmp_path / "l", "llama", rope_parameters=yarn, **biases)
    line = facts(describe(tmp_path / "l"))["architecture"]
    assert line.endswith("biases") and "RoPE base 5000 scaled by 4 (yarn)" in line
    assert facts(describe(tmp_path / "l"))["complete"].startswith("yes")


def test_both_results_of_a_conversion(qwen: Path, tmp_path: Path) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    hf_to_megatron(qwen, megatron)
    text = describe(megatron)
    assert facts(text)["kind"] == "Megatron (torch_dist), converted from hf"
    assert facts(text)["complete"].startswith("yes")
    assert str(qwen) in facts(text)["manifest"] and facts(text)["verified"] == "no"
    key = "decoder.layers.self_attention.linear_qkv.weight"
    (row,) = [rest for name, *rest in rows(text) if name == key]
    assert row[0] == "1 x [4, 128, 32]"

    logits = {"num_tokens": 64, "layers": [0, 3], "tolerance": 1e-5, "max_abs_diff": 2e-6}
    proof = {"at": "2026-01-02T03:04:05+00:00", "round_trip": "bit-exact", "logits": logits}
    megatron_to_hf(megatron, back, max_shard_bytes=10_000, verify=lambda *_: proof)
    text = describe(back)
    assert "2026-01-02T03:04:05" in facts(text)["verified"]
    assert "64 tokens through 2 layers within 1.0e-05" in facts(text)["verified"]
    assert "2.0e-06" in facts(text)["verified"]
    original, again = rows(describe(qwen)), rows(text)
    assert original == again


def save_torch_dist(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    writer = TorchDistWriter(directory)
    for key, tensor in tensors.items():
        writer.add(key, tensor.shape, [0] * tensor.dim(), tensor)
    writer.finish({})


def test_padding_of_the_vocabulary_is_counted(qwen: Path, tmp_path: Path) -> None:
    hf_to_megatron(qwen, tmp_path / "megatron")
    assert facts(describe(tmp_path / "megatron"))["complete"].endswith("is there once")
    reader, key = TorchDistReader(tmp_path / "megatron"), "output_layer.weight"
    tensors = {name: reader.read(name) for name in reader.tensors}
    tensors[key] = torch.cat([tensors[key], torch.zeros(67, 32, dtype=torch.bfloat16)])
    save_torch_dist(tmp_path / "padded", tensors)
    shutil.copy(qwen / "config.json", tmp_path / "padded")
    complete = facts(describe(tmp_path / "padded"))["complete"]
    assert complete.startswith("yes") and complete.endswith(
        "; 67 rows of the vocabulary are padding"
    )


def test_the_newest_training_checkpoint_of_a_run(qwen: Path, tmp_path: Path) -> None:
    hf_to_megatron(qwen, tmp_path / "megatron")
    run, step = tmp_path / "run" / "checkpoints", "step-000040"
    key = "decoder.layers.mlp.linear_fc2.weight"
    weight = torch.zeros(4, 32, 40)
    save_torch_dist(run / step, {key: weight, f"optimizer.state.exp_avg.{key}": weight})
    state = {
        "progress": {"step": 40, "num_updates": 160, "skipped_updates": 0},
        **dict.fromkeys(("scheduler", "world_size", "megatron_core", "files", "config")),
    }
    (run / step / STATE).write_text(json.dumps(state))
    shutil.copy(qwen / "config.json", run / step)
    (run / LATEST).write_text(step)
    for directory in (run, run / step):
        found = facts(text := describe(directory))
        assert found["kind"] == "training state of a run, step 40"
        assert found["checkpoint"] == str(run / step)
        assert "qwen3" in found["architecture"]
        assert found["weights"].startswith("5,120 numbers")
        assert "5,120 numbers" in found["training state"]
        assert found["complete"] == "no"  # this one holds one weight only
        assert "is missing" in text


def test_training_state_of_another_version_still_shows_its_tensors(tmp_path: Path) -> None:
    save_torch_dist(tmp_path / "step-000001", {"output_layer.weight": torch.zeros(3, 5)})
    (tmp_path / "step-000001" / STATE).write_text("{}")
    text = describe(tmp_path / "step-000001")
    assert facts(text)["kind"] == "training state of a run"
    assert rows(text)[0][0] == "output_layer.weight"


def test_checkpoints_of_megatron_lm(tmp_path: Path) -> None:
    save_torch_dist(tmp_path / "iter_0000120", {"output_layer.weight": torch.zeros(3, 5)})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("120\n")
    text = describe(tmp_path)
    assert facts(text)["kind"] == "Megatron (torch_dist), iter_0000120"
    assert facts(text)["architecture"].startswith("not known: ")
    assert rows(text)[0] == ["output_layer.weight", "1 x [3, 5]", "float32", "60 B"]


# --- What cannot be known -----------------------------------------------------------------------


def test_an_architecture_that_is_not_supported_is_shown_without_it(tmp_path: Path) -> None:
    save_file({"h.0.attn.weight": torch.zeros(2, 6)}, tmp_path / "model.safetensors")
    text = describe(tmp_path)
    assert "config.json: cannot be read" in facts(text)["architecture"]
    assert "complete" not in facts(text)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    text = describe(tmp_path)
    assert "GPT2LMHeadModel" in facts(text)["architecture"]
    assert rows(text)[0][0] == "h.0.attn.weight"


def test_layer_2_comes_before_layer_10(tmp_path: Path) -> None:
    tensors = {f"h.{layer}.weight": torch.zeros(layer) for layer in (10, 2, 9)}
    save_file(tensors, tmp_path / "model.safetensors")
    names = [name for name, *_ in rows(describe(tmp_path))]
    assert names == ["h.2.weight", "h.9.weight", "h.10.weight", "total"]


def test_what_is_wrong_with_a_checkpoint_is_listed(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, qwen / "model.safetensors")
    text = describe(qwen)
    assert facts(text)["complete"] == "no"
    assert "model.norm.weight [32] is missing" in text and "extra.weight [32] is left over" in text
    assert any(row[0] == "extra.weight" for row in rows(text))


def test_a_checkpoint_that_is_not_that_of_its_manifest(qwen: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    hf_to_megatron(qwen, megatron)
    manifest = json.loads((megatron / "manifest.json").read_text())
    manifest["tensors"]["decoder.final_layernorm.weight"]["shape"] = [33]
    (megatron / "manifest.json").write_text(json.dumps(manifest))
    text = describe(megatron)
    assert facts(text)["complete"] == "no"
    assert "decoder.final_layernorm.weight" in text and "manifest.json says" in text


def test_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        describe(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        describe(tmp_path / "missing")


def test_an_index_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="is not trusted"):
        describe(tmp_path)
    assert not (tmp_path / "ran").exists()
