"""Weights between a Hugging Face directory and Megatron model chunks, in any TP / PP / VPP layout.

In: a directory with config.json and safetensors, and the chunks of one rank. Out: filled
parameters (`load_hf`), or another such directory (`export_hf`). The tables of
`checkpoint.families` say what converts into what; this module only finds tensors and parameters,
and moves them bit by bit. Only safetensors are read, never pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_drpo.checkpoint.families import Architecture, Entry, family_of
from megatron_drpo.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES = {"F32", "BF16", "F16"}
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


_Bound = tuple[str, nn.Parameter, Entry]


@dataclass(frozen=True)
class _Stored:
    """A tensor as its file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def verify_checkpoint(directory: str | Path, architecture: Architecture) -> None:
    """Check that every tensor of the model is stored, whole and of the right shape.

    Reads headers only, so it is quick at any size: call it before long work.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, left over, or of another
            shape or dtype; lists all problems with file and tensor.
    """
    _verified(Path(directory), architecture)


def load_hf(
    directory: str | Path,
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill every parameter of this rank's chunks in place; each rank reads only its own slices.

    Not collective. Values are rounded to the parameters' dtype; padded vocabulary rows become 0.
    An optimizer that keeps master weights must be built, or told to reload them, afterwards.

    Args:
        chunks: this rank's GPTModel chunks (several under VPP), bare or wrapped.
        tp_rank, tp_size: this rank's place in its tensor-parallel group.

    Raises:
        CheckpointError: as `verify_checkpoint`; or the model has a parameter that the architecture
            does not know, lacks one, or has one of another shape; or a value is not finite.
    """
    stored = _verified(Path(directory), architecture)
    with ExitStack() as stack, torch.no_grad():
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {tensor.file for tensor in stored.values()}
        }
        for name, parameter, entry in _bind(architecture, chunks):
            sources = _sources(entry, architecture, stored)
            values = [
                entry.transform.to_megatron(
                    [files[stored[source].file].get_slice(source) for source in names],
                    parameter.shape,
                    tp_rank,
                    tp_size,
                    architecture,
                )
                for names in sources
            ]
            if values[0].shape != parameter.shape:
                raise CheckpointError(
                    f"{directory}: {', '.join(sources[0])} give {name} the shape "
                    f"{list(values[0].shape)} on tensor-parallel rank {tp_rank} of {tp_size}, the "
                    f"model has {list(parameter.shape)}: build it from the checkpoint's config.json"
                )
            if any(not torch.equal(value, values[0]) for value in values[1:]):
                raise CheckpointError(
                    f"{directory}: {sources[0][0]} and {sources[1][0]} differ, but config.json "
                    "ties them: remove one of them, or set tie_word_embeddings to false"
                )
            if not values[0].isfinite().all():
                raise CheckpointError(
                    f"{directory}: {', '.join(sources[0])} holds NaN or infinity; the model cannot "
                    "be trained: take an undamaged checkpoint"
                )
            parameter.copy_(values[0])


def export_hf(
    directory_out: str | Path,
    source_dir: str | Path,
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    *,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    dp_rank: int,
) -> None:
    """Write the model as a Hugging Face directory, in the dtype of its parameters.

    Collective over both groups of data-parallel replica 0; other replicas return at once. Each
    pipeline stage writes one safetensors file from its first tensor-parallel rank, which holds the
    stage's weights in host memory. The directory appears complete or not at all.

    Args:
        directory_out: replaced if it is an earlier checkpoint directory; its parents are created.
        source_dir: where config.json, generation_config.json and the tokenizer are copied from.
        tp_group, pp_group: None stands for one rank.

    Raises:
        CheckpointError: on every rank of the replica, when any of them cannot write, or when the
            stages together do not make a complete checkpoint.
    """
    if dp_rank != 0:
        return
    out, source = Path(directory_out).absolute(), Path(source_dir)
    temporary = out.with_name(f".{out.name}.partial")
    tp_rank, _ = _place(tp_group)
    stage, num_stages = _place(pp_group)
    file = _SINGLE if num_stages == 1 else f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"
    writes, leads = tp_rank == 0, tp_rank == 0 and stage == 0

    try:
        bound: list[_Bound] = []
        problem = _attempt(bound.extend, _bind(architecture, chunks))
        if leads and not problem:
            problem = _attempt(_prepare, out, temporary, source)
        _agree(problem, tp_group, pp_group)

        tensors = _gather(architecture, bound, tp_group, keep=writes)
        problem = _attempt(_save, tensors, temporary / file) if writes else None
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        del tensors
        shards = _agree(problem, tp_group, pp_group, payload=(file, sizes))

        finish = (out, temporary, source, architecture, shards, bound[0][1].dtype)
        problem = _attempt(_finish, *finish) if leads else None
        _agree(problem, tp_group, pp_group)
    except CheckpointError:
        if leads:  # all ranks have reported, so none still writes there
            shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- Hugging Face side: which file holds which tensor, and is it what the architecture says -----


def _verified(directory: Path, architecture: Architecture) -> dict[str, _Stored]:
    """The stored tensors by name, or a CheckpointError that lists every problem."""
    problems: list[str] = []
    stored = _read_headers(directory, problems)
    family = family_of(architecture)
    expected = {
        name: shape
        for entry in family.entries(architecture)
        for name, shape in zip(entry.hf, entry.transform.hf_shapes(architecture), strict=True)
    }
    missing = [name for name in expected if name not in stored]
    if architecture.tie_word_embeddings and any(name in stored for name in family.tied):
        missing = [name for name in missing if name not in family.tied]
    if not problems:  # tensors of an unreadable file would all be reported
        problems += [
            f"{name} {list(expected[name])} is missing from {directory}" for name in missing
        ]
    for name, tensor in stored.items():
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
        if tensor.dtype not in _DTYPES:
            problems.append(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, must be one of "
                f"{', '.join(sorted(_DTYPES))}"
            )
    if problems:
        raise CheckpointError(
            f"{directory}: the weights do not fit config.json; download or export the checkpoint "
            "again:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return stored


def _read_headers(directory: Path, problems: list[str]) -> dict[str, _Stored]:
    """Tensors of the single file, else of the index's files; the order of transformers."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        return _read_header(single, problems)
    if not index.is_file():
        problems.append(f"neither {_SINGLE} nor {_INDEX} is there (other formats are not read)")
        return {}
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(placed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{index}: is not a safetensors index ({type(error).__name__}: {error})")
        return {}
    stored: dict[str, _Stored] = {}
    for file in files:
        if Path(file).name != file:
            problems.append(f"{index}: {file!r} is not the name of a file beside it")
            continue
        header = _read_header(directory / file, problems)
        for name, tensor in header.items():
            if placed.get(name) == file:
                stored[name] = tensor
            else:
                problems.append(f"{tensor.file}: {name} is not placed there by {_INDEX}")
    return stored


def _read_header(path: Path, problems: list[str]) -> dict[str, _Stored]:
    """What a safetensors file says it holds: 8 bytes of length, that much JSON, then the data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER:
                raise ValueError("no header; if it is a Git LFS pointer, run `git lfs pull`")
            text = file.read(length)
        if len(text) < length:
            problems.append(f"{path}: is cut off: {size} bytes, its header needs {8 + length}")
            return {}
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            problems.append(f"{path}: is cut off or damaged: {size} bytes, its header says {end}")
            return {}
        with safe_open(path, framework="pt"):  # the library's own checks of the header
            pass
        return {
            name: _Stored(path, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror or error})")
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        problems.append(f"{path}: is not a safetensors file ({type(error).__name__}: {error})")
    return {}


def _sources(
    entry: Entry, architecture: Architecture, stored: dict[str, _Stored]
) -> list[tuple[str, ...]]:
    """Names of the tensors that make an entry; a tied one may be stored under either name, or both.

    Both are then compared, since nothing says which of two different weights is meant.
    """
    tied = family_of(architecture).tied
    if architecture.tie_word_embeddings and entry.hf[0] in tied:
        return [(name,) for name in tied if name in stored]
    return [entry.hf]


# --- Megatron side: which parameter is which entry ----------------------------------------------


def _unwrap(chunk: Any) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _bind(architecture: Architecture, chunks: Sequence[nn.Module]) -> Iterator[_Bound]:
    """Global name, parameter and entry of each parameter, in an order equal on all TP ranks.

    Raises:
        CheckpointError: the parameters are not exactly those of the table for these layers.
    """
    family = family_of(architecture)
    expected: list[Entry] = []
    found: list[tuple[str, nn.Parameter]] = []
    for model in map(_unwrap, chunks):
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        expected += family.first if model.pre_process else ()
        expected += [e for layer in layers for e in family.of_layer(architecture, layer)]
        # The output layer of a tied model has its own copy only where the embedding is elsewhere.
        shared = architecture.tie_word_embeddings and model.pre_process
        expected += [
            entry
            for entry in family.last
            if model.post_process and not (shared and entry.hf[0] in family.tied)
        ]
        for name, parameter in model.named_parameters():
            prefix, _, rest = name.partition("decoder.layers.")
            if not prefix and rest:
                local, _, rest = rest.partition(".")
                name = f"decoder.layers.{layers[int(local)]}.{rest}"
            found.append((name, parameter))
    by_name = {name: entry for entry in expected for name in entry.megatron}
    bound = [by_name.get(name) for name, _ in found]
    unknown = [name for (name, _), entry in zip(found, bound, strict=True) if entry is None]
    problems = [f"{name} is a parameter that {family.name} does not have" for name in unknown]
    counts = Counter(bound)
    problems += [
        f"{entry.megatron[0]} must be one parameter of the model, found {counts[entry]}"
        for entry in dict.fromkeys(expected)
        if counts[entry] != 1
    ]
    if problems:
        raise CheckpointError(
            "the model was not built from this checkpoint's config.json:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    for (name, parameter), entry in zip(found, bound, strict=True):
        assert entry is not None
        yield name, parameter, entry


# --- Export -------------------------------------------------------------------------------------


def _gather(
    architecture: Architecture,
    bound: Sequence[_Bound],
    tp_group: dist.ProcessGroup | None,
    *,
    keep: bool,
) -> dict[str, Tensor]:
    """This stage's Hugging Face tensors on the CPU; one parameter at a time is gathered over TP."""
    family = family_of(architecture)
    _, tp_size = _place(tp_group)
    tensors: dict[str, Tensor] = {}
    for _, parameter, entry in bound:
        if architecture.tie_word_embeddings and entry.hf[0] == family.tied[1]:
            continue  # the copy of the embedding on the last stage
        shards = [parameter.detach()]
        if entry.transform.sharded and tp_size > 1:
            own = shards[0].contiguous()
            shards = [torch.empty_like(own) for _ in range(tp_size)]
            dist.all_gather(shards, own, group=tp_group)
        if keep:
            values = entry.transform.to_hf(shards, architecture)
            # Copies, since a view would keep or change with the storage that it is cut from.
            tensors |= {
                name: value.to("cpu", copy=True).contiguous()
                for name, value in zip(entry.hf, values, strict=True)
            }
    return tensors


def _prepare(out: Path, temporary: Path, source: Path) -> None:
    if source.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: holds the checkpoint the run started from; choose another")
    replaces = not out.exists() or (
        out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))
    )
    if not replaces:
        raise CheckpointError(f"{out}: exists and is no checkpoint; move it or choose another name")
    if temporary.exists():  # left by an export that was killed
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes the file the writer's alone; who serves the model may be somebody else.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _finish(
    out: Path,
    temporary: Path,
    source: Path,
    architecture: Architecture,
    shards: Sequence[tuple[str, dict[str, int]]],
    dtype: torch.dtype,
) -> None:
    """Add what makes the files a checkpoint, check it, and give it its name."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for _, sizes in shards)},
            "weight_map": {name: file for file, sizes in shards for name in sizes},
        }
        _write_json(temporary / _INDEX, index)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    _write_json(temporary / "config.json", config)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, temporary / name)
    verify_checkpoint(temporary, architecture)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- Groups -------------------------------------------------------------------------------------


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in a group, and the group's size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _attempt(function: Any, *args: Any) -> str | None:
    """Run `function`; what a user can mend comes back as a message, for all ranks to raise."""
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"the export cannot be written: {error}"
    return None


def _agree(
    problem: str | None,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    payload: Any = None,
) -> list[Any]:
    """Wait for every rank of the replica, and raise on all if one has a problem.

    Returns:
        The payloads of the pipeline stages, from this rank's column of them.
    """
    stages = _all_gather((problem, payload), pp_group)
    problems = [text for text, _ in stages if text]
    problems += [text for texts in _all_gather(problems, tp_group) for text in texts]
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    return [value for _, value in stages]


def _all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    _, size = _place(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values
