"""Weights into and out of Megatron model chunks, in any TP / PP / VPP / EP layout.

In: a checkpoint behind `Weights`, and the chunks of one rank. Out: filled parameters
(`load_weights`), a Hugging Face directory (`export_hf`), or its tensors one after another
(`FullTensors`). The tables of `checkpoint.families` say what converts into what; this module finds
the parameter of each entry, and moves them one by one, so that memory holds one parameter besides
the model.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


def load_weights(
    weights: manifest.Weights,
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    *,
    tp_rank: int,
    tp_size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> None:
    """Fill every parameter of this rank's chunks in place, from a checkpoint of either kind.

    Not collective. Values are rounded to the parameters' dtype; padded vocabulary rows become 0.
    An optimizer that keeps master weights must be built, or told to reload them, afterwards.

    Args:
        chunks: this rank's GPTModel chunks (several under VPP), bare or wrapped.
        tp_rank, tp_size: this rank's place in its tensor-parallel group.
        ep_rank, ep_size: this rank's place in its expert-parallel group, which splits the experts
            of each layer into equal runs.

    Raises:
        CheckpointError: the model has a parameter that the architecture does not know, lacks one,
            or has one of another shape; a value is not finite; a tied weight is stored twice with
            different values.
    """
    with torch.no_grad():
        for bound in _bind(architecture, chunks, ep_rank, ep_size):
            entry, parameter = bound.entry, bound.parameter
            value = entry.transform.to_megatron(
                weights.hf(entry), parameter.shape, tp_rank, tp_size, architecture
            )
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{weights.directory}: {', '.join(entry.hf)} give {bound.name} the shape "
                    f"{list(value.shape)} on tensor-parallel rank {tp_rank} of {tp_size}, the "
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
    *,
    tp_group: Group,
    pp_group: Group,
    ep_group: Group = None,
    dp_rank: int,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    run: str | None = None,
) -> None:
    """Write the model as a Hugging Face directory, in the dtype of its parameters.

    Collective over the groups of data-parallel replicas 0 to ep_size - 1, which together hold every
    expert once; other replicas return at once. The first tensor-parallel rank of each pipeline
    stage and expert-parallel rank writes files of its own, each parameter as soon as it is
    gathered. The directory appears complete, with a manifest, or not at all; it must be on storage
    that these ranks share.

    Args:
        directory_out: replaced if it is an earlier checkpoint directory; its parents are created.
        source_dir: where config.json, generation_config.json and the tokenizer are copied from.
        dp_rank: this rank's data-parallel replica.
        max_shard_bytes: largest file; a tensor that is larger has one for itself.
        run: where the weights come from, for the manifest, such as "runs/gsm8k, step 40"; None:
            they are those of `source_dir`, trained.

    Raises:
        CheckpointError: on every rank of these replicas, when any of them cannot write, or when the
            ranks together do not make a complete checkpoint.
    """
    tp_rank, _ = _place(tp_group)
    ep_rank, ep_size = _place(ep_group)
    stage, _ = _place(pp_group)
    if dp_rank >= ep_size:
        return
    out, source = Path(directory_out).absolute(), Path(source_dir)
    staging = hf.staging_of(out)
    writes = tp_rank == 0
    leads = writes and stage == 0 and ep_rank == 0
    # TP last: the ranks of the others are then in the order of stages, and within them of EP.
    groups = (ep_group, pp_group, tp_group)

    writer = None
    try:
        bound: list[_Bound] = []
        problem = _attempt(_bind_exported, bound, architecture, chunks, ep_rank, ep_size)
        if leads and not problem:
            problem = _attempt(hf.stage, out, source)
        if writes:
            writer = _Writer(staging, architecture, bound, max_shard_bytes)
        counts = _agree(problem, groups, writer and writer.num_files)
        if writer:
            before = sum(counts[: stage * ep_size + ep_rank])
            writer.file_names = hf.file_names(sum(counts))[before : before + writer.num_files]

        for name, value in _whole(bound, architecture, tp_group):
            if writer and not problem:  # else go on, since the other ranks gather, too
                problem = _attempt(writer.write, name, value)
        written = _agree(problem, groups, writer and (writer.records, writer.files))

        if leads:
            dtype = bound[0].parameter.dtype
            problem = _attempt(_finish, out, source, architecture, written, dtype, run)
        _agree(problem, groups)
    except CheckpointError:
        if writer:
            writer.abort()
        if leads:  # all ranks have reported, so none still writes there
            shutil.rmtree(staging, ignore_errors=True)
        raise


class FullTensors:
    """The whole model as Hugging Face tensors, one after another on rank 0, in their own dtype.

    What `export_hf` writes to files, for one receiver.

    Example, on every rank:
        tensors = FullTensors(architecture, chunks, tp_group=tp, world=world, dp_rank=dp_rank)
        for name, value in tensors.stream():  # nothing to iterate over but on rank 0
            send(name, value)
    """

    def __init__(
        self,
        architecture: Architecture,
        chunks: Sequence[nn.Module],
        *,
        tp_group: Group,
        ep_group: Group = None,
        world: Group,
        dp_rank: int,
    ) -> None:
        """Find out who holds what; collective over `world`.

        Args:
            world: all ranks, on the device of the parameters; its rank 0 receives.
            dp_rank: this rank's data-parallel replica; replicas 0 to ep_size - 1 send.

        Raises:
            CheckpointError: on every rank, if the chunks are not of this architecture.
        """
        self._architecture, self._tp_group, self._world = architecture, tp_group, world
        ep_rank, ep_size = _place(ep_group)
        self._bound: list[_Bound] = []
        problem = None
        if dp_rank < ep_size:
            problem = _attempt(_bind_exported, self._bound, architecture, chunks, ep_rank, ep_size)
        own = _described(self._bound, architecture) if _place(tp_group)[0] == 0 else {}
        self._held: list[dict[str, hf.Described]] = _agree(problem, (world,), own)

    @property
    def described(self) -> dict[str, hf.Described]:
        """dtype and shape of every tensor, in the order of `stream`; the same on every rank."""
        return {name: each for held in self._held for name, each in held.items()}

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor, on rank 0 of `world`; elsewhere nothing.

        Collective: every rank must go through to the end, rank 0 even if it has no more use for
        the values. They are contiguous and on the parameters' device; some are the parameters
        themselves.
        """
        rank, _ = _place(self._world)
        own = _whole(self._bound, self._architecture, self._tp_group)
        for name, value in own:
            value = value.contiguous()
            if rank == 0:
                yield name, value
            else:
                dist.send(value, group=self._world, group_dst=0)
        if rank == 0:
            device = self._bound[0].parameter.device
            for source, held in enumerate(self._held[1:], start=1):
                for name, (dtype, shape) in held.items():
                    value = torch.empty(shape, dtype=dtype, device=device)
                    dist.recv(value, group=self._world, group_src=source)
                    yield name, value


# --- Which parameter is which entry -------------------------------------------------------------


@dataclass(frozen=True)
class _Bound:
    name: str
    """With the numbers of layer and expert in the whole model."""
    parameter: nn.Parameter
    entry: Entry


def _bind(
    architecture: Architecture, chunks: Sequence[nn.Module], ep_rank: int, ep_size: int
) -> list[_Bound]:
    """The entry of each parameter, in an order equal on all TP ranks.

    Raises:
        CheckpointError: the parameters are not exactly those of the table for these layers.
    """
    family = family_of(architecture)
    count: Counter[Entry] = Counter()
    bound: list[_Bound] = []
    problems: list[str] = []
    for model in map(_unwrap, chunks):
        known: dict[str, tuple[str, Entry]] = {}
        for entry, local_names in _entries(model, architecture, ep_rank, ep_size):
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
    model: Any, architecture: Architecture, ep_rank: int, ep_size: int
) -> Iterator[tuple[Entry, tuple[str, ...]]]:
    """Each entry of a chunk, and the names that its parameter may have there.

    Those are numbered from the chunk's first layer and from this rank's first expert.
    """
    family = family_of(architecture)
    if model.pre_process:
        yield from ((entry, entry.megatron) for entry in family.first)
    num_experts = architecture.num_experts // ep_size
    for number, layer in enumerate(model.decoder.layers):
        for entry in family.layer:
            for expert in range(num_experts) if entry.is_expert else (None,):
                whole = None if expert is None else ep_rank * num_experts + expert
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
    bound: list[_Bound],
    architecture: Architecture,
    chunks: Sequence[nn.Module],
    ep_rank: int,
    ep_size: int,
) -> None:
    """Append what this rank's expert-parallel rank exports: experts, and the first one the rest."""
    family = family_of(architecture)
    copy = family.tied[1] if architecture.tie_word_embeddings else None
    bound += [
        each
        for each in _bind(architecture, chunks, ep_rank, ep_size)
        if (ep_rank == 0 or each.entry.is_expert) and each.entry.hf[0] != copy
    ]


def _described(bound: Sequence[_Bound], architecture: Architecture) -> dict[str, hf.Described]:
    """dtype and shape of the tensors that `_whole` makes of these parameters, in its order."""
    return {
        name: (each.parameter.dtype, shape)
        for each in bound
        for name, shape in zip(
            each.entry.hf, each.entry.transform.hf_shapes(architecture), strict=True
        )
    }


def _whole(
    bound: Sequence[_Bound], architecture: Architecture, tp_group: Group
) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor of these parameters, on the first TP rank; on others nothing.

    Collective over `tp_group`; the shards of one parameter are held at a time.
    """
    for each in bound:
        shards = _gather(each, tp_group)
        if _place(tp_group)[0] == 0:
            values = each.entry.transform.to_hf(shards, architecture)
            yield from zip(each.entry.hf, values, strict=True)
            del values  # or they would be held while the next parameter is gathered


def _gather(bound: _Bound, tp_group: Group) -> list[Tensor]:
    """The parameter's shards of all TP ranks, in their order."""
    own = bound.parameter.detach()
    _, tp_size = _place(tp_group)
    if tp_size == 1 or not bound.entry.transform.sharded:
        return [own]
    shards = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(tp_size)]
    dist.all_gather(shards, own.contiguous(), group=tp_group)
    return shards


class _Writer:
    """The files of one pipeline stage and expert-parallel rank, written one after another."""

    def __init__(
        self,
        staging: Path,
        architecture: Architecture,
        bound: Sequence[_Bound],
        max_bytes: int,
    ) -> None:
        self._staging = staging
        self._tensors = _described(bound, architecture)
        self._plan = hf.plan_files(self._tensors, max_bytes)
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


def _agree(problem: str | None, groups: Sequence[Group], payload: Any = None) -> list[Any]:
    """Wait for every rank of all groups together, and raise on all if one has a problem.

    Returns:
        The payloads that are not None, in the order of ranks; the first group's vary fastest.
    """
    found = [(problem, payload)]
    for group in groups:
        found = [pair for pairs in _all_gather(found, group) for pair in pairs]
    problems = [text for text, _ in found if text]
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    return [value for _, value in found if value is not None]


def _all_gather(value: Any, group: Group) -> list[Any]:
    _, size = _place(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values
