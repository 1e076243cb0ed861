"""Qwen2 and Qwen2.5: Llama's decoder with biases in the query, key and value projections."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.llama import HF, KEY, MEGATRON
from megatron_drpo.checkpoint.families.table import Entry, Family, QueryKeyValue

_QKV_BIAS = Entry(
    (MEGATRON + "self_attention.linear_qkv.bias",),
    tuple(HF + f"self_attn.{name}_proj.bias" for name in "qkv"),
    QueryKeyValue(bias=True),
    KEY + "self_attention.linear_qkv.bias",
)

# Where it is in use, it slides in the layers from `max_window_layers` on.
SLIDING_WINDOW: dict[str, object] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2 = Family(
    name="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    first=llama.FIRST,
    layer=(*llama.ATTENTION, _QKV_BIAS, *llama.MLP),
    last=llama.LAST,
    add_qkv_bias=True,
    defaults={"num_key_value_heads": 32} | SLIDING_WINDOW,
    only={"use_mrope": False},
)
