"""config.json -> Architecture: exact where it is known, an error that says why everywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.checkpoint.families import Architecture, read_architecture
from megatron_drpo.errors import CheckpointError
from tests.tiny_models import hf_classes, tiny_model

EXPECTED = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "rotary_base": 5000.0,
    "add_qkv_bias": False,
    "hf_dtype": "float32",
}


def write(directory: Path, family: str, tie: bool = False, **changes: Any) -> dict[str, Any]:
    """The config.json that transformers writes for a tiny model, with some keys changed."""
    tiny_model(family, tie=tie).config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": [hf_classes(family)[1].__name__], "dtype": "float32"} | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))
    return config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tie", [False, True])
def test_reads_what_transformers_5_writes(tmp_path: Path, family: str, tie: bool) -> None:
    write(tmp_path, family, tie)
    assert read_architecture(tmp_path) == Architecture(
        family=family, tie_word_embeddings=tie, qk_layernorm=family == "qwen3", **EXPECTED
    )


@pytest.mark.parametrize("rope_scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_reads_what_transformers_4_wrote(tmp_path: Path, rope_scaling: Any) -> None:
    old = {"rope_parameters": "DROP", "rope_theta": 5000.0, "rope_scaling": rope_scaling}
    write(tmp_path, "llama", dtype="DROP", torch_dtype="bfloat16", **old)
    assert read_architecture(tmp_path) == Architecture(
        family="llama",
        tie_word_embeddings=False,
        qk_layernorm=False,
        **(EXPECTED | {"hf_dtype": "bfloat16"}),
    )


def test_missing_keys_mean_what_transformers_takes_for_them(tmp_path: Path) -> None:
    drop = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings", "dtype"),
        "DROP",
    )
    for family in ("llama", "qwen3"):
        config = write(tmp_path, family, **drop)
        kept = {key: value for key, value in config.items() if value != "DROP"}
        if family == "qwen3":  # its defaults are numbers, and 32 groups need as many heads
            write(tmp_path, family, **drop, num_attention_heads=64)
            kept["num_attention_heads"] = 64
        theirs = hf_classes(family)[0](**kept)
        ours = read_architecture(tmp_path)
        assert ours.num_query_groups == theirs.num_key_value_heads
        assert ours.kv_channels == theirs.head_dim
        assert ours.rotary_base == theirs.rope_parameters["rope_theta"] == 10000.0
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.hf_dtype == "float32"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}, "rope_parameters: .*llama3"),
        ("llama", {"rope_scaling": LLAMA3_ROPE}, "rope_scaling: .*llama3"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: .*linear"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling: .*factor"),
        ("llama", {"rope_theta": 10000.0}, "rope_theta: .*10000.0.*5000.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters: .*partial_rotary_factor",
        ),
        ("llama", {"attention_bias": True}, "attention_bias: True .*must be False"),
        ("llama", {"mlp_bias": True}, "mlp_bias: True .*must be False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' .*must be 'silu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.1 .*must be 0.0"),
        ("llama", {"sliding_window": 1024}, "sliding_window: 1024 is not known"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not known"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: .*bits"),
        ("llama", {"model_type": "mistral"}, "model_type: 'mistral' .*must be 'llama'"),
        ("llama", {"hidden_size": "DROP"}, "hidden_size: missing"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: 0; .*at least 1"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3; .*heads 8"),
        ("llama", {"head_dim": None, "hidden_size": 36}, "hidden_size: 36; .*heads 8"),
        ("llama", {"head_dim": 7}, "head_dim: 7; must be even"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps: '1e-5'; .*above 0"),
        ("llama", {"rope_parameters": {"rope_theta": -1}}, "rope_theta: -1; .*above 0"),
        ("llama", {"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn'; .*float32"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window: True .*must be False"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types: .*sliding_attention"),
    ],
)
def test_refuses_what_it_would_compute_wrongly(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, family, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_lists_all_problems_at_once(tmp_path: Path) -> None:
    write(tmp_path, "llama", attention_bias=True, vocab_size=-1, novelty=1)
    with pytest.raises(CheckpointError) as error:
        read_architecture(tmp_path)
    for key in ("attention_bias: True", "vocab_size: -1", "novelty: 1"):
        assert key in str(error.value)


@pytest.mark.parametrize("named", [["MixtralForCausalLM"], [], None, "LlamaForCausalLM"])
def test_unknown_architecture_names_the_supported_ones(tmp_path: Path, named: Any) -> None:
    write(tmp_path, "llama", architectures=named)
    with pytest.raises(CheckpointError, match="architectures: .*LlamaForCausalLM.*Qwen3ForCausal"):
        read_architecture(tmp_path)


def test_a_feature_that_is_off_is_no_problem(tmp_path: Path) -> None:
    off = {"final_logit_softcapping": None, "quantization_config": None, "pretraining_tp": 1}
    write(tmp_path, "llama", **off)
    read_architecture(tmp_path)
    write(tmp_path, "qwen3", use_sliding_window=False, sliding_window=4096)
    read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "config.json: cannot be read"), ("{", "not valid JSON"), ("[]", "a JSON object")],
)
def test_unreadable_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_architecture(tmp_path)
