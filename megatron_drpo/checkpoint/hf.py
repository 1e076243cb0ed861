"""Hugging Face directories: config.json, safetensors with or without an index, tokenizer files.

In: a directory, whose every header is checked before a number is read. Out: `HfWeights`, its
tensors by name; or the parts of a new directory (`SafetensorsFile`, `write_index`,
`copy_settings`). Knows files and tensors, no model and no process group: `model_weights` moves
tensors into and out of a model. Only safetensors are read, never pickle.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shlex
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_drpo.checkpoint.families import Architecture, Entry, family_of
from megatron_drpo.checkpoint.manifest import Weights, digest, dtype_name
from megatron_drpo.disk import sync_path
from megatron_drpo.errors import CheckpointError

Described = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a tensor."""

MAX_SHARD_BYTES = 5_000_000_000
"""Largest file that is written, as is usual for Hugging Face checkpoints."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_LFS = b"version https://git-lfs"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What weights may be stored as, under the format's own names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_LISTED = 50  # problems in one message: a wrong config.json makes every tensor one
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CONVERT = (
    'python -c "import sys, transformers as t; old, new = sys.argv[1:]; '
    "t.AutoModelForCausalLM.from_pretrained(old, dtype='auto').save_pretrained(new); "
    't.AutoTokenizer.from_pretrained(old).save_pretrained(new)"'
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: Path
    dtype: str
    """As the format spells it: `BF16`."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Bytes in the file, from its start."""


# --- Reading ------------------------------------------------------------------------------------


class HfWeights(Weights):
    """The weights of a Hugging Face directory. Tensors are mapped: bytes are read when touched.

    Each tensor is a mapping of its own, so that memory is given back with the tensor, and any
    number of threads may read.

    Example:
        with HfWeights(directory, read_architecture(directory)) as weights:
            norm = weights.load("model.norm.weight")
    """

    kind = "hf"

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        """Raises CheckpointError as `verify_checkpoint`."""
        self.directory = Path(directory)
        self._stored = _verified(self.directory, architecture)
        family = family_of(architecture)
        self._tied = family.tied if architecture.tie_word_embeddings else ()
        paths = {stored.file for stored in self._stored.values()}
        self._files = {path: path.open("rb", buffering=0) for path in paths}

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def tensors(self) -> Mapping[str, Described]:
        """dtype and shape of everything stored, tables that follow from config.json included."""
        return {name: (DTYPES[stored.dtype], stored.shape) for name, stored in self._stored.items()}

    def load(self, name: str) -> Tensor:
        """One of `tensors`; nothing that is written into it reaches the file."""
        stored = self._stored[name]
        page = stored.begin - stored.begin % mmap.ALLOCATIONGRANULARITY
        buffer = mmap.mmap(
            self._files[stored.file].fileno(),
            stored.end - page,
            access=mmap.ACCESS_COPY,
            offset=page,
        )
        data = torch.frombuffer(buffer, dtype=torch.uint8, offset=stored.begin - page)
        dtype = DTYPES[stored.dtype]
        if data.data_ptr() % dtype.itemsize:  # the format allows it, processors may not
            data = data.clone()
        return data.view(dtype).reshape(stored.shape)

    def names(self, entry: Entry) -> list[str]:
        """The stored tensors that an entry is made of.

        A tied weight may be stored under either of its names, or under both.
        """
        if entry.hf[0] in self._tied:
            return [name for name in self._tied if name in self._stored]
        return list(entry.hf)

    def hf(self, entry: Entry) -> list[Any]:
        """The tensors of `entry.hf`, in that order.

        Raises:
            CheckpointError: a tied weight is stored twice with different values, and nothing says
                which is meant.
        """
        names = self.names(entry)
        tensors = [self.load(name) for name in names]
        if entry.hf[0] not in self._tied:
            return tensors
        if not torch.equal(tensors[0], tensors[-1]):
            raise CheckpointError(
                f"{self.directory}: {names[0]} and {names[1]} differ, but config.json ties them: "
                "remove one of them, or set tie_word_embeddings to false"
            )
        return tensors[:1]


def verify_checkpoint(directory: str | Path, architecture: Architecture) -> None:
    """Check that every tensor of the model is stored, whole and of the right shape and dtype.

    Reads headers only, so it is quick at any size: call it before long work.

    Raises:
        CheckpointError: the weights are not safetensors; a file is missing or damaged; a tensor is
            missing, left over, stored twice, of another shape, or of a dtype that is not read or
            differs from its peers'; lists the problems with file and tensor.
    """
    _verified(Path(directory), architecture)


def _verified(directory: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """The stored tensors by name, or a CheckpointError that lists the problems."""
    problems: list[str] = []
    stored = read_headers(directory, problems)
    family = family_of(architecture)
    entries = family.entries(architecture)
    expected = {
        name: shape
        for entry in entries
        for name, shape in zip(entry.hf, entry.transform.hf_shapes(architecture), strict=True)
    }
    missing = [name for name in expected if name not in stored]
    tied = family.tied if architecture.tie_word_embeddings else ()
    if any(name in stored for name in tied):
        missing = [name for name in missing if name not in tied]
    if not problems:  # tensors of an unreadable file would all be reported
        problems += [
            f"{name} {list(expected[name])} is missing from {directory}" for name in missing
        ]
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            problems.append(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, must be one of "
                f"{', '.join(DTYPES)}; a quantised model has to be stored in one of them first"
            )
        if name.endswith(family.derived):
            continue
        if name not in expected:
            problems.append(
                f"{tensor.file}: {name} {list(tensor.shape)} is left over: {family.name} with "
                f"{architecture.num_layers} layers has no such tensor"
            )
        elif tensor.shape != expected[name]:
            problems.append(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, config.json makes it "
                f"{list(expected[name])}"
            )
    problems += _mixed_dtypes(entries, stored, tied)
    if problems:
        more = len(problems) - _MAX_LISTED
        problems[_MAX_LISTED:] = [f"and {more} more"] if more > 0 else []
        raise CheckpointError(
            f"{directory}: the weights are damaged or do not fit config.json; download or export "
            "the checkpoint again:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return stored


def _mixed_dtypes(
    entries: Iterable[Entry], stored: Mapping[str, StoredTensor], tied: tuple[str, ...]
) -> list[str]:
    """Megatron stacks a parameter of all layers in one tensor, which has one dtype."""
    found: dict[str, dict[str, str]] = {}  # first name of each dtype, by key
    for entry in entries:
        for name in entry.hf:
            if name in stored and stored[name].dtype in DTYPES:
                key = tied[0] if name in tied else entry.key
                found.setdefault(key, {}).setdefault(stored[name].dtype, name)
    return [
        " but ".join(f"{name} is {dtype}" for dtype, name in names.items())
        + ": they are one parameter of Megatron's, so store them in one dtype"
        for names in found.values()
        if len(names) > 1
    ]


def read_headers(directory: Path, problems: list[str]) -> dict[str, StoredTensor]:
    """Tensors of the single file, else of the index's files; the order of transformers.

    Raises:
        CheckpointError: there are no safetensors.
    """
    single, index = directory / _SINGLE, directory / _INDEX
    if single.exists():
        return _read_header(single, problems)
    if not index.exists():
        _refuse_other_formats(directory)
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        placed: dict[str, str] = dict(content["weight_map"])
        files = sorted(set(placed.values()))
        if not all(isinstance(file, str) for file in files):
            raise ValueError("weight_map must give the name of a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"{index}: is not a safetensors index ({type(error).__name__}: {error})")
        return {}
    stored: dict[str, StoredTensor] = {}
    for file in files:
        # By name only: a link to a blob, as in Hugging Face's cache, is the owner's own doing.
        if Path(file).name != file or not file.endswith(".safetensors"):
            problems.append(f"{index}: {file!r} is not the name of a safetensors file beside it")
            continue
        for name, tensor in _read_header(directory / file, problems).items():
            if placed.get(name) == file:
                stored[name] = tensor
            elif name in placed:
                problems.append(
                    f"{tensor.file}: {name} is stored twice: {_INDEX} places it in {placed[name]}"
                )
            else:
                problems.append(f"{tensor.file}: {name} is not placed there by {_INDEX}")
    return stored


def _refuse_other_formats(directory: Path) -> None:
    found = f"{directory}: neither {_SINGLE} nor {_INDEX} is there"
    pickled = [path.name for kind in ("bin", "pt", "pth") for path in directory.glob(f"*.{kind}")]
    if any(name.startswith("pytorch_model") for name in pickled):
        directory = directory.absolute()
        new = directory.with_name(f"{directory.name}-safetensors")
        raise CheckpointError(
            f"{found}, only pickled weights ({', '.join(sorted(pickled))}), which are not read "
            "since loading them can run any program. If you trust their origin, convert them and "
            f"use {new}:\n  {_CONVERT} {shlex.quote(str(directory))} {shlex.quote(str(new))}"
        )
    if pickled:
        raise CheckpointError(
            f"{found}, only pickled weights ({', '.join(sorted(pickled))}), which are not read "
            "since loading them can run any program; download the model's safetensors"
        )
    raise CheckpointError(f"{found}; download the model's safetensors (hf download)")


def _read_header(path: Path, problems: list[str]) -> dict[str, StoredTensor]:
    """What a safetensors file says it holds, once that is seen to fit the file."""
    try:
        return _parse_header(path)
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror or error})")
    except CheckpointError as error:
        problems.append(f"{path}: {error}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{path}: is not a safetensors file ({type(error).__name__}: {error})")
    return {}


def _parse_header(path: Path) -> dict[str, StoredTensor]:
    """The format: 8 bytes of length, that much JSON, then the data without gaps or overlaps.

    Raises:
        CheckpointError, OSError: with what is wrong.
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is another format.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("is not a file")
    size = status.st_size
    if size == 0:
        raise CheckpointError("is empty")
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > _MAX_HEADER:
            if (head + file.read(len(_LFS))).startswith(_LFS):
                raise CheckpointError("is a Git LFS pointer, not the weights: run `git lfs pull`")
            raise ValueError("it has no header")
        text = file.read(length)
    data = 8 + length
    if len(text) < length:
        raise CheckpointError(f"is cut off: {size} bytes, its header needs {data}")
    header = json.loads(text, object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    stored = {name: _describe(path, data, name, **fields) for name, fields in header.items()}
    position = data
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "follows a gap"
            raise CheckpointError(
                f"is damaged: {name} {kind}: it begins at byte {tensor.begin}, not {position}"
            )
        position = tensor.end
    if position != size:
        raise CheckpointError(f"is cut off or damaged: {size} bytes, its header says {position}")
    return stored


def _describe(
    path: Path, data: int, name: str, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredTensor:
    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {shape} and offsets {data_offsets} must be whole numbers")
    if dtype in DTYPES:
        need = math.prod(shape) * DTYPES[dtype].itemsize
        if need == 0:
            raise CheckpointError(f"is damaged: {name} {shape} has no elements")
        if need != end - begin:
            raise CheckpointError(
                f"is damaged: {name} {shape} of {dtype} takes {need} bytes, its header gives it "
                f"{end - begin}"
            )
    return StoredTensor(path, dtype, tuple(shape), data + begin, data + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name be given twice, and the last one would win."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise CheckpointError(f"names {repeated[0]!r} twice")
    return dict(pairs)


# --- Writing ------------------------------------------------------------------------------------


class SafetensorsFile:
    """A safetensors file written tensor by tensor, in any order and from any thread.

    The header comes first, so nothing is kept in memory. The file has its name only once it is
    whole and on disk.

    Example:
        file = SafetensorsFile(path, {"w": (torch.float32, (2, 3))})
        sha256 = file.write("w", torch.zeros(2, 3))
        file.close()

    Args:
        path: replaced if it exists.
        tensors: dtype (float32, bfloat16 or float16) and shape of each tensor.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, Described]) -> None:
        self.path, self._tensors = Path(path), dict(tensors)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        # Wide dtypes first: each tensor is then aligned, since the header's length is.
        names = sorted(self._tensors, key=lambda name: -self._tensors[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            dtype, shape = self._tensors[name]
            end = position + num_bytes(dtype, shape)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}
        self._missing = set(names)
        self._file = self._partial.open("wb", buffering=0)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: Tensor) -> str:
        """Write one tensor to its place; nothing is copied if it is contiguous and on the CPU.

        Returns:
            `manifest.digest` of it.

        Raises:
            ValueError: not a tensor of this file, written before, or of another dtype or shape.
            OSError: the disk is full, or worse.
        """
        described = (tensor.dtype, tuple(tensor.shape))
        if name not in self._missing or described != self._tensors[name]:
            raise ValueError(
                f"{self.path}: {name} {described} is not one of the tensors still to be written"
            )
        tensor = tensor.detach().cpu().contiguous()
        self._put(tensor.reshape(-1).view(torch.uint8).numpy(), self._begin[name])
        self._missing.remove(name)
        return digest(tensor)

    def close(self) -> None:
        """Force everything to disk and give the file its name.

        Raises:
            ValueError: a tensor was not written.
        """
        if self._missing:
            raise ValueError(f"{self.path}: {', '.join(sorted(self._missing))} were not written")
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def abort(self) -> None:
        """Give up: nothing of the file remains."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _put(self, data: Any, position: int) -> None:
        rest = memoryview(data)
        while rest:  # the system writes at most 2 GiB at once
            written = os.pwrite(self._file.fileno(), rest, position)
            rest, position = rest[written:], position + written


def num_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Of a stored tensor."""
    return math.prod(shape) * dtype.itemsize


def plan_files(
    tensors: Mapping[str, Described], max_bytes: int = MAX_SHARD_BYTES
) -> list[list[str]]:
    """Names of the tensors of each file: in order, at most `max_bytes` each or one tensor alone."""
    files: list[list[str]] = []
    used = 0
    for name, described in tensors.items():
        size = num_bytes(*described)
        if not files or used + size > max_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def file_names(count: int) -> list[str]:
    """What `count` files of weights are called, in order."""
    if count == 1:
        return [_SINGLE]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def write_index(directory: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index, unless everything is in the one file that needs none.

    Args:
        files: name of the file of each tensor.
        total_bytes: of all tensors.
    """
    if set(files.values()) != {_SINGLE}:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
        _write_json(directory / _INDEX, index)


def copy_settings(source_dir: Path, directory: Path, dtype: torch.dtype | None) -> None:
    """Copy config.json, generation config and tokenizer files.

    Args:
        dtype: what config.json shall say the weights' dtype is; None: as it is.

    Raises:
        OSError: config.json is missing, or a file cannot be read or written.
    """
    shutil.copyfile(source_dir / "config.json", directory / "config.json")
    config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if dtype is not None and any(config.get(key) != dtype_name(dtype) for key in keys):
        _write_json(directory / "config.json", config | dict.fromkeys(keys, dtype_name(dtype)))
    for name in _COPIED:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, directory / name)


def stage(out: Path, source: Path) -> Path:
    """An empty directory in which a checkpoint is made that will be called `out`.

    Raises:
        CheckpointError: `out` exists and is no checkpoint, or holds `source`.
    """
    if source.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: holds the checkpoint the run started from; choose another")
    replaces = not out.exists() or (
        out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))
    )
    if not replaces:
        raise CheckpointError(f"{out}: exists and is no checkpoint; move it or choose another name")
    staging = staging_of(out)
    if staging.exists():  # left by somebody who was killed
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def staging_of(out: Path) -> Path:
    """Where `stage` makes it: beside `out`, hidden."""
    return out.with_name(f".{out.name}.partial")


def publish(staging: Path, out: Path) -> None:
    """Force what was staged to disk and call it `out`, in place of an earlier checkpoint."""
    for path in [*staging.iterdir(), staging]:
        sync_path(path)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    staging.rename(out)
    sync_path(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
