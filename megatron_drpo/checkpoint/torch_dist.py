"""Megatron's distributed checkpoints (format `torch_dist`): read and written without Megatron.

In: a directory that Megatron-LM, megatron-core or a run of ours saved under any layout. Out: whole
parameters. Or the other way: whole parameters in, a directory out that Megatron loads under any
layout. One process is enough, and no process group.

    .metadata        pickle: for each key dtype, size and chunks, and where each chunk's bytes lie
    __R_N.distcp     the chunks, each as torch.save writes a tensor, one behind the other
    common.pt        what is the same on all ranks; not read here
    metadata.json    that this is `torch_dist`

A key is a parameter's name without its layer's number: the layers, and within them the experts,
are leading dims of one tensor, `[L, ...]` or `[L, E, ...]`. Newer Megatron may store each layer or
expert under a key of its own; both are read, the first is written.

Megatron's models also ask for objects named `_extra_state`, Transformer Engine's scales of fp8,
which are not written here. `dist_checkpointing.load` misses them unless it is told
`strict="log_all"` or `"ignore_all"`; Megatron-LM is told so by `--dist-ckpt-strictness`, and wants
the checkpoint as CK/release beside CK/latest_checkpointed_iteration.txt that says `release`.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import struct
import threading
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_drpo.checkpoint.families import Architecture, Entry, family_of
from megatron_drpo.checkpoint.families.table import GatedMLP, Vocab
from megatron_drpo.checkpoint.hf import DTYPES, HfWeights
from megatron_drpo.checkpoint.manifest import Weights, dtype_name
from megatron_drpo.checkpoint.resume import LATEST, latest
from megatron_drpo.errors import CheckpointError

METADATA = ".metadata"
_TRACKER = "latest_checkpointed_iteration.txt"  # of Megatron-LM
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
TRAINING_STATE = ("optimizer.", "chained_")
"""Beginnings of the keys that are no weights; chained optimizers number themselves."""
_MAX_PADDING = 128 * 64
"""Megatron-LM pads the vocabulary to a multiple of 128 times the tensor-parallel size; more ranks
than 64 are not seen. A vocabulary beyond that is another model's."""
_ALIGNMENT = 64  # bytes, as of the data within what torch.save writes: readers can map it
_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.experts."


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor, and where its bytes lie.

    Example: Chunk("output_layer.weight", "bfloat16", (32000, 4096), (16000, 0), (16000, 4096),
        "__0_1.distcp", 0, 131073280)
    """

    key: str
    dtype: str
    size: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """Bytes into the file."""
    length: int
    """Bytes, of everything that torch.save wrote."""


# --- Where a checkpoint is ----------------------------------------------------------------------


def find_torch_dist(directory: str | Path) -> Path | None:
    """The torch_dist checkpoint that a directory is or points to; None if it is something else.

    A directory points to one by Megatron-LM's `latest_checkpointed_iteration.txt` (a number, or
    `release`), or by the `latest` of a run of ours. (DeepSpeed leaves a `latest`, too, of another
    wording.)

    Raises:
        CheckpointError: it points to a checkpoint that is not there.
    """
    directory = Path(directory)
    if (directory / METADATA).is_file():
        return directory
    tracker, pointer = directory / _TRACKER, directory / LATEST
    if not tracker.is_file():
        text = pointer.read_text(encoding="utf-8", errors="replace") if pointer.is_file() else ""
        return latest(directory) if re.fullmatch(r"step-\d+", text.strip()) else None
    iteration = tracker.read_text(encoding="utf-8").strip()
    named = directory / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
    if not (named / METADATA).is_file():
        raise CheckpointError(
            f"{tracker}: says {iteration!r}, but {named / METADATA} is not there; give the "
            "directory of a torch_dist checkpoint, or mend the file"
        )
    return named


def open_weights(directory: str | Path, architecture: Architecture) -> Weights:
    """The weights in a directory of either kind, checked against the architecture.

    Raises:
        CheckpointError: as `MegatronWeights` or `HfWeights`.
    """
    if find_torch_dist(directory) is not None:
        return MegatronWeights(directory, architecture)
    return HfWeights(directory, architecture)


# --- Reading ------------------------------------------------------------------------------------


class _Inert:
    """Stands for every class in `.metadata`: keeps what the pickle gives it and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.arguments = state


_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Of megatron-core 0.15 and before.
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module, name): type(name, (_Inert,), {})
        for module, names in _CLASSES.items()
        for name in names
    },
    # A memory layout goes by its name.
    ("torch.serialization", "_get_layout"): type("_get_layout", (_Inert,), {}),
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of `.metadata`, as inert records, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


class TorchDistReader:
    """Tensors of a torch_dist checkpoint, each assembled from the chunks that hold it.

    Nothing in the files is run: `.metadata` is a pickle, of which only inert records are made, and
    the chunks go through torch's weights-only loader. Threads may read at the same time.

    Args:
        path: the directory that holds `.metadata`.
        chunks: read these instead of what `.metadata` lists: of a checkpoint that is being written.

    Raises:
        CheckpointError: `.metadata` is damaged or holds foreign classes, or a file that it names is
            missing or too short.
    """

    def __init__(self, path: str | Path, chunks: Iterable[Chunk] | None = None) -> None:
        self.path = Path(path)
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """dtype and size of each tensor, training state included, by key."""
        self._chunks: dict[str, list[Chunk]] = {}
        for chunk in self._read_metadata() if chunks is None else chunks:
            self.tensors[chunk.key] = (getattr(torch, chunk.dtype), chunk.size)
            self._chunks.setdefault(chunk.key, []).append(chunk)
        self._check_files()
        self._places: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """`tensors[key]` at `index` of its leading dims, whole, on the CPU.

        Raises:
            CheckpointError: there is no such key, or `check` says so, or the bytes are damaged.
        """
        boxes = self.check(key, index)
        dtype, size = self.tensors[key]
        shape = size[len(index) :]
        if len(boxes) == 1:
            chunk, source, _ = boxes[0]
            return self._load(chunk)[source].reshape(shape)
        whole = torch.empty(shape, dtype=dtype)
        for chunk, source, target in boxes:
            whole[target] = self._load(chunk)[source]
        return whole

    def check(
        self, key: str, index: tuple[int, ...] = ()
    ) -> list[tuple[Chunk, tuple[Any, ...], tuple[slice, ...]]]:
        """Chunks that make up `read(key, index)`: each with its part and that part's place.

        Raises:
            CheckpointError: there is no such key, the index is outside, or chunks leave a hole or
                overlap.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.path / METADATA}: holds no {key}")
        depth, shape = len(index), self.tensors[key][1][len(index) :]
        boxes = []
        for chunk in self._at(key, depth).get(index, ()):
            inside = tuple(n - offset for n, offset in zip(index, chunk.offsets, strict=False))
            target = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
            )
            boxes.append((chunk, inside, target))
        if not _tiles([target for *_, target in boxes], shape):
            raise CheckpointError(
                f"{self.path / METADATA}: the chunks of {key}{list(index)} {list(shape)} leave a "
                "hole or overlap: the checkpoint is incomplete; save or copy it again"
            )
        return boxes

    def _at(self, key: str, depth: int) -> dict[tuple[int, ...], list[Chunk]]:
        """Chunks of a tensor by index of its `depth` leading dims."""
        if (key, depth) not in self._places:
            places: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self._chunks[key]:
                extents = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                ranges = [range(offset, offset + size) for offset, size in extents]
                for index in itertools.product(*ranges):
                    places.setdefault(index, []).append(chunk)
            self._places[key, depth] = places
        return self._places[key, depth]

    def _load(self, chunk: Chunk) -> Tensor:
        path = self.path / chunk.file
        try:
            with self._lock:
                if chunk.file not in self._files:
                    self._files[chunk.file] = os.open(path, os.O_RDONLY)
                descriptor = self._files[chunk.file]
            return _read_chunk(descriptor, chunk)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError, ...
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{path}: what lies at byte {chunk.start} is not {chunk.key} {chunk.dtype} "
                f"{list(chunk.sizes)}, as {METADATA} says ({reason}); save or copy the checkpoint "
                "again"
            ) from error

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        problems = []
        for file, end in sorted(ends.items()):
            path = self.path / file
            if Path(file).name != file:
                problems.append(f"{file!r} is not the name of a file beside {METADATA}")
            elif not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size < end:
                problems.append(f"{path} is cut off: {path.stat().st_size} bytes of {end}")
        if problems:
            raise CheckpointError(
                f"{self.path}: the checkpoint is incomplete; save or copy it again:\n"
                + "\n".join(f"  {problem}" for problem in problems)
            )

    def _read_metadata(self) -> Iterator[Chunk]:
        path = self.path / METADATA
        try:
            content = _Unpickler(io.BytesIO(path.read_bytes())).load()
            stored = {
                (index.fqn, tuple(index.offset)): info
                for index, info in content.storage_data.items()
                if getattr(index, "offset", None) is not None
            }
            for key, tensor in content.state_dict_metadata.items():
                for chunk in getattr(tensor, "chunks", ()):  # objects, such as rng states: none
                    info = stored[key, tuple(chunk.offsets)]
                    if getattr(info, "transform_descriptors", None):
                        raise ValueError(f"{key} is compressed ({info.transform_descriptors})")
                    yield Chunk(
                        key,
                        dtype_name(_dtype(tensor.properties)),
                        tuple(tensor.size),
                        tuple(chunk.offsets),
                        tuple(chunk.sizes),
                        str(info.relative_path),
                        int(info.offset),
                        int(info.length),
                    )
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error}); give the directory of a "
                "torch_dist checkpoint"
            ) from error
        except CheckpointError:
            raise
        except Exception as error:  # a hostile or torn pickle may raise anything
            raise CheckpointError(
                f"{path}: is not the index of a torch_dist checkpoint, and is not trusted "
                f"({type(error).__name__}: {error}); save or copy the checkpoint again"
            ) from error


def _dtype(properties: Any) -> torch.dtype:
    """Of an inert TensorProperties, whose state is a tuple that begins with it."""
    dtype = properties.arguments[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype")
    return dtype


def _tiles(boxes: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> bool:
    """Whether boxes cover a tensor of this shape exactly once, edge to edge.

    The edges of all boxes cut the tensor into cells; each must lie in one box.
    """
    if any(
        not 0 <= side.start <= side.stop <= size
        for box in boxes
        for side, size in zip(box, shape, strict=True)
    ):
        return False
    edges = [
        sorted({0, size, *(edge for box in boxes for edge in (box[dim].start, box[dim].stop))})
        for dim, size in enumerate(shape)
    ]
    cells = torch.zeros([len(bounds) - 1 for bounds in edges], dtype=torch.int32)
    for box in boxes:
        sides = zip(box, edges, strict=True)
        cells[tuple(slice(b.index(s.start), b.index(s.stop)) for s, b in sides)] += 1
    return bool((cells == 1).all())


def _read_chunk(descriptor: int, chunk: Chunk) -> Tensor:
    """A chunk from its open file; mapped, so that bytes are read when touched and never copied."""
    stream: Any = _Slice(descriptor, chunk.start, chunk.length)
    described = torch.load(stream, map_location="meta", weights_only=True)
    found = (dtype_name(described.dtype), described.numel())
    if found != (chunk.dtype, math.prod(chunk.sizes)):
        raise ValueError(f"it is {found[0]} {list(described.shape)}")
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:  # as torch.save writes: one record per storage
        (record,) = [item for item in archive.infolist() if "/data/" in item.filename]
    lengths = os.pread(descriptor, 4, chunk.start + record.header_offset + 26)
    begin = record.header_offset + 30 + sum(struct.unpack("<HH", lengths))
    size = described.numel() * described.element_size()
    if (
        not described.is_contiguous()
        or (record.compress_type, record.file_size) != (zipfile.ZIP_STORED, size)
        or begin + size > chunk.length
    ):
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True).reshape(chunk.sizes)
    page = (chunk.start + begin) % mmap.ALLOCATIONGRANULARITY
    buffer = mmap.mmap(
        descriptor, page + size, access=mmap.ACCESS_COPY, offset=chunk.start + begin - page
    )
    data = torch.frombuffer(buffer, dtype=torch.uint8, offset=page)
    if data.data_ptr() % described.element_size():
        data = data.clone()  # processors may insist on whole words
    return data.view(described.dtype).reshape(chunk.sizes)


class _Slice(io.RawIOBase):
    """Part of an open file as a file of its own; each thread makes its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(len(buffer), max(self._length - self._position, 0))
        done = 0
        while done < end:  # the system reads at most 2 GiB at once
            data = os.pread(self._descriptor, end - done, self._start + self._position)
            if not data:
                break
            buffer[done : done + len(data)] = data
            self._position += len(data)
            done += len(data)
        return done


def stored_entries(architecture: Architecture) -> list[Entry]:
    """Entries that a Megatron checkpoint stores: all, without a tied model's output layer."""
    family = family_of(architecture)
    return [
        entry
        for entry in family.entries(architecture)
        if not (architecture.tie_word_embeddings and entry.hf[0] == family.tied[1])
    ]


class MegatronWeights(Weights):
    """The weights of a torch_dist checkpoint, whatever layout saved it and whatever else is in it.

    Optimizer states and objects (random states, `_extra_state` of Transformer Engine) are passed
    over by rule. Every other tensor must be a parameter of the architecture, and every parameter
    must be there once, whole. A vocabulary may be padded, as far as Megatron does: rows from
    `vocab_size` on are dropped.

    Args:
        directory: as `find_torch_dist` takes it.

    Raises:
        CheckpointError: lists every parameter that is missing, incomplete, or of another shape or
            dtype, and every key that is left over.
    """

    kind = "megatron"

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        path = find_torch_dist(directory)
        if path is None:
            raise CheckpointError(
                f"{directory}: holds no {METADATA}, {_TRACKER} or `latest`; give the directory of "
                "a torch_dist checkpoint"
            )
        self.directory = path
        self._architecture = architecture
        self._reader = TorchDistReader(path)
        self.num_padding_rows = 0
        """Rows of the vocabulary that are stored and dropped."""
        self._parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        problems: list[str] = []
        dtypes: dict[str, dict[torch.dtype, str]] = {}  # first name of each dtype, by key
        for entry in stored_entries(architecture):
            try:
                self._place(entry)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                dtype = self._tensors[entry.name][0]
                dtypes.setdefault(entry.key, {}).setdefault(dtype, entry.name)
        problems += [
            " but ".join(f"{name} is {dtype_name(dtype)}" for dtype, name in names.items())
            for names in dtypes.values()
            if len(names) > 1
        ]
        used = {key for parts in self._parts.values() for key, _ in parts}
        problems += [
            f"{key} {list(size)} is left over: {architecture.family} with "
            f"{architecture.num_layers} layers has no such parameter"
            for key, (_, size) in self._reader.tensors.items()
            if key not in used and not key.startswith(TRAINING_STATE)
        ]
        if problems:
            raise CheckpointError(
                f"{path}: the weights do not fit config.json; give the config.json of this model, "
                "or save the checkpoint again:\n" + "\n".join(f"  {line}" for line in problems)
            )

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self._tensors

    def load(self, name: str) -> Tensor:
        parts = [self._reader.read(key, index) for key, index in self._parts[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[: self._tensors[name][1][0]]

    def hf(self, entry: Entry) -> list[Any]:
        family = family_of(self._architecture)
        name = entry.name
        if name not in self._parts and entry.hf[0] in family.tied:
            name = next(other.name for other in family.first if other.hf[0] in family.tied)
        return list(entry.transform.to_hf([self.load(name)], self._architecture))

    def _place(self, entry: Entry) -> None:
        """Find the tensors that hold a parameter; CheckpointError says what is wrong with them."""
        stored = self._reader.tensors
        shape = entry.transform.megatron_shape(self._architecture)
        ways = (way for way in _ways(entry) if all(key in stored for key, _ in way))
        way = next(ways, None)
        if way is None:
            raise CheckpointError(f"{entry.name} {list(shape)} is missing")
        counts = (self._architecture.num_layers, self._architecture.num_experts)
        parts = [(key, tuple(entry.index[axis] for axis in axes)) for key, axes in way]
        self._parts[entry.name] = parts  # even if it is wrong: then it is not left over
        rows = 0
        for key, axes in way:
            dtype, size = stored[key]
            leading = tuple(counts[axis] for axis in axes)
            if dtype not in DTYPES.values():
                raise CheckpointError(
                    f"{key} has dtype {dtype_name(dtype)}, must be one of "
                    + ", ".join(map(dtype_name, DTYPES.values()))
                )
            depth = len(axes)
            if size[:depth] != leading or size[depth + 1 :] != shape[1:]:
                raise CheckpointError(
                    f"{key} is {list(size)}, config.json makes it {[*leading, *shape]}"
                )
            rows += size[depth]
        may_pad = isinstance(entry.transform, Vocab)
        padding = rows - shape[0]
        if padding and not (may_pad and 0 < padding < _MAX_PADDING):
            limit = f" and fewer than {_MAX_PADDING} of padding" if may_pad else ""
            raise CheckpointError(
                f"{' and '.join(key for key, _ in way)}: {rows} rows, config.json makes it "
                f"{shape[0]}{limit}"
            )
        self.num_padding_rows = max(self.num_padding_rows, padding)
        for key, index in parts:
            self._reader.check(key, index)
        self._tensors[entry.name] = (stored[way[0][0]][0], shape)


def _ways(entry: Entry) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """How Megatron may have stored a parameter: the parts to be joined along the first dim.

    Each part is a key, and which of (layer, expert) index its leading dims.
    """
    axes = tuple(range(len(entry.index)))
    keys = {entry.key: axes}
    if axes:
        layer = f"{_LAYERS}{entry.index[0]}."
        if len(axes) == 1:  # layer specs without Megatron's map of names
            keys |= {name.replace(layer, _LAYERS, 1): axes for name in entry.megatron}
        keys |= {key.replace(_LAYERS, layer, 1): axes[1:] for key in keys}
    if len(axes) == 2:
        expert = f"{_EXPERTS}{entry.index[1]}."
        keys |= {key.replace(_EXPERTS, expert, 1): left[:-1] for key, left in keys.items()}
    for key, left in keys.items():
        yield [(key, left)]
    if isinstance(entry.transform, GatedMLP):  # megatron-core's `singleton_local_shards`
        for key, left in keys.items():
            yield [(f"{key}_w", left), (f"{key}_v", left)]


# --- Writing ------------------------------------------------------------------------------------


class TorchDistWriter:
    """Writes a torch_dist checkpoint chunk by chunk, from any number of threads.

    Each thread that writes has a file to itself meanwhile, so there are as many files as threads.
    Nothing is a checkpoint before `finish`.

    Args:
        directory: exists; receives the files.
        chunks: what an interrupted writer had put there and shall stay. What lies behind it in the
            files is cut off.
    """

    def __init__(self, directory: str | Path, chunks: Iterable[Chunk] = ()) -> None:
        self._directory = Path(directory)
        (self._directory / METADATA).unlink(missing_ok=True)
        self._chunks = list(chunks)
        self._lock = threading.Lock()
        ends: dict[str, int] = {}
        for chunk in self._chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for path in self._directory.glob("__0_*.distcp"):
            if path.name in ends:
                os.truncate(path, ends[path.name])
            else:
                path.unlink()
        self._free = sorted(ends)  # files that nobody is writing to
        self._num_files = 1 + max((int(name[4:-7]) for name in ends), default=-1)

    def add(self, key: str, size: Sequence[int], offsets: Sequence[int], tensor: Tensor) -> Chunk:
        """Write one chunk.

        Args:
            size: of the whole tensor.
            offsets: where the chunk begins in it, as many as there are dims.
            tensor: the chunk, on the CPU, with as many dims.

        Returns:
            The chunk, and where it lies. Nothing is forced to disk.

        Raises:
            OSError: the disk is full, or worse; `finish` may not be called then.
        """
        with self._lock:
            if not self._free:
                self._free.append(f"__0_{self._num_files}.distcp")
                self._num_files += 1
            file = self._free.pop()
        # torch.save writes all of a tensor's storage: give it a storage of just these bytes.
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        exact = torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)
        with (self._directory / file).open("ab", buffering=0) as opened:
            end = opened.seek(0, os.SEEK_END)
            start = end + -end % _ALIGNMENT
            stream: Any = _Whole(opened.fileno())
            stream.write(bytes(start - end))
            try:
                torch.save(exact, stream)
            except RuntimeError:
                if stream.error is not None:  # torch covers it with one of its own
                    raise stream.error from None
                raise
            length = opened.tell() - start
            # Begin to bring it to disk now: waiting for all of it at the end takes longer.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        chunk = Chunk(
            key,
            dtype_name(tensor.dtype),
            tuple(size),
            tuple(offsets),
            tuple(tensor.shape),
            file,
            start,
            length,
        )
        with self._lock:
            self._chunks.append(chunk)
            self._free.append(file)
        return chunk

    def finish(self, common: Mapping[str, Any]) -> None:
        """Make it a checkpoint.

        Args:
            common: content of `common.pt`: what Megatron-LM wants to know besides the tensors.
        """
        tensors: dict[str, torch_metadata.TensorStorageMetadata] = {}
        storage = {}
        for chunk in sorted(self._chunks, key=lambda chunk: (chunk.key, chunk.offsets)):
            properties = torch_metadata.TensorProperties(dtype=getattr(torch, chunk.dtype))
            stored = tensors.setdefault(
                chunk.key,
                torch_metadata.TensorStorageMetadata(properties, torch.Size(chunk.size), []),
            )
            stored.chunks.append(
                torch_metadata.ChunkStorageMetadata(
                    torch.Size(chunk.offsets), torch.Size(chunk.sizes)
                )
            )
            index = torch_metadata.MetadataIndex(chunk.key, chunk.offsets)
            storage[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        metadata = torch_metadata.Metadata(dict(tensors), storage_data=storage)
        torch.save(dict(common), self._directory / "common.pt")
        (self._directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        (self._directory / METADATA).write_bytes(pickle.dumps(metadata))


class _Whole(io.RawIOBase):
    """A file that is written wholly or raises; keeps what it raised."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:  # the system writes at most 2 GiB at once, and less on a full disk
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
            raise
        return size
