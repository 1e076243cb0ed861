"""Weights into and out of Megatron model chunks, in any TP / PP / VPP / EP / expert-TP layout.

In: a checkpoint behind `Weights`, and the chunks of one rank. Out: filled parameters
(`load_weights`), a Hugging Face directory (`export_hf`), or its tensors one after another
(`FullTensors`). The tables of `checkpoint.families` say what converts into what; this module finds
the parameter of each entry, and moves them one by one, so that memory holds one parameter besides
the model.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_drpo.checkpoint import hf, manifest
from megatron_drpo.checkpoint.families import Architecture, Entry, family_of
from megatron_drpo.errors import CheckpointError

Group = dist.ProcessGroup | None
"""None stands for one rank."""
ValueOf = Callable[[nn.Parameter], Tensor]
"""What is exported of a parameter."""


@dataclass(frozen=True)
class Places:
    """Where this rank stands among those that a model is spread over; by default it is alone.

    Each layer's experts are shared out in equal runs over `ep_size` ranks, and each expert is split
    over the ranks of `etp_group`. Whatever else is split is split over `tp_group`. The chunks
    themselves know their pipeline stage. Groups are needed by what is collective only.

    Example (the second of two ranks, each with half of everything but half of the experts whole):
        Places(tp_rank=1, tp_size=2, ep_rank=1, ep_size=2, tp_group=both, control_group=both)
    """

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    replica_rank: int = 0
    """Which copy of everything but the experts this is; copy 0 is what is exported."""
    edp_rank: int = 0
    """Which copy of its experts this is, likewise."""
    tp_group: Group = None
    etp_group: Group = None
    control_group: Group = None
    """All ranks, those of a stage one after the other and rank 0 in copy 0; for objects."""

    def split(self, entry: Entry) -> tuple[int, int]:
        """This rank's part of a parameter that is split, and the number of parts."""
        if entry.is_expert:
            return self.etp_rank, self.etp_size
        return self.tp_rank, self.tp_size

    def split_group(self, entry: Entry) -> Group:
        """The ranks that hold these parts, in their order."""
        return self.etp_group if entry.is_expert else self.tp_group

    def in_first_copy(self, entry: Entry) -> bool:
        """True if this rank's part of the parameter is exported."""
        return (self.edp_rank if entry.is_expert else self.replica_rank) == 0


def load_weights(
    weights: manifest.Weights,
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    places: Places,
) -> None:
    """Fill every parameter of this rank's chunks in place, from a checkpoint of either kind.

    Not collective. Values are rounded to the parameters' dtype; padded vocabulary rows become 0.
    An optimizer that keeps master weights must be built, or told to reload them, afterwards.

    Args:
        chunks: this rank's GPTModel chunks (several under VPP), bare or wrapped.
        places: of this rank; its groups are not used.

    Raises:
        CheckpointError: the model has a parameter that the architecture does not know, lacks one,
            or has one of another shape; a value is not finite; a tied weight is stored twice with
            different values.
    """
    with torch.no_grad():
        for bound in _bind(architecture, chunks, places):
            entry, parameter = bound.entry, bound.parameter
            part, parts = places.split(entry)
            value = entry.transform.to_megatron(
                weights.hf(entry), parameter.shape, part, parts, architecture
            )
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{weights.directory}: {', '.join(entry.hf)} give {bound.name} the shape "
                    f"{list(value.shape)} on tensor-parallel rank {part} of {parts}, the "
                    f"model has {list(parameter.shape)}: build it from the checkpoint's config.json"
                )
            if not value.isfinite().all():
                raise CheckpointError(
                    f"{weights.directory}: {', '.join(entry.hf)} holds NaN or infinity; the model "
                    "cannot be trained: take an undamaged checkpoint"
                )
            parameter.copy_(value)


def export_hf(
    directory_out: str | Path,
    source_dir: str | Path,
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    places: Places,
    *,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    run: str | None = None,
) -> None:
    """Write the model as a Hugging Face directory, in the dtype of its layers.

    Collective over all ranks. In the first copy of the model, the first of the ranks that split a
    parameter writes it, as soon as it is gathered, into files of its own; other ranks wait. The
    directory appears complete, with a manifest, or not at all; it must be on storage that the ranks
    share.

    Args:
        directory_out: replaced if it is an earlier checkpoint directory; its parents are created.
        source_dir: where config.json, generation_config.json and the tokenizer are copied from.
        max_shard_bytes: largest file; a tensor that is larger has one for itself.
        run: where the weights come from, for the manifest, such as "runs/gsm8k, step 40"; None:
            they are those of `source_dir`, trained.

    Raises:
        CheckpointError: on every rank, when any of them cannot write, or when the ranks together do
            not make a complete checkpoint.
    """
    out, source = Path(directory_out).absolute(), Path(source_dir)
    staging, group = hf.staging_of(out), places.control_group
    rank, _ = _place(group)

    writer = None
    try:
        bound: list[_Bound] = []
        problem = _attempt(_bind_exported, bound, architecture, chunks, places)
        if rank == 0 and not problem:
            problem = _attempt(hf.stage, out, source)
        value_of = _in_one_dtype(bound)
        tensors = _described(bound, architecture, places, value_of)
        if tensors:
            writer = _Writer(staging, tensors, max_shard_bytes)
        counts = dict(_agree(problem, group, writer and (rank, writer.num_files)))
        if writer:
            before = sum(count for other, count in counts.items() if other < rank)
            names = hf.file_names(sum(counts.values()))
            writer.file_names = names[before : before + writer.num_files]

        for name, value in _whole(bound, architecture, places, value_of):
            if writer and not problem:  # else go on, since the other ranks gather, too
                problem = _attempt(writer.write, name, value)
        written = _agree(problem, group, writer and (writer.records, writer.files))

        if rank == 0:
            dtype = value_of(bound[0].parameter).dtype
            problem = _attempt(_finish, out, source, architecture, written, dtype, run)
        _agree(problem, group)
    except CheckpointError:
        if writer:
            writer.abort()
        if rank == 0:  # all ranks have reported, so none still writes there
            shutil.rmtree(staging, ignore_errors=True)
        raise


class FullTensors:
    """The whole model as Hugging Face tensors, one after another on rank 0.

    What `export_hf` writes to files, for one receiver.

    Example, on every rank:
        tensors = FullTensors(architecture, chunks, places)
        for name, value in tensors.stream():  # nothing to iterate over but on rank 0
            send(name, value)
    """

    def __init__(
        self,
        architecture: Architecture,
        chunks: Sequence[nn.Module],
        places: Places,
        *,
        value_of: ValueOf | None = None,
    ) -> None:
        """Find out who holds what; collective over all ranks.

        Args:
            value_of: what stands for each parameter, of its shape, such as its gradient; by default
                its value as `export_hf` writes it.

        Raises:
            CheckpointError: on every rank, if the chunks are not of this architecture.
        """
        self._architecture, self._places = architecture, places
        self._rank, _ = _place(places.control_group)
        bound: list[_Bound] = []
        problem = _attempt(_bind_exported, bound, architecture, chunks, places)
        self._value_of = value_of or _in_one_dtype(bound)
        # First what every rank of a tensor-parallel group takes part in, then the experts: who
        # waits for rank 0 to receive an expert keeps nobody waiting for a part of something else.
        self._parts = (
            [each for each in bound if not each.entry.is_expert],
            [each for each in bound if each.entry.is_expert],
        )
        own = [_described(part, architecture, places, self._value_of) for part in self._parts]
        held = _agree(problem, places.control_group, (self._rank, own))
        self._held: list[list[tuple[int, dict[str, hf.Described]]]] = [
            [(rank, parts[number]) for rank, parts in held] for number in range(len(self._parts))
        ]

    @property
    def described(self) -> dict[str, hf.Described]:
        """dtype and shape of every tensor, in the order of `stream`; the same on every rank."""
        return {
            name: each for part in self._held for _, held in part for name, each in held.items()
        }

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor, on rank 0; elsewhere nothing.

        Collective, in the default group: every rank must go through to the end, rank 0 even if it
        has no more use for the values. They are contiguous and on the parameters' device; some are
        the parameters themselves.
        """
        for bound, held in zip(self._parts, self._held, strict=True):
            for name, value in _whole(bound, self._architecture, self._places, self._value_of):
                value = value.contiguous()
                if self._rank == 0:
                    yield name, value
                else:
                    dist.send(value, 0)
            if self._rank == 0:
                yield from self._received(held)

    def _received(
        self, held: Sequence[tuple[int, dict[str, hf.Described]]]
    ) -> Iterator[tuple[str, Tensor]]:
        """What the other ranks send, in their order."""
        device = self._parts[0][0].parameter.device
        for source, tensors in held:
            for name, (dtype, shape) in tensors.items() if source else ():
                value = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(value, source)
                yield name, value


# --- Which parameter is which entry -------------------------------------------------------------


@dataclass(frozen=True)
class _Bound:
    name: str
    """With the numbers of layer and expert in the whole model."""
    parameter: nn.Parameter
    entry: Entry


def _bind(architecture: Architecture, chunks: Sequence[nn.Module], places: Places) -> list[_Bound]:
    """The entry of each parameter, in an order equal on all ranks of a stage.

    Raises:
        CheckpointError: the parameters are not exactly those of the table for these layers.
    """
    family = family_of(architecture)
    count: Counter[Entry] = Counter()
    bound: list[_Bound] = []
    problems: list[str] = []
    for model in map(_unwrap, chunks):
        known: dict[str, tuple[str, Entry]] = {}
        for entry, local_names in _entries(model, architecture, places):
            count[entry] += 0  # expected, if only once a parameter is found
            known |= {
                local: (name, entry)
                for local, name in zip(local_names, entry.megatron, strict=True)
            }
        for local, parameter in model.named_parameters():
            if local in known:
                name, entry = known[local]
                count[entry] += 1
                bound.append(_Bound(name, parameter, entry))
            else:
                problems.append(f"{local} is a parameter that {family.name} does not have")
    problems += [
        f"{entry.megatron[0]} must be one parameter of the model, found {number}"
        for entry, number in count.items()
        if number != 1
    ]
    if problems:
        raise CheckpointError(
            "the model was not built from this checkpoint's config.json:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return bound


def _entries(
    model: Any, architecture: Architecture, places: Places
) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """Each entry of a chunk, and the names that its parameter may have there.

    Those are numbered from the chunk's first layer and from this rank's first expert.
    """
    family = family_of(architecture)
    if model.pre_process:
        yield from ((entry, entry.megatron) for entry in family.first)
    num_experts = architecture.num_experts // places.ep_size
    for number, layer in enumerate(model.decoder.layers):
        for entry in family.layer:
            for expert in range(num_experts) if entry.is_expert else (None,):
                whole = None if expert is None else places.ep_rank * num_experts + expert
                yield entry.at(layer.layer_number - 1, whole), entry.at(number, expert).megatron
    if model.post_process:
        # The output layer of a tied model has its own copy only where the embedding is elsewhere.
        shared = architecture.tie_word_embeddings and model.pre_process
        for entry in family.last:
            if not (shared and entry.hf[0] in family.tied):
                yield entry, entry.megatron


def _unwrap(chunk: Any) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


# --- Export -------------------------------------------------------------------------------------


def _bind_exported(
    bound: list[_Bound], architecture: Architecture, chunks: Sequence[nn.Module], places: Places
) -> None:
    """Append the parameters that this rank holds a part of in the copy that is exported."""
    family = family_of(architecture)
    copy = family.tied[1] if architecture.tie_word_embeddings else None
    bound += [
        each
        for each in _bind(architecture, chunks, places)
        if places.in_first_copy(each.entry) and each.entry.hf[0] != copy
    ]


def _in_one_dtype(bound: Sequence[_Bound]) -> ValueOf:
    """Values rounded to the dtype of the layers, where an output layer is kept in fp32."""
    dtypes = {each.parameter.dtype for each in bound} or {torch.float32}
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)

    def value_of(parameter: nn.Parameter) -> Tensor:
        value = parameter.detach()
        # A subclass of Tensor is Transformer Engine's, which holds FP8 numbers and their scales.
        return (value if type(value) is Tensor else value.dequantize()).to(narrow)

    return value_of


def _described(
    bound: Sequence[_Bound], architecture: Architecture, places: Places, value_of: ValueOf
) -> dict[str, hf.Described]:
    """dtype and shape of the tensors that `_whole` makes of these parameters here, in its order."""
    return {
        name: (value_of(each.parameter).dtype, shape)
        for each in bound
        if places.split(each.entry)[0] == 0
        for name, shape in zip(
            each.entry.hf, each.entry.transform.hf_shapes(architecture), strict=True
        )
    }


def _whole(
    bound: Sequence[_Bound], architecture: Architecture, places: Places, value_of: ValueOf
) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor of these parameters, on the first rank that has a part of it.

    Collective over the ranks that do; the parts of one parameter are held at a time.
    """
    for each in bound:
        shards = _gather(each, places, value_of)
        if places.split(each.entry)[0] == 0:
            values = each.entry.transform.to_hf(shards, architecture)
            yield from zip(each.entry.hf, values, strict=True)
            del values  # or they would be held while the next parameter is gathered


def _gather(bound: _Bound, places: Places, value_of: ValueOf) -> list[Tensor]:
    """The parameter's shards of all ranks that split it, in their order."""
    own = value_of(bound.parameter)
    _, size = places.split(bound.entry)
    if size == 1 or not bound.entry.transform.sharded:
        return [own]
    shards = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(shards, own.contiguous(), group=places.split_group(bound.entry))
    return shards


class _Writer:
    """The files of one rank, written one after another."""

    def __init__(self, staging: Path, tensors: Mapping[str, hf.Described], max_bytes: int) -> None:
        self._staging, self._tensors = staging, tensors
        self._plan = hf.plan_files(tensors, max_bytes)
        self._file: hf.SafetensorsFile | None = None
        self.num_files = len(self._plan)
        self.file_names: Sequence[str] = ()
        """To be set before the first `write`."""
        self.records: dict[str, manifest.TensorRecord] = {}
        self.files: dict[str, str] = {}
        """Name of the file of each tensor."""
        self._closed = 0

    def write(self, name: str, value: Tensor) -> None:
        """Write the next tensor."""
        if self._file is None:
            path = self._staging / self.file_names[self._closed]
            tensors = {name: self._tensors[name] for name in self._plan[self._closed]}
            self._file = hf.SafetensorsFile(path, tensors)
        sha256 = self._file.write(name, value)
        dtype, shape = self._tensors[name]
        self.records[name] = manifest.TensorRecord(shape, manifest.dtype_name(dtype), sha256)
        self.files[name] = self._file.path.name
        if name == self._plan[self._closed][-1]:
            self._file.close()
            self._file = None
            self._closed += 1

    def abort(self) -> None:
        """Leave no unfinished file."""
        if self._file:
            self._file.abort()


def _finish(
    out: Path,
    source: Path,
    architecture: Architecture,
    written: Sequence[tuple[dict[str, manifest.TensorRecord], dict[str, str]]],
    dtype: torch.dtype,
    run: str | None,
) -> None:
    """Add what makes the files a checkpoint, check it, and give it its name."""
    staging = hf.staging_of(out)
    records = {name: record for tensors, _ in written for name, record in tensors.items()}
    files = {name: file for _, names in written for name, file in names.items()}
    sizes = (hf.num_bytes(getattr(torch, r.dtype), r.shape) for r in records.values())
    hf.write_index(staging, files, sum(sizes))
    hf.copy_settings(source, staging, dtype)
    manifest.write_manifest(
        staging,
        manifest.Manifest(
            kind="hf",
            architecture=manifest.describe_architecture(
                replace(architecture, hf_dtype=manifest.dtype_name(dtype))
            ),
            config_sha256=manifest.file_digest(staging / "config.json"),
            source=manifest.Source(
                kind="training run",
                path=run or str(source.resolve()),
                config_sha256=manifest.file_digest(source / "config.json"),
                tensors={},
            ),
            tensors=records,
            versions=manifest.versions(),
        ),
    )
    hf.verify_checkpoint(staging, architecture)
    hf.publish(staging, out)


# --- Groups -------------------------------------------------------------------------------------


def _place(group: Group) -> tuple[int, int]:
    """This rank's number in a group, and the group's size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _attempt(function: Callable[..., Any], *args: Any) -> str | None:
    """Run `function`; what a user can mend comes back as a message, for all ranks to raise."""
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"the export cannot be written: {error}"
    return None


def _agree(problem: str | None, group: Group, payload: Any = None) -> list[Any]:
    """Wait for every rank of the group, and raise on all if one has a problem.

    Returns:
        The payloads that are not None, in the order of ranks.
    """
    found: list[Any] = [(problem, payload)]
    _, size = _place(group)
    if size > 1:
        found = [None] * size
        dist.all_gather_object(found, (problem, payload), group=group)
    problems = [text for text, _ in found if text]
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    return [value for _, value in found if value is not None]
