"""Mistral: Llama's weights under another name; some versions attend within a sliding window."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.table import Family

MISTRAL = Family(
    name="mistral",
    hf_architecture="MistralForCausalLM",
    first=llama.FIRST,
    layer=llama.ATTENTION + llama.MLP,
    last=llama.LAST,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
