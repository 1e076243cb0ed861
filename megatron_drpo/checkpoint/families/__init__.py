"""Model families: from config.json to an `Architecture`, and the tables that convert weights.

In: the config.json of a Hugging Face checkpoint. Out: an `Architecture`, from which `mcore` builds
the model, and a `Family`, with which `checkpoint.hf` reads and writes weights. A family is one
declared table (`llama.py`, `qwen3.py`) in the words of `table.py`. A key of config.json is
implemented, known to change nothing, or an error: nothing that alters the model is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_drpo.checkpoint.families.llama import LLAMA
from megatron_drpo.checkpoint.families.qwen3 import QWEN3
from megatron_drpo.checkpoint.families.table import (
    Architecture,
    Entry,
    Family,
    RopeScaling,
    padded_vocab_size,
)
from megatron_drpo.errors import CheckpointError

__all__ = [
    "FAMILIES",
    "Architecture",
    "Entry",
    "Family",
    "RopeScaling",
    "family_of",
    "padded_vocab_size",
    "read_architecture",
]

FAMILIES = (LLAMA, QWEN3)

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_HANDLED = {
    *_SIZES.values(),
    *("architectures", "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("rope_theta", "rope_parameters", "rope_scaling", "layer_types"),
    *("tie_word_embeddings", "dtype", "torch_dtype"),
}
_ONLY: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
}
_HARMLESS = {
    *("transformers_version", "_name_or_path", "_attn_implementation_autoset"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "initializer_range", "return_dict", "output_hidden_states"),
    *("output_attentions", "torchscript", "id2label", "label2id", "problem_type"),
    *("transformers.js_config", "unsloth_version", "unsloth_fixed"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture names."""
    return next(family for family in FAMILIES if family.name == architecture.family)


def read_architecture(directory: str | Path) -> Architecture:
    """Read DIRECTORY/config.json, as written by transformers 4 or 5.

    Raises:
        CheckpointError: the file is missing or malformed, the architecture is not supported, or a
            key has a value that is not implemented or a name that is not known; lists all of them.
    """
    path = Path(directory) / "config.json"
    config = _read_object(path)
    family = _family(path, config)
    config = {**family.defaults, **config}
    problems = _unsupported(config, family)

    def take(key: str, holds: Callable[[Any], bool], need: str, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if not holds(value):
            found = repr(value) if key in config else "missing"
            problems.append(f"{key}: {found}; must be {need}")
        return value

    def size(key: str, default: int | None = None) -> int:
        return take(key, _is_size, "a whole number of at least 1", default)

    sizes = {name: size(key) for name, key in _SIZES.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    # Where a size is broken, what is derived from it is not judged.
    whole = _is_size(heads) and _is_size(hidden)
    groups = size("num_key_value_heads", heads if whole else 1)
    channels = size("head_dim", hidden // heads if whole else 2)
    if whole and config.get("head_dim") is None and hidden % heads:
        problems.append(f"hidden_size: {hidden}; must be a multiple of num_attention_heads {heads}")
    if whole and _is_size(groups) and heads % groups:
        problems.append(f"num_key_value_heads: {groups}; must divide num_attention_heads {heads}")
    if _is_size(channels) and channels % 2:
        problems.append(f"head_dim: {channels}; must be even for rotary embeddings")
    architecture = Architecture(
        family=family.name,
        **sizes,
        num_query_groups=groups,
        kv_channels=channels,
        norm_epsilon=take("rms_norm_eps", _is_positive, "a number above 0"),
        rotary_base=_rotary_base(config, problems),
        tie_word_embeddings=take(
            "tie_word_embeddings", lambda value: isinstance(value, bool), "true or false", False
        ),
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=False,
        hf_dtype=take(
            "torch_dtype" if config.get("dtype") is None else "dtype",
            lambda value: value in _DTYPES,
            f"one of {', '.join(_DTYPES)}",
            "float32",
        ),
    )
    if problems:
        raise CheckpointError(
            f"{path}: this {family.hf_architecture} cannot be computed as it is meant; choose "
            "another checkpoint, or mend these keys:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return architecture


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the directory of a Hugging Face "
            "checkpoint (config.json, safetensors, tokenizer)"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(config).__name__}")
    return config


def _family(path: Path, config: dict[str, Any]) -> Family:
    named = config.get("architectures")
    supported = {family.hf_architecture: family for family in FAMILIES}
    if not isinstance(named, list) or len(named) != 1 or named[0] not in supported:
        raise CheckpointError(
            f"{path}: architectures: {named!r} is not supported; must be one of "
            + ", ".join(f'["{name}"]' for name in supported)
        )
    return supported[named[0]]


def _unsupported(config: dict[str, Any], family: Family) -> list[str]:
    """Problems with the keys that must have one value, or that nobody here knows."""
    only = _ONLY | {"model_type": family.name} | dict(family.only)
    problems = [
        f"{key}: {config[key]!r} is not implemented; must be {value!r}"
        for key, value in only.items()
        if config.get(key) is not None and config[key] != value
    ]
    layers = config.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        problems.append(f"layer_types: {layers!r} is not implemented; must be 'full_attention'")
    known = _HANDLED | _HARMLESS | only.keys() | family.harmless
    problems += [
        f"{key}: {value!r} is not known, and may change what the model computes"
        for key, value in config.items()
        if value is not None and key not in known  # null is a feature that is off
    ]
    return problems


def _rotary_base(config: dict[str, Any], problems: list[str]) -> float:
    """theta: a key of its own (transformers 4) or in `rope_parameters` (transformers 5)."""
    bases = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        rope = dict(value) if isinstance(value, dict) else {"rope_type": value}
        bases[f"{key}.rope_theta"] = rope.pop("rope_theta", None)
        legacy = rope.pop("type", "default")
        plain = rope.pop("rope_type", legacy) == "default"
        whole = rope.pop("partial_rotary_factor", 1.0) == 1.0
        if not plain or not whole or rope:  # what is left are parameters of a scaling
            problems.append(f"{key}: {value!r} is not implemented; must be of rope_type 'default'")
    given = {key: value for key, value in bases.items() if value is not None}
    problems += [
        f"{key}: {value!r}; must be a number above 0"
        for key, value in given.items()
        if not _is_positive(value)
    ]
    base = next(iter(given.values()), 10000.0)
    if any(value != base for value in given.values()):
        problems.append(f"rope_theta: is given twice, and differs: {given}")
    return base
