"""Tiny random Hugging Face models of every family, and where each number belongs in Megatron.

`reference_shard` is written out in loops over groups, heads and channels, and shares nothing with
`megatron_drpo.checkpoint`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HIDDEN, FFN, HEADS, GROUPS, CHANNELS, VOCAB, LAYERS = 32, 40, 8, 4, 8, 61, 4
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
MOE = ("mixtral", "qwen3_moe")
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
# What the family has besides Llama's sizes. A Qwen3-MoE has no MLP of `intermediate_size` anywhere.
_SIZES = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN},
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": FFN,
        "intermediate_size": 3 * FFN,
        "norm_topk_prob": True,
    },
}


def hf_classes(family: str) -> tuple[Any, Any]:
    """The family's configuration and model class."""
    import transformers  # here, since spawned processes use `reference_shard` only

    name = _CLASSES[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def tiny_model(
    family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A model whose every weight is random, norms included, with logits of about unit size.

    Args:
        changes: of the configuration.
    """
    make_config, make_model = hf_classes(family)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": CHANNELS,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    config = make_config(
        **sizes | _SIZES.get(family, {}) | changes,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )
    # The default for experts multiplies in groups, which CPUs do not do in float64.
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(7)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            # Routing must not hang on the last digits, and must not ignore the second expert.
            scale = 0.4 if name.endswith("mlp.gate.weight") else 0.2
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def save_tiny(
    directory: Path,
    family: str,
    *,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, Tensor]:
    """Save `tiny_model` as transformers does; returns the stored tensors by name.

    They are not the model's state_dict: a mixture of experts is fused in memory and apart on disk,
    and a tied weight is stored once.
    """
    tiny_model(family, tie=tie, dtype=dtype, **changes).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    return {name: value.clone() for name, value in stored.items()}


def reference_shard(hf: dict[str, Tensor], name: str, rank: int, size: int, rows: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` must hold under Megatron's (local spec) `name`.

    Args:
        hf: every tensor of the model, as `save_tiny` returns them.
        name: numbers of layer and expert are those in the whole model.
        rows: rows of the parameter, which only the padded vocabulary needs.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        source = hf["lm_head.weight" if name.startswith("output") else "model.embed_tokens.weight"]
        zero = torch.zeros_like(source[0])
        numbers = range(rank * rows, (rank + 1) * rows)
        return torch.stack([source[n] if n < VOCAB else zero for n in numbers])
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    layer, kind = name.removeprefix("decoder.layers.").split(".", 1)
    source = {
        _like_qwen3_moe(key.removeprefix(f"model.layers.{layer}.")): value
        for key, value in hf.items()
        if key.startswith(f"model.layers.{layer}.")
    }
    mlp = "mlp."
    if expert := re.match(r"mlp\.experts\.local_experts\.(\d+)\.", kind):
        mlp = f"mlp.experts.{expert[1]}."
        kind = "mlp." + kind.removeprefix(expert[0])
    match kind:
        case "input_layernorm.weight":
            return source["input_layernorm.weight"]
        case "pre_mlp_layernorm.weight":
            return source["post_attention_layernorm.weight"]
        case "self_attention.q_layernorm.weight":
            return source["self_attn.q_norm.weight"]
        case "self_attention.k_layernorm.weight":
            return source["self_attn.k_norm.weight"]
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            q, k, v = (source[f"self_attn.{x}_proj.{kind.rpartition('.')[2]}"] for x in "qkv")
            out = []
            for group in range(GROUPS):
                for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                    for channel in range(CHANNELS):
                        out.append(q[head * CHANNELS + channel])
                for kv in (k, v):
                    for channel in range(CHANNELS):
                        out.append(kv[group * CHANNELS + channel])
            share = len(out) // size
            return torch.stack(out[rank * share : (rank + 1) * share])
        case "self_attention.linear_proj.weight":
            share = HEADS * CHANNELS // size
            return source["self_attn.o_proj.weight"][:, rank * share : (rank + 1) * share]
        case "mlp.router.weight":
            return source["mlp.gate.weight"]
        case "self_attention.linear_proj.bias":
            return source["self_attn.o_proj.bias"]
        case "mlp.linear_fc1.weight" | "mlp.linear_fc1.bias":
            out = []
            for half in ("gate", "up"):
                for row in range(rank * FFN // size, (rank + 1) * FFN // size):
                    out.append(source[f"{mlp}{half}_proj.{kind.rpartition('.')[2]}"][row])
            return torch.stack(out)
        case "mlp.linear_fc2.bias":
            return source["mlp.down_proj.bias"]
        case "mlp.linear_fc2.weight":
            share = FFN // size
            return source[f"{mlp}down_proj.weight"][:, rank * share : (rank + 1) * share]
    raise AssertionError(f"no reference for {name}")


def _like_qwen3_moe(name: str) -> str:
    """Mixtral calls its experts' matrices by the letters of a paper."""
    name = name.replace("block_sparse_moe.", "mlp.").replace(".w1.", ".gate_proj.")
    return name.replace(".w3.", ".up_proj.").replace(".w2.", ".down_proj.")
