"""Qwen3, dense: Llama's decoder with a norm over the channels of each query and key head."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.table import Copy, Entry, Family

_QK_NORM = tuple(
    Entry(
        ("decoder.layers.{layer}.self_attention." + f"{head}_layernorm.weight",),
        ("model.layers.{layer}.self_attn." + f"{head}_norm.weight",),
        Copy(("kv_channels",)),
        "decoder.layers.self_attention." + f"{head}_layernorm.weight",
    )
    for head in "qk"
)

QWEN3 = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    first=llama.FIRST,
    layer=llama.LAYER + _QK_NORM,
    last=llama.LAST,
    qk_layernorm=True,
    defaults={"head_dim": 128, "num_key_value_heads": 32},
    only={"use_sliding_window": False},
    # Both describe a sliding window, which `use_sliding_window` switches off.
    harmless=frozenset({"sliding_window", "max_window_layers"}),
)
