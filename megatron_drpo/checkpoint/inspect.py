"""What a checkpoint holds, for people (`python tools/convert_checkpoint.py --inspect DIR`).

In: any directory of weights that this program reads: Hugging Face, Megatron (converted, or saved by
Megatron-LM), or the training state of a run. Out: text. Headers are read and no weights, so it is
quick at any size. An architecture that is not supported is no reason to show nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_drpo.checkpoint import hf
from megatron_drpo.checkpoint.families import Architecture, read_architecture
from megatron_drpo.checkpoint.manifest import Manifest, Weights, dtype_name, read_manifest
from megatron_drpo.checkpoint.resume import STATE, read_state
from megatron_drpo.checkpoint.torch_dist import (
    TRAINING_STATE,
    MegatronWeights,
    TorchDistReader,
    find_torch_dist,
    open_weights,
)
from megatron_drpo.errors import CheckpointError

# A number that counts layers or experts is a part of the name, or ends it (Transformer Engine's
# experts: `linear_fc1.weight7`).
_NUMBER = re.compile(r"(?:(?<=\.)|(?<=\.weight)|(?<=\.bias))\d+(?=\.|$)")
_MAX_PROBLEMS = 10


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored. Example: Stored("bfloat16", (2048, 1024), 4194304)."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Row:
    """Equal tensors of several layers or experts, in one line.

    Example: Row("model.layers.{0..27}.self_attn.q_proj.weight", 28, "bfloat16", (2048, 1024),
        117440512)
    """

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    """Of all of them."""


def describe(directory: str | Path) -> str:
    """Kind, architecture, size, manifest and every tensor of a checkpoint, as lines of text.

    Args:
        directory: of a Hugging Face or Megatron checkpoint, of Megatron-LM's checkpoints, or a
            run's `checkpoints`; the last two stand for their newest one.

    Raises:
        CheckpointError: it holds no checkpoint, or its index cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a directory; give that of a checkpoint")
    megatron = find_torch_dist(directory)
    path = megatron or directory
    problems: list[str] = []
    tensors = _megatron_tensors(path) if megatron else _hf_tensors(path, problems)
    manifest = read_manifest(path)
    kind = _kind(path, directory, manifest) if megatron else "Hugging Face"
    facts = [("checkpoint", str(path)), ("kind", kind)]
    try:
        architecture = read_architecture(path)
    except CheckpointError as error:
        facts.append(("architecture", f"not known: {_in_one_line(error)}"))
    else:
        facts.append(("architecture", architecture_line(architecture)))
        facts.append(("complete", _complete(path, architecture, manifest, problems)))
    others = [each for name, each in tensors.items() if name.startswith(TRAINING_STATE)]
    weights = [each for name, each in tensors.items() if not name.startswith(TRAINING_STATE)]
    facts.append(("weights", _totals(weights)))
    if others:
        facts.append(("training state", _totals(others)))
    facts += _manifest_facts(manifest)
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {text}" for name, text in facts]
    lines += [f"  {problem}" for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"  and {len(problems) - _MAX_PROBLEMS} more")
    return "\n".join([*lines, "", *table(collapse(tensors))])


def architecture_line(architecture: Architecture) -> str:
    """Example: `qwen3, 28 layers, hidden 1024, 16 heads of 128 over 8 groups, MLP 3072, ...`."""
    a = architecture
    mlp = f"MLP {a.ffn_hidden_size}"
    if a.num_experts:
        mlp = f"{a.num_experts} experts of {a.ffn_hidden_size}, {a.num_experts_per_token} per token"
    rope = f"RoPE base {a.rotary_base:g}"
    if a.rope_scaling:
        rope += f" scaled by {a.rope_scaling.factor:g} ({a.rope_scaling.kind})"
    parts = [
        a.family,
        f"{a.num_layers} layers",
        f"hidden {a.hidden_size}",
        f"{a.num_attention_heads} heads of {a.kv_channels} over {a.num_query_groups} groups",
        mlp,
        f"vocabulary {a.vocab_size}{' (tied)' if a.tie_word_embeddings else ''}",
        f"context {a.max_position_embeddings}",
        rope,
        f"norm epsilon {a.norm_epsilon:g}",
    ]
    if a.sliding_window:
        parts.append(f"window {a.sliding_window} in {len(a.sliding_layers)} layers")
    if a.add_bias_linear:
        parts.append("biases")
    return ", ".join(parts)


def padding_note(weights: Weights) -> str:
    """Example: `; 67 rows of the vocabulary are padding`; empty if none are."""
    rows = weights.num_padding_rows if isinstance(weights, MegatronWeights) else 0
    return f"; {rows} rows of the vocabulary are padding" if rows else ""


def collapse(tensors: Mapping[str, Stored]) -> list[Row]:
    """One row for the tensors that differ in the numbers of layer and expert only, in first order.

    `{0..27}` stands for the numbers that occur in that place; the count tells whether every
    combination does.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, Stored]]] = {}
    for name, stored in tensors.items():
        key = (_NUMBER.sub("#", name), stored.dtype, stored.shape)
        groups.setdefault(key, []).append((name, stored))
    rows = []
    for (_, dtype, shape), members in groups.items():
        places = zip(*(_NUMBER.findall(name) for name, _ in members), strict=True)
        ranges = iter([_ranges(map(int, numbers)) for numbers in places])
        name = _NUMBER.sub(lambda _, ranges=ranges: next(ranges), members[0][0])
        num_bytes = sum(stored.num_bytes for _, stored in members)
        rows.append(Row(name, len(members), dtype, shape, num_bytes))
    return rows


def _ranges(numbers: Iterable[int]) -> str:
    """Example: {0..3,5}; a single number as it is."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}..{last}" for first, last in runs]
    return texts[0] if len(runs) == 1 and runs[0][0] == runs[0][1] else "{" + ",".join(texts) + "}"


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines, the last one the total."""
    cells = [
        (row.name, f"{row.count} x", str(list(row.shape)), row.dtype, size(row.num_bytes))
        for row in rows
    ]
    parameters = sum(row.count * math.prod(row.shape) for row in rows)
    total = size(sum(row.num_bytes for row in rows))
    count = sum(row.count for row in rows)
    cells.append(("total", f"{count} x", f"{parameters:,} numbers", "", total))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return [
        f"{name:{widths[0]}}  {number:>{widths[1]}} {shape:{widths[2]}}  {dtype:{widths[3]}}  "
        f"{total:>{widths[4]}}"
        for name, number, shape, dtype, total in cells
    ]


def size(num_bytes: int) -> str:
    """Example: `112.0 MiB`."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    power = min((num_bytes.bit_length() - 1) // 10, 3)
    return f"{num_bytes / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


# --- What is there ------------------------------------------------------------------------------


def _hf_tensors(path: Path, problems: list[str]) -> dict[str, Stored]:
    return {
        name: Stored(
            dtype_name(hf.DTYPES[t.dtype]) if t.dtype in hf.DTYPES else t.dtype,
            t.shape,
            t.end - t.begin,
        )
        for name, t in sorted(hf.read_headers(path, problems).items(), key=_natural)
    }


def _megatron_tensors(path: Path) -> dict[str, Stored]:
    reader = TorchDistReader(path)
    try:
        return {
            name: Stored(dtype_name(dtype), shape, hf.num_bytes(dtype, shape))
            for name, (dtype, shape) in sorted(reader.tensors.items(), key=_natural)
        }
    finally:
        reader.close()


def _natural(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Order of names in which layer 2 comes before layer 10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", item[0])]


def _kind(path: Path, directory: Path, manifest: Manifest | None) -> str:
    """What kind of Megatron checkpoint it is."""
    if (path / STATE).is_file():
        kind = "training state of a run"
        try:
            return f"{kind}, step {read_state(path)['progress']['step']}"
        except CheckpointError:  # of another version, perhaps; the tensors can be shown
            return kind
    if manifest is not None:
        return f"Megatron (torch_dist), converted from {manifest.source.kind}"
    named = "" if path == directory else f", {path.name}"
    return f"Megatron (torch_dist){named}"


def _complete(
    path: Path, architecture: Architecture, manifest: Manifest | None, problems: list[str]
) -> str:
    """Whether every weight of the architecture is there; adds what is wrong to `problems`."""
    try:
        with open_weights(path, architecture) as weights:
            found = {
                name: (dtype_name(dtype), tuple(shape))
                for name, (dtype, shape) in weights.tensors.items()
            }
            padding = padding_note(weights)
    except CheckpointError as error:
        problems += [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        return "no"
    if manifest is not None:
        expected = {name: (each.dtype, each.shape) for name, each in manifest.tensors.items()}
        differ = [
            f"{name}: {found.get(name, 'missing')}, manifest.json says {expected.get(name)}"
            for name in expected.keys() | found.keys()
            if found.get(name) != expected.get(name)
        ]
        if differ:
            problems += sorted(differ)
            return "no"
    return f"yes, every weight of the architecture is there once{padding}"


def _totals(tensors: Iterable[Stored]) -> str:
    numbers = num_bytes = 0
    dtypes: dict[str, int] = {}
    for each in tensors:
        numbers += math.prod(each.shape)
        num_bytes += each.num_bytes
        dtypes[each.dtype] = dtypes.get(each.dtype, 0) + 1
    names = ", ".join(sorted(dtypes, key=lambda name: -dtypes[name]))
    return f"{numbers:,} numbers, {size(num_bytes)}, {names}"


def _manifest_facts(manifest: Manifest | None) -> list[tuple[str, str]]:
    if manifest is None:
        return [("manifest", "none")]
    source = manifest.source
    return [
        ("manifest", f"SHA-256 of {len(manifest.tensors)} tensors; made from {source.path}"),
        ("verified", "no" if manifest.verified is None else verification(manifest.verified)),
    ]


def verification(verified: Mapping[str, Any]) -> str:
    """What was proven about a conversion, in a sentence; of `Manifest.verified`."""
    text = f"{verified['at']}: round trip {verified['round_trip']}"
    logits = verified.get("logits")
    if logits:
        text += (
            f"; logits of {logits['num_tokens']} tokens through {len(logits['layers'])} layers "
            f"within {logits['tolerance']:.1e} of transformers' (largest difference "
            f"{logits['max_abs_diff']:.1e})"
        )
    return text


def _in_one_line(error: CheckpointError) -> str:
    first, *others = (line.strip() for line in str(error).splitlines())
    return " ".join([first, "; ".join(others)]).strip()
