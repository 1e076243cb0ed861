"""Mixtral: Mistral with a mixture of experts, top-k routed, in place of each MLP."""

from __future__ import annotations

from megatron_drpo.checkpoint.families import llama
from megatron_drpo.checkpoint.families.llama import HF, KEY, MEGATRON
from megatron_drpo.checkpoint.families.table import Copy, Entry, Family, GatedMLP

# They add a term to a training loss that is not ours.
LOAD_BALANCING = frozenset({"router_aux_loss_coef", "output_router_logits"})


def mixture_of_experts(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """The entries that replace `llama.MLP`.

    Args:
        block: what Hugging Face calls the layer's router and experts together.
        gate, up, down: what it calls each expert's matrices.
    """
    expert = HF + block + ".experts.{expert}."
    # Neither layer spec fuses this norm, since the router reads its output, too.
    norm = Entry(
        (MEGATRON + "pre_mlp_layernorm.weight",),
        (HF + "post_attention_layernorm.weight",),
        llama.NORM,
        KEY + "pre_mlp_layernorm.weight",
    )
    router = Entry(
        (MEGATRON + "mlp.router.weight",),
        (HF + block + ".gate.weight",),
        Copy(("num_experts", "hidden_size")),
        KEY + "mlp.router.weight",
    )
    gate_and_up = Entry(
        _names("linear_fc1"),
        (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        GatedMLP(),
        KEY + "mlp.experts.experts.linear_fc1.weight",
    )
    back_down = Entry(
        _names("linear_fc2"),
        (f"{expert}{down}.weight",),
        Copy(("hidden_size", "ffn_hidden_size"), split=1),
        KEY + "mlp.experts.experts.linear_fc2.weight",
    )
    return norm, router, gate_and_up, back_down


def _names(linear: str) -> tuple[str, str]:
    """Of a module per expert, and of Transformer Engine's one module for all of them."""
    experts = MEGATRON + "mlp.experts."
    return (
        experts + "local_experts.{expert}." + linear + ".weight",
        experts + linear + ".weight{expert}",
    )


MIXTRAL = Family(
    name="mixtral",
    hf_architecture="MixtralForCausalLM",
    first=llama.FIRST,
    layer=llama.ATTENTION + mixture_of_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    last=llama.LAST,
    norm_epsilon=1e-5,
    rotary_base=1e6,
    normalize_router_weights=True,
    sizes={"num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok"},
    defaults={"num_key_value_heads": 8, "sliding_window": None},
    # Never False, whatever the file says; noise on the router's input would be part of training.
    only={"norm_topk_prob": True, "router_jitter_noise": 0.0},
    harmless=LOAD_BALANCING,
)
