"""Llama: the common decoder of RMS norm, rotary attention in query groups and a gated SiLU MLP.

Covers Llama 1, 2, 3 and 3.x, and every other LlamaForCausalLM whose projections all have biases or
all have none. Other families reuse `FIRST`, `ATTENTION`, `MLP` and `LAST`.
"""

from __future__ import annotations

from megatron_drpo.checkpoint.families.table import (
    Copy,
    Entry,
    Family,
    GatedMLP,
    QueryKeyValue,
    Vocab,
)

MEGATRON, HF, KEY = "decoder.layers.{layer}.", "model.layers.{layer}.", "decoder.layers."
NORM = Copy(("hidden_size",))

FIRST = (
    Entry(
        ("embedding.word_embeddings.weight",),
        ("model.embed_tokens.weight",),
        Vocab(),
        "embedding.word_embeddings.weight",
    ),
)

# Transformer Engine fuses each norm into the linear layer that follows it, and names it so.
ATTENTION = (
    Entry(
        (
            MEGATRON + "input_layernorm.weight",
            MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        ),
        (HF + "input_layernorm.weight",),
        NORM,
        KEY + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(
        (MEGATRON + "self_attention.linear_qkv.weight",),
        tuple(HF + f"self_attn.{name}_proj.weight" for name in "qkv"),
        QueryKeyValue(),
        KEY + "self_attention.linear_qkv.weight",
    ),
    Entry(
        (MEGATRON + "self_attention.linear_proj.weight",),
        (HF + "self_attn.o_proj.weight",),
        Copy(("hidden_size", "query_size"), split=1),
        KEY + "self_attention.linear_proj.weight",
    ),
)

MLP = (
    Entry(
        (
            MEGATRON + "pre_mlp_layernorm.weight",
            MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        ),
        (HF + "post_attention_layernorm.weight",),
        NORM,
        KEY + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        (MEGATRON + "mlp.linear_fc1.weight",),
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
        GatedMLP(),
        KEY + "mlp.linear_fc1.weight",
    ),
    Entry(
        (MEGATRON + "mlp.linear_fc2.weight",),
        (HF + "mlp.down_proj.weight",),
        Copy(("hidden_size", "ffn_hidden_size"), split=1),
        KEY + "mlp.linear_fc2.weight",
    ),
)

LAST = (
    Entry(
        ("decoder.final_layernorm.weight",),
        ("model.norm.weight",),
        NORM,
        "decoder.final_layernorm.weight",
    ),
    Entry(("output_layer.weight",), ("lm_head.weight",), Vocab(), "output_layer.weight"),
)

QKV_BIAS = Entry(
    (MEGATRON + "self_attention.linear_qkv.bias",),
    tuple(HF + f"self_attn.{name}_proj.bias" for name in "qkv"),
    QueryKeyValue(bias=True),
    KEY + "self_attention.linear_qkv.bias",
)

BIASES = (
    QKV_BIAS,
    Entry(
        (MEGATRON + "self_attention.linear_proj.bias",),
        (HF + "self_attn.o_proj.bias",),
        Copy(("hidden_size",)),
        KEY + "self_attention.linear_proj.bias",
    ),
    Entry(
        (MEGATRON + "mlp.linear_fc1.bias",),
        (HF + "mlp.gate_proj.bias", HF + "mlp.up_proj.bias"),
        GatedMLP(bias=True),
        KEY + "mlp.linear_fc1.bias",
    ),
    Entry(
        (MEGATRON + "mlp.linear_fc2.bias",),
        (HF + "mlp.down_proj.bias",),
        Copy(("hidden_size",)),
        KEY + "mlp.linear_fc2.bias",
    ),
)

LLAMA = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    first=FIRST,
    layer=ATTENTION + MLP,
    last=LAST,
    biases=BIASES,
    defaults={"attention_bias": False, "mlp_bias": False},
    only={"rope_interleaved": False},
    # pretraining_tp slices the same products; is_llama_config is a mark left by a converter.
    harmless=frozenset({"pretraining_tp", "is_llama_config"}),
)
