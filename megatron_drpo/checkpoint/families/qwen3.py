"""Qwen3, dense: Llama's decoder with a norm over the channels of each query and key head."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.llama import HF, KEY, MEGATRON
from megatron_drpo.checkpoint.families.qwen2 import SLIDING_WINDOW
from megatron_drpo.checkpoint.families.table import Copy, Entry, Family

QK_NORM = tuple(
    Entry(
        (MEGATRON + f"self_attention.{head}_layernorm.weight",),
        (HF + f"self_attn.{head}_norm.weight",),
        Copy(("kv_channels",)),
        KEY + f"self_attention.{head}_layernorm.weight",
    )
    for head in "qk"
)

QWEN3 = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    first=llama.FIRST,
    layer=llama.ATTENTION + QK_NORM + llama.MLP,
    last=llama.LAST,
    qk_layernorm=True,
    defaults={"head_dim": 128, "num_key_value_heads": 32} | SLIDING_WINDOW,
)
