"""Rollouts files: responses as JSONL, to be replayed, compared, or made by another engine.

In: trajectories of a step (`write_rollouts`, for `--save-rollouts`), or responses as they are
generated, over hours (`RolloutWriter`). Out: rollouts with the rewards that the file holds
(`--rollouts-file`), each line checked, log-probs bit for bit those that were written. A file may be
compressed by gzip, and a directory of files is read as one (docs/rollouts.md has the whole schema).

A line, the fields from `answer` on being optional:

    {"id": "train.jsonl:7", "prompt": "12+30=", "prompt_ids": [5, 6, 14, 7, 4, 15], "sample": 3,
     "response": "42", "response_ids": [8, 6, 2], "behaviour_logprobs": [-0.21, -0.05, -0.01],
     "finish_reason": "stop", "policy_version": 4, "answer": "42", "metadata": {}, "reward": 1.0,
     "kept_ids": [[8, 3], [6], []], "version_spans": [[2, 4], [1, 5]], "loss_mask": [true, ...],
     "topk_ids": [[8, 3], ...], "topk_logprobs": [[-0.21, -1.9], ...],
     "experts": {"shape": [8, 48, 8], "base64": "AwABA..."}}

The first line of a file may be a `FileHeader` instead, with the field `rollouts`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from megatron_drpo.config import Config
from megatron_drpo.disk import sync_path
from megatron_drpo.errors import DataError
from megatron_drpo.prompts import raise_problems, read_jsonl
from megatron_drpo.rollout.engine import Sampling
from megatron_drpo.types import KeptIds, Prompt, Rollout, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Of the file; in its header as `rollouts`."""

_REQUIRED = {
    "id": str,
    "prompt": str,
    "prompt_ids": list,
    "sample": int,
    "response": str,
    "response_ids": list,
    "behaviour_logprobs": list,
    "finish_reason": str,
    "policy_version": int,
}
_FIELDS = _REQUIRED | {
    "answer": str,
    "metadata": dict,
    "reward": (int, float),
    "kept_ids": list,
    "version_spans": list,
    "loss_mask": list,
    "topk_ids": list,
    "topk_logprobs": list,
    "experts": dict,
}

Pair = tuple[Rollout, float | None]
"""A rollout with its reward: NaN where that failed, None where none was computed."""


@dataclass(frozen=True)
class FileHeader:
    """What all rollouts of a file have in common; the first line of the file, with `rollouts`
    (`FORMAT`) in front.

    Example:
        {"rollouts": 1, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_response_length": 256,
         "stop_ids": [2], "stop_strings": [], "seed": 1234, "engine": "in process; ...",
         "tokenizer_sha256": "9f86d0...", "weights_sha256": "60303a...", "policy": "models/base"}
    """

    temperature: float
    top_p: float
    top_k: int
    max_response_length: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    seed: int
    engine: str
    """For people."""
    tokenizer_sha256: str
    """`tokenizer_sha256` of the tokenizer that the token ids are of."""
    weights_sha256: str | None
    """Of the weights that generated, or None: of weights that no file holds."""
    policy: str
    """What generated, for people."""

    @property
    def truncated(self) -> bool:
        """Whether top-p or top-k cut the law that was drawn from."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


_LAW = ("temperature", "top_p", "top_k")
"""Fields that say which law the log-probs are of; their flags begin with `--rollout-`."""


def make_header(
    sampling: Sampling,
    *,
    engine: str,
    tokenizer_sha256: str,
    weights_sha256: str | None,
    policy: str,
) -> FileHeader:
    """The header of rollouts that were drawn with `sampling`; the rest as in `FileHeader`."""
    return FileHeader(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_response_length=sampling.max_response_length,
        stop_ids=sampling.stop_ids,
        stop_strings=sampling.stop_strings,
        seed=sampling.seed,
        engine=engine,
        tokenizer_sha256=tokenizer_sha256,
        weights_sha256=weights_sha256,
        policy=policy,
    )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what each token id means: [[token, id], ...] as JSON, in the order of ids.

    Not of the tokenizer's files, which each version of a library writes in another way.
    """
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_header(header: FileHeader, config: Config, tokenizer_sha256: str) -> list[str]:
    """Why rollouts under `header` are not those of the run `config`; empty if they are.

    Args:
        tokenizer_sha256: of the run's tokenizer.
    """
    file, rollout = f"--rollouts-file {config.rollout.rollouts_file}", config.rollout
    problems = []
    for name in _LAW:
        found, own = getattr(header, name), getattr(rollout, f"rollout_{name}")
        if found != own:
            flag = f"--rollout-{name.replace('_', '-')}"
            problems.append(
                f"{file}: was sampled with {name} {found}, but this run has {flag} {own}, and its "
                f"log-probs would be of another law; use {flag} {found}"
            )
    if header.tokenizer_sha256 != tokenizer_sha256:
        problems.append(
            f"{file}: its token ids are of the tokenizer {header.tokenizer_sha256[:12]}... "
            f"(SHA-256 of the vocabulary; policy {header.policy}), this run's is "
            f"{tokenizer_sha256[:12]}...; use the model that generated, or one of its family"
        )
    return problems


# Writing.


def step_file(step: int) -> str:
    """What a run calls the rollouts of a step (from 1) that it saves."""
    return f"step-{step:06d}.jsonl"


def write_rollouts(
    path: str | Path, trajectories: Sequence[Trajectory], header: FileHeader | None = None
) -> None:
    """Write one line per trajectory; the file appears complete or not at all.

    An fp32 log-prob is written as the decimal of its fp64 value, which reads back bit-exactly.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            if header is not None:
                file.write(_json_line(_header_line(header)))
            for trajectory in trajectories:
                file.write(_json_line(_line(trajectory.rollout, trajectory.reward)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


class RolloutWriter:
    """Appends groups to a file that takes long to make; a context manager.

    Until all is written the file is called NAME.partial. It can be killed at any moment: what a
    call of `write` was given is on the disk when the call returns, and whatever a call that was
    broken off left behind is cut away when the file is continued. So every line is complete or
    absent, and every group is.

        with RolloutWriter(path, header, samples_per_prompt=8, resume=True) as writer:
            for group in groups:
                if group.name not in writer.done:
                    writer.write(group)

    Args:
        path: of the finished file; compressed where it ends in .gz, each call of `write` into a
            gzip member of its own.
        samples_per_prompt: size of a group.
        resume: continue what is there; what is there must begin with the same header (but for
            `engine`).

    Raises:
        DataError: there is a file and `resume` is False; it has another header, or is damaged in
            another way than by being broken off; another process writes it.
    """

    def __init__(
        self, path: str | Path, header: FileHeader, *, samples_per_prompt: int, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.done: dict[str, list[int]] = {}
        """Prompt ids (names) whose groups the file holds, each with its prompt's token ids."""
        self._samples = samples_per_prompt
        self._compress = self.path.suffix == ".gz"
        self._partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = next((p for p in (self.path, self._partial) if p.exists()), None)
        if there is not None and not resume:
            raise DataError(
                f"{there}: is there already; continue it with --resume, or write elsewhere"
            )
        self.finished = there == self.path
        """Whether there was nothing left to write."""
        self._file = (self.path if self.finished else self._partial).open(
            "rb" if self.finished else "a+b"
        )
        try:
            self._lock()
            end = self._recover(header)
            if not self.finished:
                self._file.truncate(end)
                if end == 0:
                    self._append(_json_line(_header_line(header)))
                    sync_path(self.path.parent)
        except BaseException:
            self._file.close()
            raise

    def write(self, rollouts: Sequence[Pair]) -> None:
        """Append whole groups, the samples of a prompt next to each other and numbered from 0; on
        the disk when this returns."""
        groups = Counter(rollout.prompt.id for rollout, _ in rollouts)
        assert not self.finished and set(groups.values()) <= {self._samples}
        self._append(b"".join(_json_line(_line(*pair)) for pair in rollouts))
        for rollout, _ in rollouts:
            self.done[rollout.prompt.id] = rollout.prompt.token_ids.tolist()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Without an exception, the file is complete and receives its name."""
        self._file.close()
        if kind is None and not self.finished:
            os.replace(self._partial, self.path)
            sync_path(self.path.parent)

    def _append(self, data: bytes) -> None:
        self._file.write(gzip.compress(data, 6, mtime=0) if self._compress else data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self._file.name}: another process is writing it; wait for it, or end it"
            ) from error

    def _recover(self, header: FileHeader) -> int:
        """Where the last whole group ends, in bytes; fills `done`."""
        self._file.seek(0)
        end, count, name = 0, 0, None
        for number, (place, line) in enumerate(complete_lines(self._file), start=1):
            try:
                value = json.loads(line)
                if number == 1:
                    _check_continues(self._file.name, value, header)
                    end = place
                    continue
                count = count + 1 if value["id"] == name else 1
                name = value["id"]
                if count == self._samples:
                    self.done[name], end = value["prompt_ids"], place
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{self._file.name}:{number}: is damaged ({error}); delete the file to write "
                    "it anew"
                ) from error
        return end


def complete_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """(where the file may be cut behind it, line) of a file's lines, up to one that is torn.

    Of a compressed file, the lines of whole gzip members.
    """
    end = 0
    if file.read(2) != _GZIP:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield end, line
        return
    while True:
        file.seek(end)
        decoder, data = zlib.decompressobj(_GZIP_FORMAT), bytearray()
        while not decoder.eof:
            chunk = file.read(1 << 20)
            if not chunk:
                return
            try:
                data += decoder.decompress(chunk)
            except zlib.error as error:
                raise DataError(
                    f"{file.name}: is damaged after byte {end} ({error}); delete the file to write "
                    "it anew"
                ) from error
        end = file.tell() - len(decoder.unused_data)
        for line in data.split(b"\n")[:-1]:
            yield end, bytes(line)


_GZIP = b"\x1f\x8b"
_GZIP_FORMAT = 31
"""What zlib calls a gzip member with the largest window."""


def _check_continues(path: str, line: dict[str, Any], header: FileHeader) -> None:
    """DataError unless the first line of a file is the same header."""
    try:
        found = _parse_header(line)
    except DataError as error:
        raise DataError(f"{path}:1: {error}; delete the file to write it anew") from error
    differing = [
        f"{field.name} {_short(getattr(found, field.name))}, this run has "
        f"{_short(getattr(header, field.name))}"
        for field in dataclasses.fields(FileHeader)
        if field.name != "engine" and getattr(found, field.name) != getattr(header, field.name)
    ]
    if differing:
        raise DataError(
            f"--resume: {path} was begun with {'; '.join(differing)}; continue with the same "
            "settings, or write elsewhere"
        )


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _header_line(header: FileHeader) -> dict[str, Any]:
    return {"rollouts": FORMAT} | dataclasses.asdict(header)


def _line(rollout: Rollout, reward: float | None) -> dict[str, Any]:
    assert rollout.finish_reason != "abort", "what was broken off is finished first, or left out"
    prompt = rollout.prompt
    line: dict[str, Any] = {
        "id": prompt.id,
        "prompt": prompt.text,
        "prompt_ids": prompt.token_ids.tolist(),
        "sample": rollout.sample,
        "response": rollout.response_text,
        "response_ids": rollout.response_ids.tolist(),
        "behaviour_logprobs": rollout.behaviour_logprobs.tolist(),
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "answer": prompt.answer,
        "metadata": dict(prompt.metadata),
    }
    if reward is not None:
        line["reward"] = None if math.isnan(reward) else reward
    if rollout.kept_ids is not None:
        parts = rollout.kept_ids.ids.split(rollout.kept_ids.counts.tolist())
        line["kept_ids"] = [part.tolist() for part in parts]
    if rollout.version_spans:
        line["version_spans"] = [list(span) for span in rollout.version_spans]
    for name in ("topk_ids", "topk_logprobs", "loss_mask"):
        value = getattr(rollout, name)
        if value is not None:
            line[name] = value.tolist()
    if rollout.experts is not None:
        values = rollout.experts.numpy().astype(_EXPERTS_TYPE).tobytes()
        line["experts"] = {
            "shape": [*rollout.experts.shape],
            "base64": base64.b64encode(values).decode("ascii"),
        }
    return line


# Reading.


class _Read(NamedTuple):
    file: Path
    number: int
    rollout: Rollout
    reward: float | None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def read_rollouts(
    path: str | Path, *, vocab_size: int, max_length: int, samples_per_prompt: int
) -> list[Pair]:
    """The rollouts of a file or of a directory's files, in their order.

    Args:
        path: a file, plain or compressed by gzip, or a directory of such files (*.jsonl and
            *.jsonl.gz); the format is that of this module's docstring.
        vocab_size: of the model; token ids lie below it.
        max_length: the model's context in tokens, prompt and response together.
        samples_per_prompt: size of a group; the samples of a prompt lie next to each other and are
            numbered from 0.

    Returns:
        Rollouts with their rewards: all None if no line has one.

    Raises:
        DataError: a file is missing, empty or not finished, headers differ, or FILE:LINE of
            everything that cannot be used.
    """
    headers: dict[Path, FileHeader | None] = {}
    read: list[_Read] = []
    problems: list[str] = []
    for file in _files(Path(path)):
        try:
            headers[file], found = _read_file(file, vocab_size, max_length)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += _group_problems(file, found, samples_per_prompt)
        read += found
    problems += _header_problems(headers)
    unrewarded = [entry for entry in read if entry.reward is None]
    widths = {0 if e.rollout.topk_ids is None else e.rollout.topk_ids.size(1): e for e in read}
    if len(widths) > 1:
        (first, one), (second, other), *_ = widths.items()
        problems.append(
            f"{other.place}: has {second} `topk_ids` per token, {one.place} {first}; all rollouts "
            "have equally many"
        )
    if 0 < len(unrewarded) < len(read):
        problems.append(
            f"{unrewarded[0].place}: has no `reward`, while {len(read) - len(unrewarded)} of "
            f"{len(read)} lines have one; give it on every line (null where it failed), or on none "
            "to have it computed"
        )
    raise_problems(problems)
    return [(entry.rollout, entry.reward) for entry in read]


def read_header(path: str | Path) -> FileHeader | None:
    """The header of a file, or of a directory's first file; None if it has none.

    Raises:
        DataError: the file cannot be read, or begins with a header that cannot be used.
    """
    file = _files(Path(path))[0]
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            with gzip.open(raw) if packed else contextlib.nullcontext(raw) as lines:
                first = lines.readline()
        value = json.loads(first)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    except ValueError:
        return None  # `read_rollouts` says what is wrong with it
    if not isinstance(value, dict) or "rollouts" not in value:
        return None
    try:
        return _parse_header(value)
    except DataError as error:
        raise DataError(f"{file}:1: {error}") from error


_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.jsonl(\.gz)?")


def shard_name(number: int, count: int, *, compress: bool) -> str:
    """Example: rollouts-00002-of-00004.jsonl.gz."""
    return f"rollouts-{number:05d}-of-{count:05d}.jsonl" + (".gz" if compress else "")


def _files(path: Path) -> list[Path]:
    """The files that `path` names, in order; DataError if they are not all there."""
    if not path.is_dir():
        return [path]
    names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    unfinished = [name for name in names if name.endswith(".partial")]
    if unfinished:
        raise DataError(
            f"{path / unfinished[0]}: is not finished; continue it where it was made with "
            "--resume, or name a file of the directory"
        )
    found = [name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
    if not found:
        raise DataError(f"{path}: holds neither *.jsonl nor *.jsonl.gz; give rollouts")
    shards = [match for match in map(_SHARD.fullmatch, found) if match]
    for stem, count in sorted({(shard[1], int(shard[3])) for shard in shards}):
        numbers = {int(s[2]) for s in shards if (s[1], int(s[3])) == (stem, count)}
        missing = [number for number in range(count) if number not in numbers]
        if missing:
            raise DataError(
                f"{path}: {stem}-{missing[0]:05d}-of-{count:05d} is missing ({len(missing)} of "
                f"{count} shards are); copy it here, or finish it with --resume"
            )
    return [path / name for name in found]


def _read_file(
    file: Path, vocab_size: int, max_length: int
) -> tuple[FileHeader | None, list[_Read]]:
    header: FileHeader | None = None

    def parse(number: int, line: dict[str, Any]) -> _Read | None:
        nonlocal header
        if "rollouts" in line:
            if number != 1:
                raise DataError("a header stands in the first line; keep files apart")
            header = _parse_header(line)
            return None
        return _parse(file, number, line, vocab_size, max_length, header)

    read = read_jsonl(file, parse, "rollouts (--rollouts-file)")
    found = [entry for entry in read if entry is not None]
    if not found:
        raise DataError(f"{file}: has a header and no rollouts")
    return header, found


def _parse_header(line: dict[str, Any]) -> FileHeader:
    """DataError with the first thing that is wrong with it."""
    if not isinstance(line, dict) or line.get("rollouts") != FORMAT:
        found = line.get("rollouts") if isinstance(line, dict) else line
        raise DataError(
            f"`rollouts` is {_short(found)}; this program reads headers of format {FORMAT}"
        )
    values = {name: value for name, value in line.items() if name != "rollouts"}
    for name, (kind, wanted) in _HEADER.items():
        if name not in values:
            raise DataError(f"the header has no `{name}`")
        if not kind(values[name]):
            raise DataError(f"`{name}` is {_short(values[name])}; must be {wanted}")
    unknown = [name for name in values if name not in _HEADER]
    if unknown:
        raise DataError(f"unknown field `{unknown[0]}` in the header")
    for name in ("stop_ids", "stop_strings"):
        values[name] = tuple(values[name])
    return FileHeader(**values)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_list_of(kind: type) -> Any:
    return lambda value: type(value) is list and all(type(item) is kind for item in value)


_HEADER: dict[str, tuple[Any, str]] = {
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    "max_response_length": (lambda value: type(value) is int and value > 0, "a whole number"),
    "stop_ids": (_is_list_of(int), "a list of token ids"),
    "stop_strings": (_is_list_of(str), "a list of texts"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "engine": (lambda value: type(value) is str, "text"),
    "tokenizer_sha256": (lambda value: type(value) is str, "text"),
    "weights_sha256": (lambda value: value is None or type(value) is str, "text or null"),
    "policy": (lambda value: type(value) is str, "text"),
}


def _header_problems(headers: dict[Path, FileHeader | None]) -> list[str]:
    """Files of one directory must be of one law and one tokenizer."""
    (first, one), *others = headers.items() or [(None, None)]
    for file, other in others:
        if (one is None) != (other is None):
            with_, without = (first, file) if other is None else (file, first)
            return [f"{without}: has no header, and {with_} has one; keep them apart"]
        for name in (*_LAW, "tokenizer_sha256"):
            if getattr(one, name) != getattr(other, name):
                return [
                    f"{file}: has {name} {_short(getattr(other, name))}, {first} "
                    f"{_short(getattr(one, name))}; rollouts of one batch are of one law and one "
                    "tokenizer, so keep them apart"
                ]
    return []


def _parse(
    file: Path,
    number: int,
    line: dict[str, Any],
    vocab_size: int,
    max_length: int,
    header: FileHeader | None,
) -> _Read:
    """One line's rollout; DataError with the first thing that is wrong with it."""
    failed = "reward" in line and line["reward"] is None
    line = {key: value for key, value in line.items() if key in _REQUIRED or value is not None}
    missing = [name for name in _REQUIRED if name not in line]
    if missing:
        raise DataError(f"no {', '.join(f'`{name}`' for name in missing)}; every rollout has it")
    unknown = [name for name in line if name not in _FIELDS]
    if unknown:
        raise DataError(
            f"unknown field `{unknown[0]}`; what is not a rollout's belongs into `metadata`"
        )
    for name, kind in _FIELDS.items():
        value = line.get(name)
        if name in line and (not isinstance(value, kind) or isinstance(value, bool)):
            raise DataError(f"`{name}` is {_short(value)}; must be {_NAMES[kind]}")
    if line["finish_reason"] not in ("stop", "length"):
        if line["finish_reason"] == "abort":
            raise DataError(
                "`finish_reason` is 'abort': the response was broken off; finish it, or remove it"
            )
        raise DataError(f"`finish_reason` is {line['finish_reason']!r}; must be stop or length")
    if line["policy_version"] < 0:
        raise DataError(f"`policy_version` is {line['policy_version']}; must be 0 or more")
    reward = line.get("reward")
    if reward is not None and not abs(reward) <= sys.float_info.max:  # NaN fails it too
        raise DataError(f"`reward` is {reward}; must be finite")
    prompt_ids = _token_ids(line, "prompt_ids", vocab_size)
    response_ids = _token_ids(line, "response_ids", vocab_size)
    length = prompt_ids.numel() + response_ids.numel()
    if length > max_length:
        raise DataError(
            f"prompt and response have {length} tokens, the model's context {max_length}; remove "
            "or shorten this rollout"
        )
    mask = _loss_mask(line, response_ids.numel())
    kept_ids = _kept_ids(line, mask, response_ids.tolist(), vocab_size)
    if header is not None and header.truncated != (kept_ids is not None):
        law = f"top_p {header.top_p}, top_k {header.top_k}"
        raise DataError(
            f"has no `kept_ids`, though the header says {law}; training renormalises over them"
            if kept_ids is None
            else f"has `kept_ids`, though the header says {law}, which cuts nothing"
        )
    rollout = Rollout(
        prompt=Prompt(
            line["id"], line["prompt"], prompt_ids, line.get("answer"), line.get("metadata", {})
        ),
        sample=line["sample"],
        response_ids=response_ids,
        behaviour_logprobs=_logprobs("behaviour_logprobs", line["behaviour_logprobs"], mask),
        finish_reason=line["finish_reason"],
        policy_version=line["policy_version"],
        response_text=line["response"],
        **_topk(line, mask, vocab_size),
        kept_ids=kept_ids,
        version_spans=_version_spans(line, response_ids.numel()),
        loss_mask=None if all(mask) else torch.tensor(mask),
        experts=_experts(line, length),
    )
    if failed:
        reward = math.nan
    return _Read(file, number, rollout, None if reward is None else float(reward))


_EXPERTS_TYPE = "<u2"
"""Numbers of experts in a file: unsigned, of two bytes, the lower one first."""


def _experts(line: dict[str, Any], length: int) -> Tensor | None:
    """int16 [P + R - 1, layers, k], if the line has `experts`; `length` is P + R."""
    if "experts" not in line:
        return None
    field = line["experts"]
    try:
        shape, values = field["shape"], base64.b64decode(field["base64"], validate=True)
        experts = np.frombuffer(values, _EXPERTS_TYPE).reshape(shape)
        found, layers, k = experts.shape
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            '`experts` must be {"shape": [tokens, layers, experts per token], "base64": numbers of '
            f"two bytes each}} ({error})"
        ) from error
    if found != length - 1 or not layers or not k:
        raise DataError(
            f"`experts` has the shape {shape}; prompt and response have {length} tokens, and all "
            f"but the last were routed: must be [{length - 1}, layers, experts per token]"
        )
    if experts.max() > np.iinfo(np.int16).max:
        raise DataError(f"`experts` holds {experts.max()}; the last number there can be is 32767")
    if (np.diff(np.sort(experts, -1), axis=-1) == 0).any():
        raise DataError("`experts` names an expert twice for one token and layer")
    return torch.from_numpy(experts.astype(np.int16))


_NAMES = {
    str: "text",
    list: "a list of numbers",
    int: "a whole number",
    dict: "an object",
    (int, float): "a number",
}


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _token_ids(line: dict[str, Any], name: str, vocab_size: int) -> Tensor:
    ids = line[name]
    if not ids:
        raise DataError(f"`{name}` is empty; a rollout has at least one token there")
    for index, value in enumerate(ids):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise DataError(
                f"`{name}` holds {_short(value)} at index {index}; the model's token ids are 0 to "
                f"{vocab_size - 1}"
            )
    return torch.tensor(ids, dtype=torch.int64)


def _check_length(name: str, values: list[Any], num_tokens: int) -> None:
    if len(values) != num_tokens:
        raise DataError(
            f"`response_ids` has {num_tokens} entries, but `{name}` {len(values)}; each token of "
            "the response has one"
        )


def _loss_mask(line: dict[str, Any], num_tokens: int) -> list[bool]:
    mask = line.get("loss_mask", [True] * num_tokens)
    _check_length("loss_mask", mask, num_tokens)
    for index, value in enumerate(mask):
        if type(value) is not bool:
            raise DataError(
                f"`loss_mask` holds {_short(value)} at index {index}; must be true or false"
            )
    if not any(mask):
        raise DataError("`loss_mask` is false everywhere: nothing to train on; remove this rollout")
    return mask


def _logprobs(name: str, values: list[Any], mask: list[bool]) -> Tensor:
    """fp32 [R], 0 where the mask is false."""
    _check_length(name, values, len(mask))
    for index, value in enumerate(values):
        # Python's JSON reader takes NaN and -Infinity; beyond fp32 is -inf once stored.
        usable = type(value) in (int, float) and -_FP32_MAX <= value <= 0
        if mask[index] and not usable:
            raise DataError(
                f"`{name}` holds {_short(value)} at index {index}; the log-prob of a sampled token "
                "is finite and at most 0"
            )
    kept = [value if used else 0.0 for value, used in zip(values, mask, strict=True)]
    return torch.tensor(kept, dtype=torch.float32)


def _topk(line: dict[str, Any], mask: list[bool], vocab_size: int) -> dict[str, Tensor]:
    """`topk_ids` and `topk_logprobs`, if the line has them."""
    names = [name for name in ("topk_ids", "topk_logprobs") if name in line]
    if not names:
        return {}
    if len(names) == 1:
        raise DataError(f"has `{names[0]}` alone; `topk_ids` and `topk_logprobs` belong together")
    size = None
    for name in names:
        _check_length(name, line[name], len(mask))
        for index in (i for i, used in enumerate(mask) if used):
            row = line[name][index]
            if not isinstance(row, list) or not row:
                raise DataError(f"`{name}` holds {_short(row)} at index {index}; must be a list")
            size = len(row) if size is None else size
            if len(row) != size:
                raise DataError(
                    f"`{name}` has {len(row)} entries at index {index}, {size} elsewhere; every "
                    "token has the K likeliest ids of one K"
                )
    assert size is not None, "the mask keeps at least one token"
    ids = torch.zeros((len(mask), size), dtype=torch.int64)
    logprobs = torch.zeros((len(mask), size))
    for index in (i for i, used in enumerate(mask) if used):
        row = _token_ids({"topk_ids": line["topk_ids"][index]}, "topk_ids", vocab_size)
        if row.unique().numel() < size:
            raise DataError(f"`topk_ids` names an id twice at index {index}")
        ids[index] = row
        values = line["topk_logprobs"][index]
        logprobs[index] = _logprobs("topk_logprobs", values, [True] * size)
        if logprobs[index].double().exp().sum() > 1 + 1e-3:
            raise DataError(
                f"`topk_logprobs` at index {index}: the probabilities exceed 1 together"
            )
    return {"topk_ids": ids, "topk_logprobs": logprobs}


def _kept_ids(
    line: dict[str, Any], mask: list[bool], response: list[int], vocab_size: int
) -> KeptIds | None:
    """`kept_ids`, if the line has them; where the mask is false, nothing was cut."""
    if "kept_ids" not in line:
        return None
    if "topk_ids" in line:
        raise DataError("has `kept_ids` and `topk_ids`; a truncated law has no others to list")
    _check_length("kept_ids", line["kept_ids"], len(mask))
    lists = [ids if used else [] for ids, used in zip(line["kept_ids"], mask, strict=True)]
    for index, (ids, token) in enumerate(zip(lists, response, strict=True)):
        if not isinstance(ids, list):
            raise DataError(f"`kept_ids` holds {_short(ids)} at index {index}; must be a list")
        for value in ids:
            if type(value) is not int or not 0 <= value < vocab_size:
                raise DataError(
                    f"`kept_ids` holds {_short(value)} at index {index}; the model's token ids are "
                    f"0 to {vocab_size - 1}"
                )
        if len(set(ids)) < len(ids):
            raise DataError(f"`kept_ids` names an id twice at index {index}")
        if ids and token not in ids:
            raise DataError(
                f"`kept_ids` at index {index} lacks the token {token} that `response_ids` has "
                "there; a token is drawn from those that were kept"
            )
    return KeptIds(
        ids=torch.tensor([*itertools.chain(*lists)], dtype=torch.int32),
        counts=torch.tensor([len(ids) for ids in lists], dtype=torch.int64),
    )


def _version_spans(line: dict[str, Any], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """`version_spans`; () where the line has none, or one for the whole response."""
    spans = line.get("version_spans", [])
    for index, span in enumerate(spans):
        if not (_is_list_of(int)(span) and len(span) == 2 and span[0] >= 1):
            raise DataError(
                f"`version_spans` holds {_short(span)} at index {index}; must be [number of "
                "tokens, policy version]"
            )
    if not spans:
        return ()
    counts, versions = zip(*spans, strict=True)
    if sum(counts) != num_tokens:
        raise DataError(
            f"`version_spans` covers {sum(counts)} tokens, `response_ids` has {num_tokens}"
        )
    if versions[0] != line["policy_version"] or list(versions) != sorted(versions):
        raise DataError(
            f"`version_spans` has the versions {list(versions)}; they begin with `policy_version`, "
            f"which is {line['policy_version']}, and never go back"
        )
    return tuple(zip(counts, versions, strict=True)) if len(spans) > 1 else ()


_FP32_MAX = torch.finfo(torch.float32).max


def _group_problems(path: Path, read: list[_Read], samples_per_prompt: int) -> list[str]:
    """What is wrong with the way the rollouts are grouped by prompt."""
    problems = []
    begun: dict[str, int] = {}
    for name, run in itertools.groupby(read, key=lambda entry: entry.rollout.prompt.id):
        group = list(run)
        number, first = group[0].number, group[0].rollout
        samples = [entry.rollout.sample for entry in group]
        if begun.setdefault(name, number) != number:
            problems.append(
                f"{path}:{number}: prompt {name!r} begins again, after line {begun[name]}; the "
                "samples of a prompt lie next to each other"
            )
        elif len(group) != samples_per_prompt:
            problems.append(
                f"{path}:{number}: prompt {name!r} has {len(group)} samples, but "
                f"--rollout-samples-per-prompt is {samples_per_prompt}; make them equal"
            )
        elif samples != list(range(samples_per_prompt)):
            problems.append(
                f"{path}:{number}: the samples of prompt {name!r} are numbered {samples}; must be "
                f"0 to {samples_per_prompt - 1} in order"
            )
        elif any(not e.rollout.prompt.token_ids.equal(first.prompt.token_ids) for e in group):
            problems.append(f"{path}:{number}: prompt {name!r} has different `prompt_ids`")
    return problems
