"""Packing: from trajectories to the rows that the forward pass sees.

In: the trajectories of a rollout batch. Out: one share of them per optimizer update, and of each
share the `types.Row` records of every data-parallel replica, equally many each.

The loss of an update is sum(weight * token loss) / sum(num_items), both over all rows of all
replicas. A weight depends on its own sequence only, and every sequence lies in exactly one row, so
neither the token budget nor the number of replicas changes the loss.

Costs are in units of what a token costs without attention. A row of S tokens, padding included,
costs S and what attention costs its sequences; a replica costs what its rows do, and an update
takes as long as the dearest replica.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_drpo.config import Aggregation
from megatron_drpo.errors import ConfigError, RolloutError
from megatron_drpo.types import KeptIds, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel.gemm import round_up
from megatron_drpo.vocab_parallel.kept import cat_kept, holds, select_kept, uncut


@dataclass(frozen=True)
class AttentionCost:
    """What attention costs a sequence, by its length (`plan.flops.attention_cost`).

    Example: AttentionCost(full=1e-4)(5000) = 2500.0: half as much as the rest of its 5000 tokens.
    """

    full: float = 0.0
    """Of layers that see the whole sequence: cost / length^2."""
    sliding: float = 0.0
    """Of layers with a sliding window: cost / length^2 as long as all of it is in the window."""
    window: int = 0
    """Tokens that a token of these layers sees."""

    def __call__(self, length: int) -> float:
        beyond = max(length - self.window, 0)
        return self.full * length**2 + self.sliding * (length**2 - beyond**2)


NO_COST = AttentionCost()


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
    sequence_multiple: int = 1,
    one_length: bool = True,
    attention: AttentionCost = NO_COST,
) -> list[list[Row]]:
    """The rows of every data-parallel replica, for training as for scoring; deterministic.

    All replicas get equally many rows and cost about the same. A row is padded to a multiple of
    `pad_multiple`, and so may exceed `max_tokens` by less than that. Where there are fewer
    sequences than rows, some rows are empty: padding alone.

    Args:
        trajectories: of one update, in any order; those with advantage 0 count as well.
        max_tokens: budget of a row, prompts and responses together.
        num_replicas: size of the data-parallel group.
        rows_multiple: the rows of a replica are a multiple of this (interleaved pipelines).
        aggregation: gives the weights and what `num_items` counts: token-mean 1 per token and
            tokens; seq-mean-token-mean 1/length and sequences; seq-mean-token-sum-norm 1/horizon
            and sequences.
        horizon: divisor of seq-mean-token-sum-norm, in tokens.
        pad_multiple: divides the length S of every row.
        sequence_multiple: divides the place of every sequence in its row, 2 * cp_size under context
            parallelism. A shorter sequence is padded at its end, where no token of it looks.
        one_length: pad all rows to the length of the longest, as a pipeline needs. It shows where
            that is one long sequence, and the budget no longer than this one.
        attention: what attention costs, by which replicas are balanced.

    Returns:
        [num_replicas][rows of a replica], the dearest row first.

    Raises:
        ConfigError: a sequence is longer than `max_tokens`, its padding included.
        RolloutError: a token is not among the ids that it was drawn from.
    """
    lengths = [_place(trajectory, sequence_multiple) for trajectory in trajectories]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > max_tokens:
        rollout = trajectories[longest].rollout
        tokens = rollout.num_tokens
        padded = (
            f", padded to {lengths[longest]} for context parallelism"
            if lengths[longest] > tokens
            else ""
        )
        raise ConfigError(
            f"--max-tokens-per-microbatch {max_tokens}: {rollout.name} has {tokens} tokens, prompt "
            f"and response together{padded}; use at least {lengths[longest]}"
        )
    plan = _plan(
        lengths,
        max_tokens=max_tokens,
        num_replicas=num_replicas,
        rows_multiple=rows_multiple,
        pad_multiple=pad_multiple,
        one_length=one_length,
        attention=attention,
    )
    like = trajectories[0].rollout
    return [
        [
            _row(
                [trajectories[i] for i in row.members],
                row.size,
                sequence_multiple,
                aggregation,
                horizon,
                like,
            )
            for row in replica
        ]
        for replica in plan
    ]


def packing_statistics(
    updates: Sequence[Sequence[Sequence[Row]]],
    *,
    num_tokens: int,
    attention: AttentionCost = NO_COST,
) -> dict[str, float]:
    """How full the rows of a step are, and how much longer its dearest replicas take than the mean.

    Args:
        updates: what `pack` returned for each optimizer update of the step.
        num_tokens: of all sequences, prompts and responses, without any padding.
        attention: as `pack` was given.

    Returns:
        packing/efficiency: `num_tokens` / tokens of all rows, at most 1.
        packing/imbalance: cost of the dearest replica / mean cost, at least 1; both summed over
            the updates first, as replicas wait for each other at each.
    """
    sizes = [row.tokens.numel() for replicas in updates for rows in replicas for row in rows]
    costs = [[sum(_cost(row, attention) for row in rows) for rows in u] for u in updates]
    return {
        "packing/efficiency": num_tokens / sum(sizes),
        "packing/imbalance": sum(map(max, costs)) / sum(sum(c) / len(c) for c in costs),
    }


def _cost(row: Row, attention: AttentionCost) -> float:
    return row.tokens.numel() + sum(map(attention, row.cu_seqlens.diff().tolist()))


def _place(trajectory: Trajectory, multiple: int) -> int:
    """Tokens that the sequence takes up in its row."""
    return round_up(trajectory.rollout.num_tokens, multiple)


@dataclass(frozen=True)
class _Planned:
    """A row before its tensors are made. Example: _Planned(members=[3, 0], size=64, cost=71.5)."""

    members: Sequence[int]
    """Which sequences it holds."""
    size: int
    """S."""
    cost: float


def _plan(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_replicas: int,
    rows_multiple: int,
    pad_multiple: int,
    one_length: bool,
    attention: AttentionCost,
) -> list[list[_Planned]]:
    """The rows of every replica, in the one of two ways that is done sooner.

    Rows first, dealt to replicas then: the fewest rows, but a row of long sequences has no equal.
    Sequences first, each replica making rows of its own: the evenest cost, but more padding.
    """
    costs = [length + attention(length) for length in lengths]
    (rows,) = _fill(lengths, [range(len(lengths))], max_tokens, num_replicas * rows_multiple)
    row_costs = [sum(costs[i] for i in members) for members in rows]
    dealt = _deal(row_costs, num_replicas, len(rows) // num_replicas)
    rows_first = [[rows[number] for number in replica] for replica in dealt]
    shares = _deal(costs, num_replicas, len(costs))
    sequences_first = _fill(lengths, shares, max_tokens, rows_multiple)

    def planned(replicas: Sequence[Sequence[Sequence[int]]]) -> list[list[_Planned]]:
        used = [[sum(lengths[i] for i in members) for members in rows] for rows in replicas]
        least = max(map(max, used)) if one_length else 1
        plan = []
        for rows, tokens in zip(replicas, used, strict=True):
            sizes = [round_up(max(count, least), pad_multiple) for count in tokens]
            own = [sum(attention(lengths[i]) for i in members) for members in rows]
            found = [
                _Planned(members, size, size + cost)
                for members, size, cost in zip(rows, sizes, own, strict=True)
            ]
            plan.append(sorted(found, key=lambda row: -row.cost))
        return plan

    return min(
        planned(rows_first),
        planned(sequences_first),
        key=lambda plan: max(sum(row.cost for row in rows) for rows in plan),
    )


def _deal(costs: Sequence[float], num_replicas: int, most: int) -> list[list[int]]:
    """Items [num_replicas][at most `most`]: the dearest first, to whom has the least cost so far.

    The dearest replica has at most the mean and one item more, unless `most` gets in the way (LPT,
    Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    heap = [(0.0, replica) for replica in range(num_replicas)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        total, replica = heapq.heappop(heap)
        dealt[replica].append(item)
        if len(dealt[replica]) < most:
            heapq.heappush(heap, (total + costs[item], replica))
    return dealt


def _fill(
    lengths: Sequence[int], shares: Sequence[Sequence[int]], max_tokens: int, multiple: int
) -> list[list[list[int]]]:
    """The members of each share's rows: equally many rows, few, and of these the evenest found.

    Best fit decreasing says how many rows the share takes that needs most; then a bisection finds
    the smallest budget for which that many still do (MULTIFIT, Coffman, Garey and Johnson 1978).

    Args:
        shares: which of the sequences are in each.
        multiple: divides the number of rows of a share.
    """
    found = [_best_fit(lengths, share, max_tokens) for share in shares]
    num_rows = round_up(max(map(len, found)), multiple)
    heaviest = max(sum(lengths[i] for i in share) for share in shares)
    low, high = max(max(lengths), -(-heaviest // num_rows)), max_tokens
    while low < high:
        middle = (low + high) // 2
        fewer = [_best_fit(lengths, share, middle) for share in shares]
        if max(map(len, fewer)) <= num_rows:
            found, high = fewer, middle
        else:
            low = middle + 1
    return [rows + [[] for _ in range(num_rows - len(rows))] for rows in found]


def _best_fit(lengths: Sequence[int], share: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(share, key=lambda i: -lengths[i]):
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
    multiple: int,
    aggregation: Aggregation,
    horizon: int,
    like: Rollout,
) -> Row:
    """The members laid end to end, each padded to `multiple` and the row to `size`; see `Row`."""
    rollouts = [trajectory.rollout for trajectory in members]
    responses = torch.tensor([r.response_ids.numel() for r in rollouts], dtype=torch.int64)
    lengths = torch.tensor([rollout.num_tokens for rollout in rollouts], dtype=torch.int64)
    places = torch.tensor([_place(t, multiple) for t in members], dtype=torch.int64)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), places.cumsum(0)])
    starts, used, num_tokens = bounds[:-1], int(bounds[-1]), int(responses.sum())

    positions = torch.zeros(size, dtype=torch.int64)
    positions[:used] = torch.arange(used) - starts.repeat_interleave(places)
    tokens = torch.zeros(size, dtype=torch.int64)
    for start, rollout in zip(starts.tolist(), rollouts, strict=True):
        ids = torch.cat([rollout.prompt.token_ids, rollout.response_ids])
        tokens[start : start + ids.numel()] = ids
    sequence = torch.arange(len(members)).repeat_interleave(responses)
    # Response token t of the row, counted over all its responses, is predicted one place before its
    # own: the last of a response (t + 1 = responses so far) at the sequence's end - 2.
    ends = starts + lengths
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
        cu_seqlens=bounds.int(),
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
        names=tuple(rollout.name for rollout in rollouts),
        topk_ids=_join("topk_ids", rollouts, kept, like),
        behaviour_topk_logprobs=_join("topk_logprobs", rollouts, kept, like),
        kept_ids=_join_kept(rollouts, kept),
        experts=_join_experts(rollouts, starts.tolist(), size, like),
    )
    _check_kept(row)
    return row


def _join_experts(
    rollouts: Sequence[Rollout], starts: Sequence[int], size: int, like: Rollout
) -> Tensor | None:
    """[S, layers, k] of sequences that begin at `starts`; -1 where nothing was recorded."""
    if like.experts is None:
        return None
    experts = torch.full((size, *like.experts.shape[1:]), -1, dtype=torch.int16)
    for start, rollout in zip(starts, rollouts, strict=True):
        if rollout.experts is not None:
            experts[start : start + len(rollout.experts)] = rollout.experts
    return experts


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
