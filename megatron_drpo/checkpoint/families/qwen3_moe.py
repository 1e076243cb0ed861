"""Qwen3-MoE: Qwen3's attention with a mixture of experts in place of each MLP."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama, qwen3
from megatron_drpo.checkpoint.families.mixtral import LOAD_BALANCING, mixture_of_experts
from megatron_drpo.checkpoint.families.table import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_architecture="Qwen3MoeForCausalLM",
    first=llama.FIRST,
    layer=llama.ATTENTION
    + qwen3.QK_NORM
    + mixture_of_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    last=llama.LAST,
    qk_layernorm=True,
    sizes={
        "ffn_hidden_size": "moe_intermediate_size",
        "num_experts": "num_experts",
        "num_experts_per_token": "num_experts_per_tok",
    },
    defaults={
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "norm_topk_prob": False,
    },
    # With these, every layer is a mixture of experts,
    only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    # none is an MLP of `intermediate_size`, and a window would slide in every layer.
    harmless=LOAD_BALANCING | {"intermediate_size", "max_window_layers"},
)
