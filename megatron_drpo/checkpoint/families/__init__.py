"""Model families: from config.json to an `Architecture`, and the tables that convert weights.

In: the config.json of a Hugging Face checkpoint. Out: an `Architecture`, from which `mcore` builds
the model, and a `Family`, with which weights are converted. A family is one declared table
(`llama.py`, `mixtral.py`, ...) in the words of `table.py`; `rope.py` has the frequencies of rotary
embeddings. A key of config.json is implemented, known to change nothing, or an error: nothing that
alters the model is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_drpo.checkpoint.families.llama import LLAMA
from megatron_drpo.checkpoint.families.mistral import MISTRAL
from megatron_drpo.checkpoint.families.mixtral import MIXTRAL
from megatron_drpo.checkpoint.families.qwen2 import QWEN2
from megatron_drpo.checkpoint.families.qwen3 import QWEN3
from megatron_drpo.checkpoint.families.qwen3_moe import QWEN3_MOE
from megatron_drpo.checkpoint.families.rope import rotary_frequencies, yarn_attention_factor
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
    "differences",
    "family_of",
    "padded_vocab_size",
    "read_architecture",
    "rotary_frequencies",
]

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)

_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# The other name of a key, as another version or family has it.
_SYNONYMS = {
    "dtype": "torch_dtype",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
}
_HANDLED = {
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
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
    # Defaults of transformers' own generation, which is not used here.
    *("max_length", "do_sample", "temperature", "top_p", "top_k"),
    *("use_cache", "initializer_range", "return_dict", "output_hidden_states"),
    *("output_attentions", "torchscript", "id2label", "label2id", "problem_type"),
    *("transformers.js_config", "unsloth_version", "unsloth_fixed"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_stretch(value: Any) -> bool:
    return _is_positive(value) and value >= 1


_BOOL = (_is_bool, "true or false")
_POSITIVE = (_is_positive, "a number above 0")
_FACTOR = (_is_stretch, "a number of at least 1")
_SIZE = (_is_size, "a whole number of at least 1")
_NOT_NEGATIVE = (lambda value: value == 0 or _is_positive(value), "a number of at least 0")
_Need = tuple[Callable[[Any], bool], str]
# Parameters of each rope_type: what holds for them, and how that is said.
_ROPE_PARAMETERS: dict[Any, dict[str, _Need]] = {
    "default": {},
    # It begins to stretch beyond max_position_embeddings, where no sequence gets.
    "dynamic": {"factor": _FACTOR},
    "linear": {"factor": _FACTOR},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": _POSITIVE,
        "high_freq_factor": _POSITIVE,
        "original_max_position_embeddings": _SIZE,
    },
    "yarn": {
        "factor": _FACTOR,
        "original_max_position_embeddings": _SIZE,
        "beta_fast": _POSITIVE,
        "beta_slow": _POSITIVE,
        "truncate": _BOOL,
        "attention_factor": _POSITIVE,
        "mscale": _NOT_NEGATIVE,
        "mscale_all_dim": _NOT_NEGATIVE,
    },
}
# What transformers takes where one is missing, besides the model's own length for the original one
# and an attention factor that follows from the others.
_ROPE_DEFAULTS: dict[Any, dict[str, Any]] = {
    "yarn": {
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
        "mscale": 0,
        "mscale_all_dim": 0,
    }
}
# The two that enclose the passage from frequencies that are divided to those that are not.
_ROPE_PASSAGE: dict[Any, tuple[str, str]] = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture names, with all parameters of that architecture's layers."""
    family = next(family for family in FAMILIES if family.name == architecture.family)
    if architecture.add_bias_linear:
        return replace(family, layer=family.layer + family.biases)
    return family


def differences(one: Architecture, other: Architecture) -> list[str]:
    """What two architectures compute differently, the dtype in which they are stored apart.

    Example: ["rotary_base 10000.0 against 5000.0"]
    """
    return [
        f"{field.name} {getattr(one, field.name)} against {getattr(other, field.name)}"
        for field in fields(Architecture)
        if field.name != "hf_dtype" and getattr(one, field.name) != getattr(other, field.name)
    ]


def read_architecture(directory: str | Path) -> Architecture:
    """Read DIRECTORY/config.json, as written by transformers 4 or 5.

    Sizes of the model must be there; any other missing key means what transformers takes for it.

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
        return take(key, *_SIZE, default)

    def spelled(key: str) -> str:
        other = _SYNONYMS.get(key, key)
        mine, theirs = config.get(key), config.get(other)
        if mine is not None and theirs is not None and mine != theirs:
            problems.append(f"{key}: {mine!r}, but {other}: {theirs!r}; remove one of them")
        return other if mine is None and theirs is not None else key

    sizes = {name: size(spelled(key)) for name, key in {**_SIZES, **family.sizes}.items()}
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
    experts, chosen = sizes.get("num_experts", 1), sizes.get("num_experts_per_token", 1)
    if _is_size(experts) and _is_size(chosen) and chosen > experts:
        key = family.sizes["num_experts_per_token"]
        problems.append(f"{key}: {chosen}; must be at most the number of experts {experts}")
    rotary_base, rope_scaling = _rotary(config, family, problems)
    longest = sizes["max_position_embeddings"]
    if rope_scaling is not None and rope_scaling.kind == "yarn" and _is_size(longest):
        # Who follows Qwen's advice leaves the model's own key at the length before stretching.
        stretched = rope_scaling.factor * rope_scaling.original_max_position_embeddings
        longest = sizes["max_position_embeddings"] = max(longest, int(stretched))
    window, sliding_layers = _sliding(config, family, problems)
    if window is None or not sliding_layers or (_is_size(longest) and window >= longest):
        window, sliding_layers = None, ()
    biases = [take(key, *_BOOL, False) for key in ("attention_bias", "mlp_bias") if family.biases]
    if biases and biases[0] != biases[1]:
        problems.append(
            f"attention_bias: {biases[0]!r} beside mlp_bias: {biases[1]!r} is not implemented; "
            "must be both true or both false"
        )
    normalize = take("norm_topk_prob", *_BOOL, family.normalize_router_weights)
    if chosen == 1 and "num_experts" in sizes and normalize is True:
        problems.append(
            f"{family.sizes['num_experts_per_token']}: 1 is not implemented with normalised router "
            "weights, which are then always 1 and never trained; must be at least 2"
        )
    architecture = Architecture(
        family=family.name,
        **sizes,
        num_query_groups=groups,
        kv_channels=channels,
        norm_epsilon=take("rms_norm_eps", *_POSITIVE, family.norm_epsilon),
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        tie_word_embeddings=take("tie_word_embeddings", *_BOOL, False),
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.add_qkv_bias,
        normalize_router_weights=normalize,
        sliding_window=window,
        sliding_layers=sliding_layers,
        add_bias_linear=any(biases),
        hf_dtype=take(
            spelled("dtype"),
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
    if not isinstance(named, list) or len(named) != 1 or named[0] not in tuple(supported):
        raise CheckpointError(
            f"{path}: architectures: {named!r} is not supported; must be one of "
            + ", ".join(f'["{name}"]' for name in supported)
        )
    return supported[named[0]]


def _unsupported(config: dict[str, Any], family: Family) -> list[str]:
    """Problems with the keys that must have one value, or that nobody here knows."""
    only = _ONLY | {"model_type": family.name} | dict(family.only)
    only = {key: value for key, value in only.items() if key not in family.defaults}
    problems = [
        f"{key}: {config[key]!r} is not implemented; must be {value!r}"
        for key, value in only.items()
        if config.get(key) is not None and config[key] != value
    ]
    sizes = {*{**_SIZES, **family.sizes}.values()}
    sizes |= {_SYNONYMS[key] for key in sizes & _SYNONYMS.keys()}
    known = _HANDLED | _HARMLESS | sizes | only.keys() | family.defaults.keys() | family.harmless
    problems += [
        f"{key}: {value!r} is not known, and may change what the model computes"
        for key, value in config.items()
        if value is not None and key not in known  # null is a feature that is off
    ]
    return problems


def _sliding(
    config: dict[str, Any], family: Family, problems: list[str]
) -> tuple[int | None, tuple[int, ...]]:
    """How many tokens a token sees, itself included, in layers that slide, and which ones do."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers")
    if not config.get("use_sliding_window", True):
        window = None
    elif window is not None and not _is_size(window):
        problems.append(f"sliding_window: {window!r}; must be null or a whole number of at least 1")
        return None, ()
    if not isinstance(layers, int):  # a problem of its own
        return None, ()
    # Some families let chosen layers slide, the later ones by default; in the others all do.
    chosen = "max_window_layers" in family.defaults
    first = config["max_window_layers"] if chosen else 0
    kinds = config.get("layer_types")
    if kinds is None:
        if window is not None and not isinstance(first, int):
            problems.append(f"max_window_layers: {first!r}; must be a whole number")
            return None, ()
        return window, () if window is None else tuple(range(max(first, 0), layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        problems.append(
            f"layer_types: {kinds!r} is not implemented; must be 'full_attention' or "
            f"'sliding_attention' for each of num_hidden_layers {layers}"
        )
        return None, ()
    sliding = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
    if sliding and window is None:
        problems.append(
            "layer_types: has 'sliding_attention', but no sliding_window is in use; set "
            "sliding_window (and use_sliding_window), or make all layers 'full_attention'"
        )
    elif window is not None and not chosen and len(sliding) < layers:
        problems.append(
            f"layer_types: has 'full_attention', but in this family the sliding_window {window} "
            "holds in all layers; remove layer_types, or set sliding_window to null"
        )
    return window, sliding


def _rotary(
    config: dict[str, Any], family: Family, problems: list[str]
) -> tuple[float, RopeScaling | None]:
    """theta: a key of its own (transformers 4) or in `rope_parameters` (transformers 5).

    The scaling: in `rope_scaling` (transformers 4) or in `rope_parameters`.
    """
    bases = {"rope_theta": config.get("rope_theta")}
    scalings: dict[str, RopeScaling | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        rope = dict(value) if isinstance(value, dict) else {"rope_type": value}
        bases[f"{key}.rope_theta"] = rope.pop("rope_theta", None)
        scalings[key] = _scaling(key, rope, config, problems)
    given = {key: value for key, value in bases.items() if value is not None}
    problems += [
        f"{key}: {value!r}; must be a number above 0"
        for key, value in given.items()
        if not _is_positive(value)
    ]
    base = next(iter(given.values()), family.rotary_base)
    if any(value != base for value in given.values()):
        problems.append(f"rope_theta: is given twice, and differs: {given}")
    scaling = next(iter(scalings.values()), None)
    if scaling is not None and scaling.kind == "yarn" and _is_positive(base) and base <= 1:
        problems.append(f"rope_theta: {base!r}; must be above 1 for rope_type 'yarn'")
    if any(other != scaling for other in scalings.values()):
        problems.append(f"rope_scaling: differs from rope_parameters: {scalings}")
    return base, scaling


def _scaling(
    key: str, rope: dict[str, Any], config: dict[str, Any], problems: list[str]
) -> RopeScaling | None:
    """What config.json says in the dict `rope` under `key`, its theta taken out."""
    # To transformers, null is a missing parameter, but for one.
    rope = {name: value for name, value in rope.items() if value is not None or name == "truncate"}
    legacy = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy)
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(f"{key}.partial_rotary_factor: {partial!r} is not implemented; must be 1.0")
    if kind not in tuple(_ROPE_PARAMETERS):
        problems.append(
            f"{key}.rope_type: {kind!r} is not implemented; must be one of "
            + ", ".join(map(repr, _ROPE_PARAMETERS))
        )
        return None
    needs = _ROPE_PARAMETERS[kind]
    rope = _ROPE_DEFAULTS.get(kind, {}) | rope
    if "original_max_position_embeddings" in needs:
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    optional = {"attention_factor"} - rope.keys()
    wrong = [
        f"{key}.{name}: {value!r} is not known for rope_type {kind!r}"
        for name, value in rope.items()
        if name not in needs
    ] + [
        f"{key}.{name}: {repr(rope[name]) if name in rope else 'missing'}; must be {need}"
        for name, (holds, need) in needs.items()
        if name not in optional and not holds(rope.get(name))
    ]
    low, high = _ROPE_PASSAGE.get(kind, ("", ""))
    if low and not wrong and rope[low] >= rope[high]:
        wrong.append(f"{key}.{low}: {rope[low]}; must be below {high} {rope[high]}")
    problems += wrong
    if wrong or kind in ("default", "dynamic"):
        return None
    if kind == "yarn":
        mscales = rope.pop("mscale"), rope.pop("mscale_all_dim")
        rope.setdefault("attention_factor", yarn_attention_factor(rope["factor"], *mscales))
    return RopeScaling(kind, **rope)
