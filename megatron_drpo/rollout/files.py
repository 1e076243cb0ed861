"""Rollouts files: a rollout batch as JSONL, to be replayed, compared, or made by another engine.

In: trajectories, written one per line (`--save-rollouts`). Out: rollouts with the rewards that the
file holds (`--rollouts-file`), each line checked, log-probs bit for bit those that were written.

A line, the fields from `answer` on being optional:

    {"id": "train.jsonl:7", "prompt": "12+30=", "prompt_ids": [5, 6, 14, 7, 4, 15], "sample": 3,
     "response": "42", "response_ids": [8, 6, 2], "behaviour_logprobs": [-0.21, -0.05, -0.01],
     "finish_reason": "stop", "policy_version": 4, "answer": "42", "metadata": {}, "reward": 1.0,
     "topk_ids": [[8, 3], ...], "topk_logprobs": [[-0.21, -1.9], ...], "loss_mask": [true, ...]}

`topk_ids` and `topk_logprobs` hold the behaviour policy's K likeliest ids at each response token
and their log-probs. `loss_mask` is false where the policy did not write the token (a tool's
answer); what `behaviour_logprobs` and the top-K fields hold there is not looked at, null will do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_drpo.errors import DataError
from megatron_drpo.prompts import raise_problems, read_jsonl
from megatron_drpo.types import Prompt, Rollout, Trajectory

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
    "topk_ids": list,
    "topk_logprobs": list,
    "loss_mask": list,
}


def write_rollouts(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write one line per trajectory; the file appears complete or not at all.

    An fp32 log-prob is written as the decimal of its fp64 value, which reads back bit-exactly.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for trajectory in trajectories:
                json.dump(_line(trajectory), file)
                file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _line(trajectory: Trajectory) -> dict[str, Any]:
    rollout = trajectory.rollout
    prompt = rollout.prompt
    line = {
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
        "reward": trajectory.reward,
    }
    for name in ("topk_ids", "topk_logprobs", "loss_mask"):
        value = getattr(rollout, name)
        if value is not None:
            line[name] = value.tolist()
    return line


class _Read(NamedTuple):
    number: int
    rollout: Rollout
    reward: float | None


def read_rollouts(
    path: str | Path, *, vocab_size: int, max_length: int, samples_per_prompt: int
) -> list[tuple[Rollout, float | None]]:
    """The rollouts of a file, in its order, with their rewards where the file holds them.

    Args:
        path: the file; the format is that of this module's docstring.
        vocab_size: of the model; token ids lie below it.
        max_length: the model's context in tokens, prompt and response together.
        samples_per_prompt: size of a group; the samples of a prompt lie next to each other and are
            numbered from 0.

    Returns:
        (rollout, reward); either every reward is None or none is.

    Raises:
        DataError: the file is missing or empty, or FILE:LINE of everything that cannot be used.
    """
    read = read_jsonl(
        path,
        lambda number, line: _parse(number, line, vocab_size, max_length),
        "rollouts (--rollouts-file)",
    )
    unrewarded = [entry for entry in read if entry.reward is None]
    problems = _group_problems(path, read, samples_per_prompt)
    widths = {0 if e.rollout.topk_ids is None else e.rollout.topk_ids.size(1): e for e in read}
    if len(widths) > 1:
        (first, one), (second, other), *_ = widths.items()
        problems.append(
            f"{path}:{other.number}: has {second} `topk_ids` per token, line {one.number} {first}; "
            "all rollouts of a file have equally many"
        )
    if 0 < len(unrewarded) < len(read):
        problems.append(
            f"{path}:{unrewarded[0].number}: has no `reward`, while {len(read) - len(unrewarded)} "
            f"of {len(read)} lines have one; give it on every line, or on none to have it computed"
        )
    raise_problems(problems)
    return [(entry.rollout, entry.reward) for entry in read]


def _parse(number: int, line: dict[str, Any], vocab_size: int, max_length: int) -> _Read:
    """One line's rollout; DataError with the first thing that is wrong with it."""
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
        loss_mask=None if all(mask) else torch.tensor(mask),
    )
    return _Read(number, rollout, None if reward is None else float(reward))


_NAMES = {
    str: "text",
    list: "a list of numbers",
    int: "a whole number",
    dict: "an object",
    (int, float): "a number",
}


def _short(value: object) -> str:
    text = json.dumps(value)
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


_FP32_MAX = torch.finfo(torch.float32).max


def _group_problems(path: str | Path, read: list[_Read], samples_per_prompt: int) -> list[str]:
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
