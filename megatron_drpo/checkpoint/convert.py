"""Hugging Face directory <-> Megatron checkpoint: streaming, resumable, and accounted for.

In: a checkpoint of one kind. Out: a directory of the other, complete with settings, tokenizer and
`manifest.json`. The unit of work is one entry of the family's table: its tensors are read,
converted, written and forgotten, so that memory does not grow with the model; `workers` threads
each hold one entry. Whatever is read or written is hashed on the way.

    .OUT.partial        locked by who works there
        journal.jsonl   a line of settings, then one per entry that is done: what `resume` continues
        result/         made and verified here, then renamed to OUT
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_drpo.checkpoint.families import (
    Architecture,
    Entry,
    differences,
    family_of,
    read_architecture,
)
from megatron_drpo.checkpoint.hf import (
    MAX_SHARD_BYTES,
    HfWeights,
    SafetensorsFile,
    copy_settings,
    file_names,
    num_bytes,
    plan_files,
    publish,
    staging_of,
    write_index,
)
from megatron_drpo.checkpoint.manifest import (
    FILE,
    Manifest,
    Source,
    TensorRecord,
    Weights,
    describe_architecture,
    digest,
    file_digest,
    read_manifest,
    record,
    versions,
    write_manifest,
)
from megatron_drpo.checkpoint.resume import STATE, damaged_files, read_state
from megatron_drpo.checkpoint.torch_dist import (
    METADATA,
    Chunk,
    MegatronWeights,
    TorchDistReader,
    TorchDistWriter,
    find_torch_dist,
    open_weights,
    stored_entries,
)
from megatron_drpo.errors import CheckpointError

JOURNAL, RESULT = "journal.jsonl", "result"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""Of file systems that cannot lock."""

Progress = Callable[[int], None]
"""Called, always by the same thread, with the bytes of tensors done since the last call."""

Verify = Callable[[Weights, Weights, Manifest], Mapping[str, Any]]
"""Proves a result before it is published: called with the source, the result and its manifest.

Returns what `Manifest.verified` shall hold. A VerificationError condemns the result, and it is
deleted; after any other exception it stays, and `resume` comes back to the proof.
"""


class VerificationError(CheckpointError):
    """A conversion's result is not what it must be."""


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def hf_to_megatron(
    hf: str | Path,
    out: str | Path,
    *,
    tp_size: int = 1,
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
    verify: Verify | None = None,
) -> Manifest:
    """Convert a Hugging Face directory to a torch_dist checkpoint that loads under any layout.

    OUT also receives config.json, generation config and tokenizer files, so that it stands for
    itself, and `manifest.json`. It appears complete or not at all.

    Args:
        hf: config.json and safetensors.
        out: must not exist, or be empty.
        tp_size: chunks are cut where this tensor-parallel size cuts, so that each of its ranks
            reads only its own bytes. Other sizes read the same checkpoint.
        workers: threads.
        resume: continue what an interrupted conversion to `out` left behind, if it left anything.
        progress: told of the source's tensors.
        verify: proves the result before it appears.

    Raises:
        VerificationError: `verify` says so; nothing is left of the result.
        CheckpointError: the source is not what config.json or its own manifest says, holds NaN or
            infinity, or cannot be read; `out` exists, cannot be written, or was begun from
            something else.
    """
    architecture = read_architecture(hf)
    with HfWeights(hf, architecture) as source:

        def target(staging: Path, claimed: Sequence[_Done]) -> _Target:
            return _ToMegatron(source, staging, architecture, tp_size, claimed, workers)

        job = _Job(source, source.directory, architecture, {"tensor_model_parallel_size": tp_size})
        return _convert(job, Path(out), target, workers, resume, progress, verify)


def megatron_to_hf(
    megatron: str | Path,
    out: str | Path,
    *,
    settings: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
    verify: Verify | None = None,
) -> Manifest:
    """Convert a torch_dist checkpoint, saved under any layout, to a Hugging Face directory.

    Optimizer states and random states in it are passed over. config.json says the dtype that the
    weights have. OUT appears complete or not at all.

    Args:
        megatron: as `torch_dist.find_torch_dist` takes it.
        settings: directory of config.json and the tokenizer; None: the checkpoint's own.
        max_shard_bytes: largest safetensors file.
        out, workers, progress, verify: as in `hf_to_megatron`.
        resume: as in `hf_to_megatron`; of the safetensors files, those that were whole stay.

    Raises:
        VerificationError: as in `hf_to_megatron`.
        CheckpointError: as in `hf_to_megatron`, or there is no config.json, or `settings` and the
            checkpoint's own are of different models.
    """
    # Once: a run that is still going moves its newest checkpoint.
    own = find_torch_dist(megatron) or Path(megatron)
    beside = Path(settings or own)
    architecture = read_architecture(beside)
    if beside != own and (own / "config.json").is_file():
        differ = differences(architecture, read_architecture(own))
        if differ:
            raise CheckpointError(
                f"--hf {beside}: its config.json is of another model than that of {own}: "
                f"{', '.join(differ)}; give the model that the checkpoint is of, or drop --hf"
            )
    with MegatronWeights(own, architecture) as source:

        def target(staging: Path, claimed: Sequence[_Done]) -> _Target:
            return _ToHf(source, staging, architecture, max_shard_bytes, claimed, workers)

        job = _Job(source, beside, architecture, {"max_shard_bytes": max_shard_bytes})
        return _convert(job, Path(out), target, workers, resume, progress, verify)


def verify_round_trip(
    source: Weights,
    result: Weights,
    architecture: Architecture,
    manifest: Manifest,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Read a conversion's result back from disk and convert it back: it must be the source.

    Every tensor of the result is read once and compared, by SHA-256, with what was written; what it
    converts back to is compared with what was read. The source's values are not read again.

    Args:
        manifest: of the conversion.
        workers: threads.
        progress: told of the result's tensors.

    Raises:
        VerificationError: names every tensor that differs, is missing or is left over.
        CheckpointError: the result cannot be read.
    """
    family = family_of(architecture)
    before, after = manifest.source.tensors, manifest.tensors
    problems = [
        *_unaccounted(source, before, "the source"),
        *_unaccounted(result, after, "the result"),
    ]

    def check(entry: Entry) -> tuple[int, list[str]]:
        tied = architecture.tie_word_embeddings and entry.hf[0] in family.tied
        if result.kind == "megatron":
            whole = result.load(entry.name)
            hf = entry.transform.to_hf([whole], architecture)
            stored = before
        else:
            hf = result.hf(entry)
            whole = _whole(entry, hf, architecture)
            stored = after
        sha256, parts = _digests(whole, hf)
        names = [n for n in family.tied if n in stored][: len(hf)] if tied else entry.hf
        megatron, other = (after, before) if result.kind == "megatron" else (before, after)
        found = [(megatron, entry.name, record(whole, sha256))]
        pairs = zip(names, hf, parts, strict=True)
        found += [(other, name, record(tensor, part)) for name, tensor, part in pairs]
        wrong = [
            f"{name} is not what was {'written' if expected is after else 'read'}"
            for expected, name, record in found
            if name in expected and expected[name] != record
        ]
        return whole.nbytes, wrong

    for size, wrong in _each(workers, check, stored_entries(architecture)):
        problems += wrong
        if progress:
            progress(size)
    if problems:
        raise VerificationError(
            f"{result.directory}: converting it back does not give {manifest.source.path}; do not "
            "use it: check the disk, and convert again:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


# --- The two targets ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """One entry that is converted; a line of the journal."""

    entry: str
    """`Entry.name`."""
    source: Mapping[str, TensorRecord]
    """What was read, by name."""
    result: Mapping[str, TensorRecord]
    """What was written, by name."""
    chunks: tuple[Chunk, ...] = ()
    """Of a Megatron checkpoint: where the result lies."""


class _Target(Protocol):
    """What a conversion writes."""

    kind: str
    done: dict[str, _Done]
    """By entry: what was claimed to be written already, and is found to be as claimed."""

    @property
    def not_carried(self) -> Mapping[str, str]:
        """As in `manifest.Source`."""
        ...

    @property
    def settings_dtype(self) -> torch.dtype | None:
        """What config.json has to say; None: what the source's says."""
        ...

    def convert(self, entry: Entry) -> _Done: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


class _ToMegatron:
    kind = "megatron"
    settings_dtype = None

    def __init__(
        self,
        source: HfWeights,
        staging: Path,
        architecture: Architecture,
        tp_size: int,
        claimed: Sequence[_Done],
        workers: int,
    ) -> None:
        self._source, self._staging = source, staging
        self._architecture, self._tp_size = architecture, tp_size
        self._entries = {entry.name: entry for entry in stored_entries(architecture)}
        found = _each(workers, lambda claim: (claim, self._holds(claim)), claimed)
        self.done = {claim.entry: claim for claim, holds in found if holds}
        chunks = [chunk for done in self.done.values() for chunk in done.chunks]
        self._writer = TorchDistWriter(staging, chunks)
        self.not_carried = {
            name: f"tied to {first}, and equal"
            for entry in self._entries.values()
            for first, *others in [source.names(entry)]
            for name in others[len(entry.hf) - 1 :]
        }

    def convert(self, entry: Entry) -> _Done:
        architecture, names = self._architecture, self._source.names(entry)
        hf = self._source.hf(entry)
        _refuse_not_finite(self._source, names, hf)
        whole = _whole(entry, hf, architecture)
        sha256, parts = _digests(whole, hf)
        records = {name: record(t, part) for name, t, part in zip(names, hf, parts, strict=False)}
        for name in names[len(hf) :]:
            tensor = self._source.load(name)
            records[name] = record(tensor)
        counts = (architecture.num_layers, architecture.num_experts)[: len(entry.index)]
        dim, bounds = entry.transform.cuts(architecture, self._tp_size)
        chunks = []
        for start, stop in pairwise(bounds):
            offsets = [0] * whole.dim()
            offsets[dim] = start
            chunks.append(
                self._writer.add(
                    entry.key,
                    (*counts, *whole.shape),
                    (*entry.index, *offsets),
                    whole.narrow(dim, start, stop - start)[(None,) * len(counts)],
                )
            )
        result = {entry.name: record(whole, sha256)}
        return _Done(entry.name, records, result, tuple(chunks))

    def _holds(self, claim: _Done) -> bool:
        """Whether what was written is there, and is what it was."""
        entry = self._entries[claim.entry]
        try:
            reader = TorchDistReader(self._staging, claim.chunks)
            tensor = reader.read(entry.key, entry.index)
            reader.close()
        except CheckpointError:
            return False
        return claim.result == {entry.name: record(tensor)}

    def finish(self) -> None:
        arguments = megatron_arguments(self._architecture, self._tp_size)
        self._writer.finish(
            {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
        )

    def abort(self) -> None:
        pass


class _ToHf:
    kind = "hf"
    not_carried: Mapping[str, str] = {}

    def __init__(
        self,
        source: MegatronWeights,
        staging: Path,
        architecture: Architecture,
        max_shard_bytes: int,
        claimed: Sequence[_Done],
        workers: int,
    ) -> None:
        self._source, self._staging, self._architecture = source, staging, architecture
        self._described = {
            name: (source.tensors[entry.name][0], shape)
            for entry in stored_entries(architecture)
            for name, shape in zip(entry.hf, entry.transform.hf_shapes(architecture), strict=True)
        }
        plan = plan_files(self._described, max_shard_bytes)
        self._plan = dict(zip(file_names(len(plan)), plan, strict=True))
        self._file_of = {name: file for file, names in self._plan.items() for name in names}
        self._lock = threading.Lock()
        self._open: dict[str, SafetensorsFile] = {}

        records = {name: record for done in claimed for name, record in done.result.items()}
        checked = _each(workers, lambda file: (file, self._holds(file, records)), self._plan)
        self._kept = {file for file, holds in checked if holds}
        self._left = {file: len(names) for file, names in self._plan.items()}
        self.done = {
            done.entry: done
            for done in claimed
            if all(self._file_of[name] in self._kept for name in done.result)
        }

        sizes: dict[torch.dtype, int] = {}
        for dtype, shape in self._described.values():
            sizes[dtype] = sizes.get(dtype, 0) + num_bytes(dtype, shape)
        self.settings_dtype = max(sizes, key=lambda dtype: sizes[dtype])

    def convert(self, entry: Entry) -> _Done:
        whole = self._source.load(entry.name)
        _refuse_not_finite(self._source, [entry.name], [whole])
        tensors = entry.transform.to_hf([whole], self._architecture)
        pairs = zip(entry.hf, tensors, strict=True)
        result = {name: record(tensor, self._write(name, tensor)) for name, tensor in pairs}
        copied = _is_same(whole, tensors)
        sha256 = result[entry.hf[0]].sha256 if copied else digest(whole)
        return _Done(entry.name, {entry.name: record(whole, sha256)}, result)

    def _write(self, name: str, tensor: Tensor) -> str:
        file = self._file_of[name]
        if file in self._kept:  # the entry's other tensors are in a file that was not whole
            return digest(tensor)
        with self._lock:
            if file not in self._open:
                described = {name: self._described[name] for name in self._plan[file]}
                self._open[file] = SafetensorsFile(self._staging / file, described)
            opened = self._open[file]
        sha256 = opened.write(name, tensor)
        with self._lock:
            self._left[file] -= 1
            whole = self._left[file] == 0
            if whole:
                del self._open[file]
        if whole:
            opened.close()
        return sha256

    def _holds(self, file: str, records: Mapping[str, TensorRecord]) -> bool:
        """Whether all of a file was written, and is what it was."""
        names = self._plan[file]
        if not all(name in records for name in names) or not (self._staging / file).is_file():
            return False
        try:
            with safe_open(self._staging / file, framework="pt") as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    if records[name] != record(tensor):
                        return False
        except (OSError, SafetensorError):
            return False
        return True

    def finish(self) -> None:
        total = sum(num_bytes(*described) for described in self._described.values())
        write_index(self._staging, self._file_of, total)

    def abort(self) -> None:
        for file in self._open.values():
            file.abort()


def megatron_arguments(architecture: Architecture, tp_size: int) -> dict[str, Any]:
    """What Megatron-LM reads from a checkpoint's `args`, under its own names.

    It compares some of them with its command line, and takes all with `--use-checkpoint-args`.
    """
    moe = architecture.num_experts > 0
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "max_position_embeddings": architecture.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": architecture.rotary_base,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": architecture.norm_epsilon,
        "qk_layernorm": architecture.qk_layernorm,
        "swiglu": True,
        "add_bias_linear": architecture.add_bias_linear,
        "add_qkv_bias": architecture.add_qkv_bias,
        "untie_embeddings_and_output_weights": not architecture.tie_word_embeddings,
        "num_experts": architecture.num_experts or None,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size if moe else None,
        "moe_router_topk": architecture.num_experts_per_token if moe else 2,
        "moe_router_pre_softmax": moe and not architecture.normalize_router_weights,
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": 1,
    }


# --- What both share ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is converted."""

    source: Weights
    settings: Path
    """Directory of config.json and the tokenizer."""
    architecture: Architecture
    options: Mapping[str, int]
    """What the result depends on besides; a resumed conversion must have the same."""


def _convert(
    job: _Job,
    out: Path,
    make_target: Callable[[Path, Sequence[_Done]], _Target],
    workers: int,
    resume: bool,
    progress: Progress | None,
    verify: Verify | None,
) -> Manifest:
    report = progress or (lambda size: None)
    entries = stored_entries(job.architecture)
    claimed = _claimed(job, workers)
    with _staged(job, out, resume) as (staging, journal):
        target = make_target(staging, journal.claimed)
        done = dict(target.done)
        for one in done.values():
            report(_bytes(one.source))
        rest = [entry for entry in entries if entry.name not in done]
        try:
            with closing(_each(workers, target.convert, rest)) as results:
                for one in results:
                    done[one.entry] = one
                    journal.add(one)
                    report(_bytes(one.source))
        except BaseException:
            target.abort()  # no worker is at it any more
            raise
        target.finish()
        copy_settings(job.settings, staging, target.settings_dtype)
        made = [done[entry.name] for entry in entries]
        manifest = _manifest(job, staging, target, made, claimed)
        if verify:
            with open_weights(staging, job.architecture) as result:
                proof = verify(job.source, result, manifest)
            manifest = replace(manifest, verified=dict(proof))
        write_manifest(staging, manifest)
        publish(staging, out)
    return manifest


def _claimed(job: _Job, workers: int) -> Mapping[str, TensorRecord] | None:
    """What the source's own manifest says that its tensors are; None where it has none.

    Of a training checkpoint, whose manifest is one of files, these are compared here: a damaged
    source must not become the proof of its copy.

    Raises:
        CheckpointError: names the files that differ.
    """
    where = job.source.directory
    if (where / STATE).is_file():
        state = read_state(where)
        shares = _each(workers, lambda n: damaged_files(where, state, n, workers), range(workers))
        problems = sorted(problem for share in shares for problem in share)
        if problems:
            _refuse_contradiction(where, STATE, problems)
    manifest = read_manifest(where)
    if manifest is None:
        return None
    config = where / "config.json"
    if config.is_file() and file_digest(config) != manifest.config_sha256:
        _refuse_contradiction(where, FILE, ["config.json differs"])
    return manifest.tensors


def _refuse_contradiction(where: Path, manifest: str, problems: Sequence[str]) -> NoReturn:
    raise CheckpointError(
        f"{where}: is not what its {manifest} says; take an undamaged copy, or delete {manifest} "
        "there if you know why:\n" + "\n".join(f"  {problem}" for problem in problems)
    )


def _manifest(
    job: _Job,
    staging: Path,
    target: _Target,
    done: Sequence[_Done],
    claimed: Mapping[str, TensorRecord] | None,
) -> Manifest:
    """Raises CheckpointError unless every tensor of the source was read, once, and as claimed."""
    read = {name: record for one in done for name, record in one.source.items()}
    written = {name: record for one in done for name, record in one.result.items()}
    derived = [
        name
        for name in job.source.tensors
        if job.source.kind == "hf" and name.endswith(family_of(job.architecture).derived)
    ]
    for name in derived:
        tensor = job.source.load(name)
        read[name] = record(tensor)
    problems = _unaccounted(job.source, read, "the source")
    if problems or len(read) != len(derived) + sum(len(one.source) for one in done):
        raise CheckpointError(
            f"{job.source.directory}: not every tensor was converted exactly once: "
            + ", ".join(problems)
        )
    if claimed is not None and claimed != read:
        names = [n for n in {**claimed, **read} if claimed.get(n) != read.get(n)]
        _refuse_contradiction(job.source.directory, FILE, [f"{name} differs" for name in names])
    return Manifest(
        kind=target.kind,
        architecture=describe_architecture(read_architecture(staging)),
        config_sha256=file_digest(staging / "config.json"),
        source=Source(
            kind=job.source.kind,
            path=str(job.source.directory.absolute()),
            config_sha256=file_digest(job.settings / "config.json"),
            tensors={name: read[name] for name in job.source.tensors},
            not_carried=dict(target.not_carried)
            | dict.fromkeys(derived, "follows from config.json"),
        ),
        tensors=written,
        versions=versions(),
    )


def _unaccounted(weights: Weights, records: Mapping[str, TensorRecord], whose: str) -> list[str]:
    stored = weights.tensors
    return [
        *(f"{name} is in {whose} only" for name in stored if name not in records),
        *(f"{name} is not in {whose}" for name in records if name not in stored),
    ]


def _whole(entry: Entry, hf: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """The parameter as a checkpoint holds it: not split, not padded."""
    shape = entry.transform.megatron_shape(architecture)
    return entry.transform.to_megatron(hf, shape, 0, 1, architecture)


def _digests(whole: Tensor, hf: Sequence[Tensor]) -> tuple[str, list[str]]:
    """Of a parameter and of its Hugging Face tensors; what is only copied is hashed once."""
    parts = [digest(tensor) for tensor in hf]
    return parts[0] if _is_same(whole, hf) else digest(whole), parts


def _is_same(whole: Tensor, hf: Sequence[Tensor]) -> bool:
    """Whether the two sides are one and the same memory."""
    first = hf[0]
    return len(hf) == 1 and (whole.data_ptr(), whole.shape) == (first.data_ptr(), first.shape)


def _bytes(records: Mapping[str, TensorRecord]) -> int:
    return sum(num_bytes(getattr(torch, r.dtype), r.shape) for r in records.values())


def _refuse_not_finite(source: Weights, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=False):
        # One pass at the speed of memory; NaN wins over every other value.
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise CheckpointError(
                f"{source.directory}: {name} holds NaN or infinity; take an undamaged checkpoint"
            )


def _each(
    workers: int, work: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Generator[_Result, None, None]:
    """Results as they come, from `workers` threads; the first error, or closing, ends them all."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Journal:
    """What is done so far, on disk: a line of settings, then a line per entry; locked.

    Raises:
        CheckpointError: another process is at it, or it was begun with other settings.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{path.parent}: another process is converting there; wait for it"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._file.seek(0)
        # What follows the last newline was being written when the process died.
        lines = self._file.read().split(b"\n")[:-1]
        self._file.truncate(sum(len(line) + 1 for line in lines))
        try:
            begun, *done = [json.loads(line) for line in lines] or [None]
            # An entry may be there twice: once damaged, then done again.
            claimed = {one["entry"]: _parse(one) for one in done}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: is damaged ({type(error).__name__}: {error}); delete {path.parent} and "
                "convert again without --resume"
            ) from error
        self.claimed: list[_Done] = list(claimed.values())
        if begun is None:
            self._put(header)
        else:
            self._check(begun, json.loads(json.dumps(header)))

    def close(self) -> None:
        self._file.close()

    def add(self, done: _Done) -> None:
        self._put(asdict(done))

    def _put(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")

    def _check(self, begun: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        differ = [
            f"{key}: {begun.get(key)!r}, now {value!r}"
            for key, value in header.items()
            if begun.get(key) != value
        ]
        if differ:
            raise CheckpointError(
                f"--resume: {self._path.parent} was begun with other settings or another source; "
                "use the same, or delete the directory:\n"
                + "\n".join(f"  {line}" for line in differ)
            )


def _parse(content: Mapping[str, Any]) -> _Done:
    def records(tensors: Mapping[str, Any]) -> dict[str, TensorRecord]:
        return {
            name: TensorRecord(tuple(one["shape"]), one["dtype"], one["sha256"])
            for name, one in tensors.items()
        }

    chunks = [
        Chunk(**chunk | {name: tuple(chunk[name]) for name in ("size", "offsets", "sizes")})
        for chunk in content["chunks"]
    ]
    return _Done(
        content["entry"], records(content["source"]), records(content["result"]), tuple(chunks)
    )


def _header(job: _Job) -> dict[str, Any]:
    weights = (".safetensors", ".distcp", METADATA)
    status = {
        path.name: path.stat()
        for path in sorted(job.source.directory.iterdir())
        if path.name.endswith(weights)
    }
    return {
        **job.options,
        "config.json": file_digest(job.settings / "config.json"),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in status.items()},
        "versions": versions(),
    }


@contextmanager
def _staged(job: _Job, out: Path, resume: bool) -> Iterator[tuple[Path, _Journal]]:
    """The directory that will be `out`, and the journal that locks it; both stay if anything fails.

    Raises:
        CheckpointError: `out` exists, or an earlier conversion's directory does and `resume` is
            false; or whatever went wrong inside, with what to do about it.
    """
    place = staging_of(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists; move it away or choose another --out")
    if place.exists() and not resume:
        raise CheckpointError(
            f"{place}: is left of a conversion to {out} that did not end; continue it with "
            "--resume, or delete the directory"
        )
    try:
        staging = place / RESULT
        staging.mkdir(parents=True, exist_ok=True)
        journal = _Journal(place / JOURNAL, _header(job))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or place}: {error.strerror or error}; choose another --out"
        ) from error
    stays = (
        f"What is converted so far is in {place}: continue with --resume once the cause is mended, "
        "or delete it"
    )
    try:
        yield staging, journal
        shutil.rmtree(place)  # only the journal is left in it
    except VerificationError as error:
        shutil.rmtree(place)  # it must not be taken for what it is not
        raise VerificationError(f"{error}\n{out}: not made") from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{stays}") from error
    except OSError as error:
        reason = f"{error.filename or place}: {error.strerror or error}"
        raise CheckpointError(f"{reason}\n{stays}") from error
    except Exception as error:
        error.add_note(stays)
        raise
    finally:
        journal.close()
