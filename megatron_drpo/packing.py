"""Packing: from trajectories to the rows that the forward pass sees.

In: the trajectories of a rollout batch. Out: one share of them per optimizer update, and of each
share the `types.Row` records of every data-parallel replica, all of one shape.

The loss of an update is sum(weight * token loss) / sum(num_items), both over all rows of all
replicas. A weight depends on its own sequence only, and every sequence lies in exactly one row, so
neither the token budget nor the number of replicas changes the loss.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_drpo.config import Aggregation
from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.types import KeptIds, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel.kept import cat_kept, holds, select_kept, uncut


def split_updates(
    trajectories: Sequence[Trajectory],
    samples_per_prompt: int,
    updates: int,
    seed: int | Sequence[int],
) -> list[list[Trajectory]]:
    """The trajectories of each optimizer update: whole groups, equally many, in a drawn order.

    Args:
        trajectories: of one rollout batch, `samples_per_prompt` of one prompt next to each other.
        samples_per_prompt: size of a group.
        updates: number of updates.
        seed: of the order; several numbers, such as (seed, step), are one seed.

    Raises:
        ConfigError: the groups cannot be shared out equally.
    """
    assert len(trajectories) % samples_per_prompt == 0
    num_groups = len(trajectories) // samples_per_prompt
    if num_groups % updates or not num_groups:
        raise ConfigError(
            f"--updates-per-rollout {updates}: must divide the {num_groups} prompts of the rollout "
            "batch, so that every update sees equally many"
        )
    bits = np.random.Philox(np.random.SeedSequence(seed))
    order = np.random.Generator(bits).permutation(num_groups)
    return [
        [
            trajectory
            for group in share.tolist()
            for trajectory in trajectories[
                group * samples_per_prompt : (group + 1) * samples_per_prompt
            ]
        ]
        for share in np.split(order, updates)
    ]


def pack(
    trajectories: Sequence[Trajectory],
    *,
    max_tokens: int,
    num_replicas: int,
    rows_multiple: int = 1,
    aggregation: Aggregation,
    horizon: int,
    pad_multiple: int = 16,
) -> list[list[Row]]:
    """The rows of every data-parallel replica, for training as for scoring; deterministic.

    All replicas get equally many rows, and all rows are padded to one length S: the longest row's,
    rounded up to `pad_multiple` (so S may exceed `max_tokens` by less than that). Replicas hold
    about equally many tokens. Where there are fewer sequences than rows, some rows are empty.

    Args:
        trajectories: of one update, in any order; those with advantage 0 count as well.
        max_tokens: budget of a row, prompts and responses together.
        num_replicas: size of the data-parallel group.
        rows_multiple: the rows of a replica are a multiple of this (interleaved pipelines).
        aggregation: gives the weights and what `num_items` counts: token-mean 1 per token and
            tokens; seq-mean-token-mean 1/length and sequences; seq-mean-token-sum-norm 1/horizon
            and sequences.
        horizon: divisor of seq-mean-token-sum-norm, in tokens.
        pad_multiple: divides S.

    Returns:
        [num_replicas][rows of a replica].

    Raises:
        ConfigError: a sequence is longer than `max_tokens`.
        RolloutError: a token is not among the ids that it was drawn from.
    """
    lengths = [_length(trajectory) for trajectory in trajectories]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > max_tokens:
        rollout = trajectories[longest].rollout
        raise ConfigError(
            f"--max-tokens-per-microbatch {max_tokens}: sample {rollout.sample} of prompt "
            f"{rollout.prompt.id} has {lengths[longest]} tokens, prompt and response together; "
            f"use at least {lengths[longest]}"
        )
    bins = _fill(lengths, max_tokens, num_replicas * rows_multiple)
    used = max(sum(lengths[i] for i in members) for members in bins)
    size = -(-used // pad_multiple) * pad_multiple
    like = trajectories[0].rollout
    rows = [_row([trajectories[i] for i in m], size, aggregation, horizon, like) for m in bins]
    # Rows come heaviest first: dealt there and back, replicas differ little.
    turns = [rows[i : i + num_replicas] for i in range(0, len(rows), num_replicas)]
    dealt = [turn if number % 2 == 0 else turn[::-1] for number, turn in enumerate(turns)]
    return [list(replica) for replica in zip(*dealt, strict=True)]


def _length(trajectory: Trajectory) -> int:
    rollout = trajectory.rollout
    return rollout.prompt.token_ids.numel() + rollout.response_ids.numel()


def _fill(lengths: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """The members of each row, heaviest row first: few rows, and of these the evenest found.

    Best fit decreasing says how many rows it takes; then a bisection finds the smallest budget for
    which that many still do (MULTIFIT, Coffman, Garey and Johnson 1978). All rows are padded to the
    heaviest, so rows * heaviest is what the forward pass costs.
    """
    rows = _best_fit(lengths, max_tokens)
    num_rows = -(-len(rows) // multiple) * multiple
    low, high = max(max(lengths), -(-sum(lengths) // num_rows)), max_tokens
    while low < high:
        middle = (low + high) // 2
        fewer = _best_fit(lengths, middle)
        if len(fewer) <= num_rows:
            rows, high = fewer, middle
        else:
            low = middle + 1
    rows.sort(key=lambda members: -sum(lengths[i] for i in members))
    return rows + [[] for _ in range(num_rows - len(rows))]


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = budget, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


def _row(
    members: Sequence[Trajectory],
    size: int,
    aggregation: Aggregation,
    horizon: int,
    like: Rollout,
) -> Row:
    """The members laid end to end and padded to `size`; see `Row` for an example."""
    rollouts = [trajectory.rollout for trajectory in members]
    responses = torch.tensor([r.response_ids.numel() for r in rollouts], dtype=torch.int64)
    lengths = torch.tensor([_length(trajectory) for trajectory in members], dtype=torch.int64)
    ends = lengths.cumsum(0)
    used, num_tokens = int(lengths.sum()), int(responses.sum())

    pieces = [ids for r in rollouts for ids in (r.prompt.token_ids, r.response_ids)]
    tokens = torch.cat([*pieces, torch.zeros(size - used, dtype=torch.int64)])
    positions = torch.zeros(size, dtype=torch.int64)
    positions[:used] = torch.arange(used) - (ends - lengths).repeat_interleave(lengths)
    sequence = torch.arange(len(members)).repeat_interleave(responses)
    # Response token t of the row, counted over all its responses, is predicted one place before its
    # own: the last of a response (t + 1 = responses so far) at ends - 2.
    loss_index = torch.arange(num_tokens) + (ends - responses.cumsum(0) - 1)[sequence]
    trained = [
        torch.ones(r.response_ids.numel(), dtype=torch.bool) if r.loss_mask is None else r.loss_mask
        for r in rollouts
    ]
    kept = torch.cat([torch.empty(0, dtype=torch.bool), *trained])
    sequence, loss_index = sequence[kept], loss_index[kept]
    counts = torch.tensor([r.num_loss_tokens for r in rollouts], dtype=torch.int64)

    if aggregation == "token-mean":
        weights, num_items = torch.ones(len(members)), int(counts.sum())
    elif aggregation == "seq-mean-token-mean":
        weights, num_items = 1 / counts.float(), len(members)
    elif aggregation == "seq-mean-token-sum-norm":
        weights, num_items = torch.full((len(members),), 1 / horizon), len(members)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}")
    advantages = torch.tensor([t.advantage for t in members], dtype=torch.float32)
    row = Row(
        tokens=tokens,
        positions=positions,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        loss_index=loss_index,
        targets=tokens[loss_index + 1],
        behaviour_logprobs=_join("behaviour_logprobs", rollouts, kept, like),
        advantages=advantages[sequence],
        weights=weights[sequence],
        sequence=sequence,
        num_items=num_items,
        policy_versions=torch.cat([torch.empty(0, dtype=torch.int64), *map(_versions, rollouts)])[
            kept
        ],
        names=tuple(f"sample {r.sample} of prompt {r.prompt.id}" for r in rollouts),
        topk_ids=_join("topk_ids", rollouts, kept, like),
        behaviour_topk_logprobs=_join("topk_logprobs", rollouts, kept, like),
        kept_ids=_join_kept(rollouts, kept),
    )
    _check_kept(row)
    return row


def _join_kept(rollouts: Sequence[Rollout], kept: Tensor) -> KeptIds | None:
    """`kept_ids` of all rollouts, at the kept tokens; None if no rollout has any."""
    if all(rollout.kept_ids is None for rollout in rollouts):
        return None
    parts = [r.kept_ids or uncut(r.response_ids.numel()) for r in rollouts]
    return select_kept(cat_kept(parts), kept)


def _check_kept(row: Row) -> None:
    if row.kept_ids is None:
        return
    missing = (~holds(row.kept_ids, row.targets)).nonzero().flatten()
    if missing.numel():
        first = int(missing[0])
        raise RolloutError(
            f"token {int(row.targets[first])} at position "
            f"{int(row.positions[row.loss_index[first]]) + 1} of "
            f"{row.names[int(row.sequence[first])]} is not among the "
            f"{int(row.kept_ids.counts[first])} ids that top-p and top-k are said to have kept "
            "for it, so its behaviour log-prob is of another law: look at the engine or the "
            "rollouts file"
        )


def _versions(rollout: Rollout) -> Tensor:
    """int64 [R]: the policy version of each token."""
    counts, versions = zip(*rollout.spans, strict=True)
    return torch.tensor(versions).repeat_interleave(torch.tensor(counts))


def _join(name: str, rollouts: Sequence[Rollout], kept: Tensor, like: Rollout) -> Any:
    """A field of all rollouts, at the kept tokens; `like` tells its shape where there are none."""
    empty = getattr(like, name)
    if empty is None:
        return None
    return torch.cat([empty[:0], *(getattr(r, name) for r in rollouts)])[kept]
