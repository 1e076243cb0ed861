"""Qwen2 and Qwen2.5: Llama's decoder with biases in the query, key and value projections."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.table import Family

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
    layer=(*llama.ATTENTION, llama.QKV_BIAS, *llama.MLP),
    last=llama.LAST,
    add_qkv_bias=True,
    defaults={"num_key_value_heads": 32} | SLIDING_WINDOW,
    only={"use_mrope": False},
)
