"""Tiny random Hugging Face models, and where each of their numbers belongs in Megatron.

`reference_shard` is written out in loops over groups, heads and channels, and shares nothing with
`megatron_drpo.checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN, FFN, HEADS, GROUPS, CHANNELS, VOCAB, LAYERS = 32, 40, 8, 4, 8, 61, 4


def hf_classes(family: str) -> tuple[Any, Any]:
    """The family's configuration and model class."""
    import transformers  # here, since spawned processes use `reference_shard` only

    name = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def tiny_model(family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every weight is random, norms included, with logits of about unit size."""
    make_config, make_model = hf_classes(family)
    config = make_config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=CHANNELS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(7)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def save_tiny(
    directory: Path, family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Save `tiny_model` as transformers does; returns its weights by name."""
    model = tiny_model(family, tie=tie, dtype=dtype)
    model.save_pretrained(directory)
    return {name: value.clone() for name, value in model.state_dict().items()}


def reference_shard(hf: dict[str, Tensor], name: str, rank: int, size: int, rows: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` must hold under Megatron's (local spec) `name`.

    Args:
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
        key.removeprefix(f"model.layers.{layer}."): value
        for key, value in hf.items()
        if key.startswith(f"model.layers.{layer}.")
    }
    match kind:
        case "input_layernorm.weight":
            return source["input_layernorm.weight"]
        case "pre_mlp_layernorm.weight":
            return source["post_attention_layernorm.weight"]
        case "self_attention.q_layernorm.weight":
            return source["self_attn.q_norm.weight"]
        case "self_attention.k_layernorm.weight":
            return source["self_attn.k_norm.weight"]
        case "self_attention.linear_qkv.weight":
            out = []
            for group in range(GROUPS):
                for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                    for channel in range(CHANNELS):
                        out.append(source["self_attn.q_proj.weight"][head * CHANNELS + channel])
                for kv in ("k", "v"):
                    for channel in range(CHANNELS):
                        out.append(
                            source[f"self_attn.{kv}_proj.weight"][group * CHANNELS + channel]
                        )
            share = len(out) // size
            return torch.stack(out[rank * share : (rank + 1) * share])
        case "self_attention.linear_proj.weight":
            share = HEADS * CHANNELS // size
            return source["self_attn.o_proj.weight"][:, rank * share : (rank + 1) * share]
        case "mlp.linear_fc1.weight":
            out = []
            for half in ("gate", "up"):
                for row in range(rank * FFN // size, (rank + 1) * FFN // size):
                    out.append(source[f"mlp.{half}_proj.weight"][row])
            return torch.stack(out)
        case "mlp.linear_fc2.weight":
            share = FFN // size
            return source["mlp.down_proj.weight"][:, rank * share : (rank + 1) * share]
    raise AssertionError(f"no reference for {name}")
