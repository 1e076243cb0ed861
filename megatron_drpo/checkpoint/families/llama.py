"""Llama: the common decoder of RMS norm, rotary attention in query groups and a gated SiLU MLP.

Covers every LlamaForCausalLM with plain rotary embeddings and without biases. Other families
reuse `FIRST`, `LAYER` and `LAST`.
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

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_KEY = "decoder.layers."
_NORM = Copy(("hidden_size",))

FIRST = (
    Entry(
        ("embedding.word_embeddings.weight",),
        ("model.embed_tokens.weight",),
        Vocab(),
        "embedding.word_embeddings.weight",
    ),
)

# Transformer Engine fuses each norm into the linear layer that follows it, and names it so.
LAYER = (
    Entry(
        (
            _MEGATRON + "input_layernorm.weight",
            _MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
        ),
        (_HF + "input_layernorm.weight",),
        _NORM,
        _KEY + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(
        (_MEGATRON + "self_attention.linear_qkv.weight",),
        tuple(_HF + f"self_attn.{name}_proj.weight" for name in "qkv"),
        QueryKeyValue(),
        _KEY + "self_attention.linear_qkv.weight",
    ),
    Entry(
        (_MEGATRON + "self_attention.linear_proj.weight",),
        (_HF + "self_attn.o_proj.weight",),
        Copy(("hidden_size", "query_size"), split=1),
        _KEY + "self_attention.linear_proj.weight",
    ),
    Entry(
        (
            _MEGATRON + "pre_mlp_layernorm.weight",
            _MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        ),
        (_HF + "post_attention_layernorm.weight",),
        _NORM,
        _KEY + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        (_MEGATRON + "mlp.linear_fc1.weight",),
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        GatedMLP(),
        _KEY + "mlp.linear_fc1.weight",
    ),
    Entry(
        (_MEGATRON + "mlp.linear_fc2.weight",),
        (_HF + "mlp.down_proj.weight",),
        Copy(("hidden_size", "ffn_hidden_size"), split=1),
        _KEY + "mlp.linear_fc2.weight",
    ),
)

LAST = (
    Entry(
        ("decoder.final_layernorm.weight",),
        ("model.norm.weight",),
        _NORM,
        "decoder.final_layernorm.weight",
    ),
    Entry(("output_layer.weight",), ("lm_head.weight",), Vocab(), "output_layer.weight"),
)

LLAMA = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    first=FIRST,
    layer=LAYER,
    last=LAST,
    only={"mlp_bias": False, "rope_interleaved": False},
    # pretraining_tp slices the same products; is_llama_config is a mark left by a converter.
    harmless=frozenset({"pretraining_tp", "is_llama_config"}),
)
