"""config.json -> Architecture: exact where it is known, an error that says why everywhere else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_drpo.checkpoint.families import (
    FAMILIES,
    Architecture,
    RopeScaling,
    read_architecture,
    rotary_frequencies,
)
from megatron_drpo.errors import CheckpointError
from tests.published_configs import PUBLISHED
from tests.tiny_models import MOE, hf_classes, save_tiny, tiny_model

NAMES = [family.name for family in FAMILIES]

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
    "hf_dtype": "float32",
}


def expected(family: str, **changes: Any) -> Architecture:
    """What the tiny model of a family must be read as."""
    moe = {"num_experts": 4, "num_experts_per_token": 2, "normalize_router_weights": True}
    own = {
        "family": family,
        "tie_word_embeddings": False,
        "qk_layernorm": family in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": family == "qwen2",
    }
    return Architecture(**EXPECTED | own | (moe if family in MOE else {}) | changes)


def write(directory: Path, family: str, tie: bool = False, **changes: Any) -> dict[str, Any]:
    """The config.json that transformers writes for a tiny model, with some keys changed."""
    tiny_model(family, tie=tie).config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": [hf_classes(family)[1].__name__], "dtype": "float32"} | changes
    config = {key: value for key, value in config.items() if value != "DROP"}
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("tie", [False, True])
def test_reads_what_transformers_5_writes(tmp_path: Path, family: str, tie: bool) -> None:
    write(tmp_path, family, tie)
    assert read_architecture(tmp_path) == expected(family, tie_word_embeddings=tie)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("rope_scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_reads_what_transformers_4_wrote(tmp_path: Path, family: str, rope_scaling: Any) -> None:
    old: dict[str, Any] = {"rope_parameters": "DROP", "rope_theta": 5000.0}
    old |= {"rope_scaling": rope_scaling}
    old |= {"layer_types": "DROP", "dtype": "DROP", "torch_dtype": "bfloat16"}
    if family == "qwen3_moe":
        old |= {"num_local_experts": "DROP", "num_experts": 4}
    write(tmp_path, family, **old)
    assert read_architecture(tmp_path) == expected(family, hf_dtype="bfloat16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_published_models(tmp_path: Path, name: str) -> None:
    config, architecture = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == architecture


@pytest.mark.parametrize("family", NAMES)
def test_missing_keys_mean_what_transformers_takes_for_them(tmp_path: Path, family: str) -> None:
    optional = (
        *("num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "dtype"),
        *("tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers"),
        *("layer_types", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "hidden_act"),
    )
    # Where the number of key/value heads has a default, it must divide that of the heads.
    changes: dict[str, Any] = dict.fromkeys(optional, "DROP")
    changes |= {"num_attention_heads": 32, "hidden_size": 64, "max_position_embeddings": 10000}
    kept = write(tmp_path, family, **changes)
    make_config, make_model = hf_classes(family)
    theirs = make_config(**kept)
    ours = read_architecture(tmp_path)
    assert ours.num_query_groups == theirs.num_key_value_heads
    with torch.device("meta"):
        assert ours.kv_channels == make_model(theirs).model.layers[0].self_attn.head_dim
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hf_dtype == "float32"
    assert ours.max_position_embeddings == 10000
    window = getattr(theirs, "sliding_window", None)  # already None where it is not in use
    assert ours.sliding_window == window
    assert ours.sliding_layers == (tuple(range(ours.num_layers)) if window else ())
    # A Mixtral has no such key, and normalizes.
    assert ours.normalize_router_weights == getattr(theirs, "norm_topk_prob", family == "mixtral")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("layers", [28, 29])
def test_defaults_of_a_window_that_is_switched_on(tmp_path: Path, family: str, layers: int) -> None:
    kept = write(
        tmp_path,
        family,
        use_sliding_window=True,
        num_hidden_layers=layers,
        max_position_embeddings=10000,
        **dict.fromkeys(("sliding_window", "max_window_layers", "layer_types"), "DROP"),
    )
    theirs = hf_classes(family)[0](**kept)
    ours = read_architecture(tmp_path)
    # A Qwen3-MoE has no types of layers: all of them slide.
    kinds = getattr(theirs, "layer_types", ["sliding_attention"] * layers)
    windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [ours.window_of(layer) for layer in range(layers)] == windows
    assert any(windows) == (family == "qwen3_moe" or layers == 29)
    assert ours.max_position_embeddings == 10000


@pytest.mark.parametrize("family", MOE)
def test_experts_under_either_name(tmp_path: Path, family: str) -> None:
    names = ("num_experts", "num_local_experts")
    for name in names:
        changes: dict[str, Any] = dict.fromkeys(names, "DROP") | {name: 3}
        write(tmp_path, family, **changes)
        assert read_architecture(tmp_path).num_experts == 3
    write(tmp_path, family, num_experts=3, num_local_experts=4)
    with pytest.raises(CheckpointError, match="num_.*experts: [34], but num_.*experts: [34]"):
        read_architecture(tmp_path)


def test_router_weights_of_qwen3_moe_are_normalized_on_demand(tmp_path: Path) -> None:
    for value in (False, True):
        write(tmp_path, "qwen3_moe", norm_topk_prob=value)
        assert read_architecture(tmp_path).normalize_router_weights is value


# --- Sliding windows ----------------------------------------------------------------------------

SLIDING = {"use_sliding_window": True, "sliding_window": 6, "layer_types": "DROP"}


@pytest.mark.parametrize(
    ("family", "changes", "slides"),
    [
        ("mistral", {"sliding_window": 6}, "1111"),
        ("mistral", {"sliding_window": 64}, "0000"),  # no sequence is longer
        ("mistral", {"sliding_window": None}, "0000"),
        ("mixtral", {"sliding_window": 6}, "1111"),
        ("qwen2", SLIDING | {"max_window_layers": 3}, "0001"),
        ("qwen2", SLIDING | {"max_window_layers": 4}, "0000"),
        ("qwen2", SLIDING | {"use_sliding_window": False, "max_window_layers": 0}, "0000"),
        ("qwen3", SLIDING | {"max_window_layers": 0}, "1111"),
        ("qwen3", SLIDING | {"max_window_layers": -1}, "1111"),
        (
            "qwen3",
            SLIDING | {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "0101",
        ),
        (
            "qwen3",
            SLIDING | {"layer_types": ["full_attention"] * 4, "max_window_layers": 0},
            "0000",
        ),
        ("qwen3_moe", SLIDING | {"max_window_layers": 4}, "1111"),  # a key that Qwen3-MoE ignores
        ("qwen3_moe", SLIDING | {"use_sliding_window": False}, "0000"),
    ],
)
def test_windows_are_those_of_transformers_layer_by_layer(
    tmp_path: Path, family: str, changes: dict[str, Any], slides: str
) -> None:
    save_tiny(tmp_path, family)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value != "DROP"}
    path.write_text(json.dumps(config))
    architecture = read_architecture(tmp_path)
    assert architecture.max_position_embeddings == 64
    windows = [architecture.window_of(layer) for layer in range(4)]
    assert windows == [6 if slide == "1" else None for slide in slides]
    assert architecture.sliding_window == (6 if "1" in slides else None)

    # In transformers, too, the first token can be seen from the sixth and no more from the next.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        weights = model(torch.arange(10)[None], output_attentions=True).attentions
    for layer, window in zip(weights, windows, strict=True):
        assert (layer[0, :, 5, 0] > 0).all()
        assert (layer[0, :, 6:, 0] > 0).all() if window is None else (layer[0, :, 6:, 0] == 0).all()


# --- Rotary embeddings --------------------------------------------------------------------------

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def yarn(length: int = 32768, **changes: Any) -> RopeScaling:
    return RopeScaling("yarn", 4.0, original_max_position_embeddings=length, **changes)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        (LLAMA3_ROPE, LLAMA3),
        ({k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}, LLAMA3),
        (LLAMA3_ROPE | {"factor": 32, "high_freq_factor": 3}, RopeScaling("llama3", 32, 1, 3)),
        (
            LLAMA3_ROPE | {"original_max_position_embeddings": 48},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 48),
        ),
        (
            LLAMA3_ROPE | {"original_max_position_embeddings": None},  # the model's own length
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
        # Up to max_position_embeddings, the frequencies are the plain ones.
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500000.0}, None),
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"type": "linear", "factor": 4, "rope_theta": 500000.0}, RopeScaling("linear", 4)),
        ({"rope_type": "default", "partial_rotary_factor": 1.0}, None),
    ],
)
def test_reads_rope_scaling_in_both_spellings(
    tmp_path: Path, key: str, rope: dict[str, Any], scaling: RopeScaling | None
) -> None:
    changes = {"rope_parameters": "DROP", "rope_theta": 500000.0, key: rope}
    write(tmp_path, "llama", **changes)
    assert read_architecture(tmp_path) == expected(
        "llama", rotary_base=500000.0, rope_scaling=scaling
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("rope", "scaling", "longest"),
    [
        (YARN, yarn(attention_factor=0.1 * math.log(4) + 1), 131072),
        ({"type": "yarn", "factor": 4.0}, yarn(64, attention_factor=0.1 * math.log(4) + 1), 256),
        (
            {"type": "yarn", "factor": 1.25, "original_max_position_embeddings": 40},
            RopeScaling(
                "yarn",
                1.25,
                original_max_position_embeddings=40,
                attention_factor=0.1 * math.log(1.25) + 1,
            ),
            64,
        ),
        (
            YARN | {"beta_fast": 20, "beta_slow": 2.5, "truncate": False, "attention_factor": 1.5},
            yarn(beta_fast=20, beta_slow=2.5, truncate=False, attention_factor=1.5),
            131072,
        ),
        (
            YARN | {"beta_fast": None, "attention_factor": None, "mscale": 2.0},
            yarn(attention_factor=0.1 * math.log(4) + 1),
            131072,
        ),
        (
            YARN | {"mscale": 0.707, "mscale_all_dim": 2},
            yarn(
                attention_factor=(0.0707 * math.log(4) + 1) / (0.2 * math.log(4) + 1),
            ),
            131072,
        ),
    ],
)
def test_reads_yarn_and_the_length_that_it_stretches_to(
    tmp_path: Path, rope: dict[str, Any], scaling: RopeScaling, longest: int
) -> None:
    write(tmp_path, "llama", rope_parameters=rope | {"rope_theta": 5000.0})
    read = read_architecture(tmp_path)
    assert read.rope_scaling is not None
    factor = read.rope_scaling.attention_factor
    assert factor == pytest.approx(scaling.attention_factor, rel=1e-12)
    scaling = replace(scaling, attention_factor=factor)
    assert read == expected("llama", rope_scaling=scaling, max_position_embeddings=longest)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "dynamic", "factor": 7.3},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 7.3},
    LLAMA3_ROPE,
    LLAMA3_ROPE | {"factor": 32.0},
    LLAMA3_ROPE | {"factor": 5, "low_freq_factor": 1.5, "high_freq_factor": 6},
    LLAMA3_ROPE | {"original_max_position_embeddings": 4096},
    LLAMA3_ROPE | {"original_max_position_embeddings": 40},
    YARN,
    YARN | {"factor": 7.3, "truncate": False},
    YARN | {"factor": 1},
    {"rope_type": "yarn", "factor": 4.0},
    YARN | {"original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 0.5},
    YARN | {"original_max_position_embeddings": 2},  # the passage begins and ends at channel 0
    YARN | {"attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000])
def test_frequencies_are_those_of_transformers_to_the_last_bit(
    tmp_path: Path, rope: dict[str, Any], head_dim: int, base: float
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = write_rope(tmp_path, rope | {"rope_theta": base}, head_dim)
    theirs = LlamaRotaryEmbedding(hf_classes("llama")[0](**config))
    architecture = read_architecture(tmp_path)
    ours = rotary_frequencies(architecture)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs.inv_freq)
    # It multiplies queries and keys there, here their products.
    assert architecture.softmax_scale_factor == theirs.attention_scaling**2


def test_frequencies_at_the_longest_sequence(tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for rope in ROPES:
        config = write_rope(tmp_path, rope | {"rope_theta": 500000.0}, 64)
        architecture = read_architecture(tmp_path)
        theirs = LlamaRotaryEmbedding(hf_classes("llama")[0](**config))
        last = torch.tensor([[architecture.max_position_embeddings - 1]])
        cos, _ = theirs(torch.zeros(1), last)  # where the sequence's length may change the table
        angles = last.squeeze() * rotary_frequencies(architecture)
        factor = architecture.softmax_scale_factor**0.5
        torch.testing.assert_close(cos[0, 0, :32], angles.cos() * factor, rtol=0, atol=1e-6)


def write_rope(directory: Path, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    config = PUBLISHED["Llama-3.1-8B"][0] | {"head_dim": head_dim}
    del config["rope_scaling"], config["rope_theta"]
    config["rope_parameters"] = rope
    (directory / "config.json").write_text(json.dumps(config))
    return json.loads((directory / "config.json").read_text())


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        *(
            ("llama", {key: {name: kind, "factor": 2.0}}, f"{key}.rope_type: '{kind}' is not impl")
            for key in ("rope_parameters", "rope_scaling")
            for name in ("type", "rope_type")
            for kind in ("longrope", "proportional", "mrope", "novel")
        ),
        ("llama", {"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor: 2.0 is not known"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing; .*least 1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor: 0.5; .*least 1"),
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
            "rope_parameters.low_freq_factor: 4.0; must be below high_freq_factor 4.0",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": None}},
            "rope_parameters.high_freq_factor: missing",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings: 0.5; .*whole number",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE | {"attention_factor": 1.2}},
            "rope_parameters.attention_factor: 1.2 is not known for rope_type 'llama3'",
        ),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing; .*least 1"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor: missing; .*least 1"),
        ("llama", {"rope_parameters": YARN | {"truncate": None}}, "truncate: None; .*true or"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 0}}, "_factor: 0; .*above 0"),
        ("llama", {"rope_parameters": YARN | {"mscale": -1}}, "mscale: -1; .*at least 0"),
        (
            "llama",
            {"rope_parameters": YARN | {"beta_slow": 32}},
            "rope_parameters.beta_slow: 32; must be below beta_fast 32",
        ),
        (
            "llama",
            {"rope_parameters": YARN | {"low_freq_factor": 1.0}},
            "rope_parameters.low_freq_factor: 1.0 is not known for rope_type 'yarn'",
        ),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1}}, "rope_theta: 1; .*above 1"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},  # beside plain rope_parameters
            "rope_scaling: differs from rope_parameters",
        ),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
            "rope_parameters.full_attention: .*is not known",
        ),
        ("llama", {"rope_theta": 10000.0}, "rope_theta: .*10000.0.*5000.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor: 0.5 .*must be 1.0",
        ),
        ("llama", {"attention_bias": True}, "attention_bias: True beside mlp_bias: False .*both"),
        ("llama", {"mlp_bias": True}, "attention_bias: False beside mlp_bias: True .*both"),
        ("llama", {"mlp_bias": 1, "attention_bias": 1}, "mlp_bias: 1; must be true or false"),
        ("mistral", {"mlp_bias": True}, "mlp_bias: True is not known"),
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
        ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta: inf; .*above 0"),
        ("qwen2", {"use_mrope": True}, "use_mrope: True .*must be False"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True .*must be False"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0; .*at least 1"),
        ("mistral", {"use_sliding_window": True}, "use_sliding_window: True is not known"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types: has 'sliding_attention', but no sliding_window is in use",
        ),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 4, "sliding_window": 8},
            "layer_types: has 'full_attention', but in this family the sliding_window 8 holds in",
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types: .*num_hidden_layers 4"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types: .*chunked_attention"),
        ("qwen2", SLIDING | {"max_window_layers": None}, "max_window_layers: None; .*whole number"),
        ("llama", {"num_local_experts": 8}, "num_local_experts: 8 is not known"),
        ("mixtral", {"num_local_experts": "DROP"}, "num_local_experts: missing"),
        ("qwen3_moe", {"num_experts_per_tok": "DROP"}, "num_experts_per_tok: missing"),
        ("qwen3_moe", {"moe_intermediate_size": "DROP"}, "moe_intermediate_size: missing"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5; .*number of experts 4"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5; .*number of experts 4"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok: 1 .*must be at least 2"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 .*must be 0.0"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob: False .*must be True"),
        ("mixtral", {"shared_expert_intermediate_size": 8}, "shared_expert_.*: 8 is not known"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes'; must be true or false"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 .*must be 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\] .*must be \[\]"),
    ],
)
def test_refuses_what_it_would_compute_wrongly(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, family, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_biases_of_llama_are_read(tmp_path: Path) -> None:
    write(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    assert read_architecture(tmp_path) == expected("llama", add_bias_linear=True)


def test_lists_all_problems_at_once(tmp_path: Path) -> None:
    write(tmp_path, "llama", mlp_bias=True, vocab_size=-1, novelty=1)
    with pytest.raises(CheckpointError) as error:
        read_architecture(tmp_path)
    for key in ("mlp_bias: True", "vocab_size: -1", "novelty: 1"):
        assert key in str(error.value)


@pytest.mark.parametrize("named", [["GemmaForCausalLM"], [], [{}], None, "LlamaForCausalLM"])
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
    losses = {"router_aux_loss_coef": 0.02, "output_router_logits": True}
    for family in MOE:
        write(tmp_path, family, **losses)
        assert read_architecture(tmp_path) == expected(family)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "config.json: cannot be read"), ("{", "not valid JSON"), ("[]", "a JSON object")],
)
def test_unreadable_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_architecture(tmp_path)
