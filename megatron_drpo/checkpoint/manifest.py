"""What a converted checkpoint holds, tensor by tensor, and whether that is still so.

In: a checkpoint of either kind, behind `Weights`. Out: `manifest.json` beside its files, which
names source and result with shape, dtype and SHA-256 of every tensor; `check_manifest` compares a
checkpoint with its manifest. Readers of neither safetensors nor Megatron's shards notice a flipped
bit, and nothing else tells a weight from a neighbour's of the same shape.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self

import safetensors
import torch
from torch import Tensor

import megatron_drpo
from megatron_drpo.checkpoint.families import Architecture, Entry
from megatron_drpo.disk import write_atomically
from megatron_drpo.errors import CheckpointError

FILE = "manifest.json"
FORMAT = "megatron-drpo-manifest/1"


class Weights(AbstractContextManager, Protocol):
    """The common face of both kinds of checkpoint: a Hugging Face directory, or torch_dist."""

    directory: Path
    """Where the tensors lie, and `config.json` and `manifest.json` beside them."""
    kind: str
    """`hf` or `megatron`."""

    def __enter__(self) -> Self:
        return self

    @property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every weight as stored, by HF name or, of Megatron, `Entry.name`."""
        ...

    def load(self, name: str) -> Tensor:
        """One of `tensors`, whole, on the CPU."""
        ...

    def hf(self, entry: Entry) -> list[Any]:
        """The entry's Hugging Face tensors, indexable with slices, in the order of `entry.hf`."""
        ...


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor. Example: TensorRecord((32000, 4096), "bfloat16", "9f86d081884c7d65...")"""

    shape: tuple[int, ...]
    dtype: str
    """Without `torch.`: `float32`, `bfloat16` or `float16`."""
    sha256: str
    """`digest` of the values."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that was converted."""

    kind: str
    """`hf` or `megatron`."""
    path: str
    config_sha256: str
    """Of its config.json."""
    tensors: Mapping[str, TensorRecord]
    """Every tensor of it, by name."""
    not_carried: Mapping[str, str] = field(default_factory=dict)
    """Those of `tensors` that the result does not need, and why: a tied weight that was stored
    twice, or a table that follows from config.json."""


@dataclass(frozen=True)
class Manifest:
    """A conversion: what it read, what it wrote, and with what."""

    kind: str
    """Of the result: `hf` or `megatron`."""
    architecture: Mapping[str, Any]
    """The fields of `Architecture`."""
    config_sha256: str
    """Of the config.json beside the manifest."""
    source: Source
    tensors: Mapping[str, TensorRecord]
    """Every tensor of the result, by name as in `Weights.tensors`."""
    versions: Mapping[str, str]
    """Of this program and of the libraries that wrote the files."""
    verified: Mapping[str, Any] | None = None
    """What was proven about the result once it was written; None: nothing."""


def digest(tensor: Tensor) -> str:
    """SHA-256, in hexadecimal, of a CPU tensor's values in row-major order.

    Other threads run meanwhile: hashing does not hold the interpreter's lock.
    """
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def record(tensor: Tensor, sha256: str | None = None) -> TensorRecord:
    """The record of a tensor that is in memory; `sha256` is its digest where that is known."""
    return TensorRecord(tuple(tensor.shape), dtype_name(tensor.dtype), sha256 or digest(tensor))


def dtype_name(dtype: torch.dtype) -> str:
    """Example: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def versions() -> dict[str, str]:
    """Of what takes part in a conversion."""
    return {
        "megatron_drpo": megatron_drpo.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """The architecture as a manifest keeps it: what JSON gives back unchanged."""
    return json.loads(json.dumps(asdict(architecture)))


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write DIRECTORY/manifest.json; it appears whole or not at all."""
    content = {"format": FORMAT} | asdict(manifest)
    write_atomically(Path(directory) / FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: str | Path) -> Manifest | None:
    """DIRECTORY/manifest.json, or None where there is none.

    Raises:
        CheckpointError: the file is there and cannot be understood.
    """
    path = Path(directory) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        source = content.pop("source")
        return Manifest(
            source=Source(tensors=_records(source.pop("tensors")), **source),
            tensors=_records(content.pop("tensors")),
            **content,
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is not a manifest of this program ({type(error).__name__}: {error}); convert "
            "the checkpoint again, or delete the file to go on without it"
        ) from error


def _records(content: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorRecord]:
    names = [field.name for field in fields(TensorRecord)]
    records = {}
    for tensor, values in content.items():
        shape, dtype, sha256 = (values[name] for name in names)
        records[tensor] = TensorRecord(tuple(shape), dtype, sha256)
    return records


def check_manifest(
    weights: Weights, manifest: Manifest, *, rank: int = 0, num_ranks: int = 1
) -> list[str]:
    """Compare a checkpoint with its manifest, reading and hashing every tensor.

    Not collective: each rank takes every `num_ranks`-th tensor, rank 0 what is quick besides.

    Returns:
        One sentence per difference that this rank found, with both values and the remedy; empty
        if there is none. The union over the ranks is the whole answer.

    Raises:
        CheckpointError: a tensor cannot be read at all.
    """
    where, remedy = weights.directory, "; convert or copy the checkpoint again"
    problems: list[str] = []
    stored = weights.tensors
    if rank == 0:
        config = file_digest(where / "config.json")
        if weights.kind != manifest.kind:
            problems.append(f"is of kind {weights.kind}, its {FILE} of kind {manifest.kind}")
        if config != manifest.config_sha256:
            problems.append(
                f"config.json has {_short(config)}, {FILE} says {_short(manifest.config_sha256)}"
            )
        problems += [f"{name} is not in {FILE}" for name in stored if name not in manifest.tensors]
        problems += [f"{name} is missing" for name in manifest.tensors if name not in stored]
    for name in [name for name in manifest.tensors if name in stored][rank::num_ranks]:
        expected, (dtype, shape) = manifest.tensors[name], stored[name]
        if (dtype_name(dtype), tuple(shape)) != (expected.dtype, expected.shape):
            problems.append(
                f"{name} is {dtype_name(dtype)} {list(shape)}, {FILE} says "
                f"{expected.dtype} {list(expected.shape)}"
            )
            continue
        found = digest(weights.load(name))
        if found != expected.sha256:
            problems.append(f"{name} has {_short(found)}, {FILE} says {_short(expected.sha256)}")
    return [f"{where}: {problem}{remedy}" for problem in problems]


def _short(sha256: str) -> str:
    return f"SHA-256 {sha256[:12]}..."
