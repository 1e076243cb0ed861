"""Packing against loops over tokens: nothing lost, nothing counted twice, whatever the layout."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_drpo.config import Aggregation
from megatron_drpo.errors import ConfigError
from megatron_drpo.packing import AttentionCost, pack, packing_statistics, split_updates
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory

AGGREGATIONS: list[Aggregation] = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
HORIZON = 7


def trajectory(
    number: int,
    prompt: list[int],
    response: list[int],
    advantage: float = 0.5,
    group: int = 1,
    mask: list[bool] | None = None,
) -> Trajectory:
    # Each log-prob is a number of its own, so that a token can be told from all others.
    logprobs = torch.tensor([-(number + 1) - i / 64 for i in range(len(response))])
    ids = torch.tensor(response)
    if mask is not None:
        logprobs[~torch.tensor(mask)] = torch.nan
    return Trajectory(
        Rollout(
            prompt=Prompt(f"p{number // group}", "", torch.tensor(prompt), None),
            sample=number % group,
            response_ids=ids,
            behaviour_logprobs=logprobs,
            finish_reason="stop",
            policy_version=0,
            response_text="",
            topk_ids=torch.stack([ids + 1, ids + 2], 1),
            topk_logprobs=torch.stack([logprobs - 1, logprobs - 2], 1),
            loss_mask=None if mask is None else torch.tensor(mask),
        ),
        reward=1.0,
        advantage=advantage,
    )


@st.composite
def batches(draw) -> list[Trajectory]:
    ids = st.lists(st.integers(1, 99), min_size=1, max_size=20)
    shapes = draw(
        st.lists(
            st.tuples(ids, ids, st.sampled_from([0.0, -0.5, 1.25]), st.booleans()),
            min_size=1,
            max_size=25,
        )
    )
    batch = []
    for number, (prompt, response, advantage, masked) in enumerate(shapes):
        mask = None
        if masked:  # a tool wrote every third token, and the first of all
            mask = [i % 3 != 0 or len(response) == 1 for i in range(len(response))]
        batch.append(trajectory(number, prompt, response, advantage, mask=mask))
    return batch


def trained(rollout: Rollout) -> list[bool]:
    mask = rollout.loss_mask
    return [True] * rollout.response_ids.numel() if mask is None else mask.tolist()


def weight_of(aggregation: str, length: int) -> float:
    table = {
        "token-mean": 1.0,
        "seq-mean-token-mean": 1 / length,
        "seq-mean-token-sum-norm": 1 / HORIZON,
    }
    return torch.tensor(table[aggregation]).item()


def loss_tokens(rows: list[Row]) -> Counter:
    """Every loss token as (what precedes it in its sequence, target, mu, advantage, weight)."""
    found: Counter = Counter()
    for row in rows:
        for t, place in enumerate(row.loss_index.tolist()):
            start = row.cu_seqlens[row.sequence[t]].item()
            end = row.cu_seqlens[row.sequence[t] + 1].item()
            assert start <= place < end - 1
            assert row.tokens[place + 1] == row.targets[t]
            assert row.topk_ids is not None and row.behaviour_topk_logprobs is not None
            assert (row.topk_ids[t] - row.targets[t]).tolist() == [1, 2]
            assert (row.behaviour_topk_logprobs[t] - row.behaviour_logprobs[t]).tolist() == [-1, -2]
            key = (
                tuple(row.tokens[start : place + 1].tolist()),
                row.targets[t].item(),
                row.behaviour_logprobs[t].item(),
                row.advantages[t].item(),
                row.weights[t].item(),
            )
            found[key] += 1
    return found


def expected_tokens(batch: list[Trajectory], aggregation: str) -> Counter:
    wanted: Counter = Counter()
    for item in batch:
        rollout = item.rollout
        response = rollout.response_ids.tolist()
        mask = trained(rollout)
        for i, token in enumerate(response):
            if not mask[i]:
                continue
            context = (*rollout.prompt.token_ids.tolist(), *response[:i])
            logprob = rollout.behaviour_logprobs[i].item()
            weight = weight_of(aggregation, sum(mask))
            wanted[context, token, logprob, item.advantage, weight] += 1
    return wanted


def test_the_example_of_the_row_docstring():
    batch = [trajectory(0, [5, 6], [8, 2], 1.0), trajectory(1, [7], [2], -1.0)]
    for aggregation, num_items in zip(AGGREGATIONS, (3, 2, 2), strict=True):
        ((row,),) = pack(
            batch,
            max_tokens=8,
            num_replicas=1,
            aggregation=aggregation,
            horizon=HORIZON,
            pad_multiple=8,
        )
        assert row.tokens.tolist() == [5, 6, 8, 2, 7, 2, 0, 0]
        assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0]
        assert row.cu_seqlens.tolist() == [0, 4, 6]
        assert row.loss_index.tolist() == [1, 2, 4]
        assert row.targets.tolist() == [8, 2, 2]
        assert row.sequence.tolist() == [0, 0, 1]
        assert row.advantages.tolist() == [1.0, 1.0, -1.0]
        assert row.behaviour_logprobs.tolist() == [-1.0, -1 - 1 / 64, -2.0]
        assert row.num_items == num_items


@settings(max_examples=150, deadline=None)
@given(
    batches(),
    st.sampled_from(AGGREGATIONS),
    st.integers(40, 200),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 8, 16]),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
)
def test_every_token_once_in_rows_that_keep_the_budget(
    batch,
    aggregation,
    max_tokens,
    replicas,
    rows_multiple,
    pad_multiple,
    sequence_multiple,
    one_length,
    attention,
):
    packed = pack(
        batch,
        max_tokens=max_tokens,
        num_replicas=replicas,
        rows_multiple=rows_multiple,
        aggregation=aggregation,
        horizon=HORIZON,
        pad_multiple=pad_multiple,
        sequence_multiple=sequence_multiple,
        one_length=one_length,
        attention=AttentionCost(attention),
    )
    rows = [row for replica in packed for row in replica]
    assert len(packed) == replicas
    assert {len(replica) for replica in packed} == {len(rows) // replicas}
    assert len(packed[0]) % rows_multiple == 0

    assert loss_tokens(rows) == expected_tokens(batch, aggregation)
    tokens = sum(sum(trained(item.rollout)) for item in batch)
    oracle = tokens if aggregation == "token-mean" else len(batch)
    assert sum(row.num_items for row in rows) == oracle

    used = [int(row.cu_seqlens[-1]) for row in rows]
    assert max(used) <= max_tokens
    wanted = [max(used)] * len(rows) if one_length else [max(n, 1) for n in used]
    padded = [math.ceil(n / pad_multiple) * pad_multiple for n in wanted]
    assert [row.tokens.numel() for row in rows] == padded
    by_name = {f"sample {t.rollout.sample} of prompt {t.rollout.prompt.id}": t for t in batch}
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        assert bounds[0] == 0 and len(bounds) == len(row.names) + 1
        ids, positions = [], []
        for name, start, end in zip(row.names, bounds, bounds[1:], strict=False):
            rollout = by_name[name].rollout
            sequence = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
            place = math.ceil(len(sequence) / sequence_multiple) * sequence_multiple
            assert end - start == place
            ids += sequence + [0] * (place - len(sequence))
            positions += range(place)
        padding = [0] * (row.tokens.numel() - bounds[-1])
        assert row.tokens.tolist() == ids + padding
        assert row.positions.tolist() == positions + padding
        assert row.loss_index.tolist() == sorted(set(row.loss_index.tolist()))
        dtypes = [row.tokens, row.positions, row.loss_index, row.targets, row.sequence]
        assert {tensor.dtype for tensor in dtypes} == {torch.int64}
        assert row.cu_seqlens.dtype == torch.int32
        floats = [row.behaviour_logprobs, row.advantages, row.weights]
        assert {tensor.dtype for tensor in floats} == {torch.float32}


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from(AGGREGATIONS), st.integers(40, 500), st.integers(1, 5))
def test_the_loss_does_not_depend_on_budget_or_replicas(batch, aggregation, max_tokens, replicas):
    def loss(max_tokens: int, replicas: int) -> float:
        packed = pack(
            batch,
            max_tokens=max_tokens,
            num_replicas=replicas,
            aggregation=aggregation,
            horizon=HORIZON,
        )
        rows = [row for replica in packed for row in replica]
        # Any function of a token's own numbers may stand for its loss.
        total = sum(
            (row.weights.double() * row.behaviour_logprobs.double() * row.advantages).sum().item()
            for row in rows
        )
        return total / sum(row.num_items for row in rows)

    per_sequence = []
    for item in batch:
        rollout = item.rollout
        pairs = zip(rollout.behaviour_logprobs.tolist(), trained(rollout), strict=True)
        logprobs = [logprob for logprob, kept in pairs if kept]
        # A row holds advantages and weights in fp32: what their rounding does to a sum that nearly
        # cancels is not what is asked here.
        advantage = torch.tensor(item.advantage, dtype=torch.float32).item()
        terms = [advantage * logprob for logprob in logprobs]
        divisor = {
            "token-mean": 1,
            "seq-mean-token-mean": len(terms),
            "seq-mean-token-sum-norm": HORIZON,
        }[aggregation]
        weight = torch.tensor(1 / divisor, dtype=torch.float32).item()
        per_sequence.append((sum(terms) * weight, len(terms)))
    items = sum(n for _, n in per_sequence) if aggregation == "token-mean" else len(batch)
    oracle = sum(value for value, _ in per_sequence) / items
    assert loss(max_tokens, replicas) == pytest.approx(oracle, rel=1e-6, abs=1e-9)


def of_lengths(lengths: list[int]) -> list[Trajectory]:
    return [trajectory(i, [1], [2] * (n - 1)) for i, n in enumerate(lengths)]


def test_rows_are_few_and_even():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 270, (512,), generator=generator).tolist()
    batch = of_lengths(lengths)
    packed = pack(batch, max_tokens=4096, num_replicas=4, aggregation="token-mean", horizon=1)
    rows = [row for replica in packed for row in replica]
    assert len(rows) <= math.ceil(sum(lengths) / 4096 / 4) * 4
    assert rows[0].tokens.numel() * len(rows) < 1.02 * sum(lengths)
    loads = [sum(int(row.cu_seqlens[-1]) for row in replica) for replica in packed]
    assert max(loads) < 1.02 * min(loads)


def lognormal(seed: int, longest: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(5.5 + 0.8 * torch.randn(512, generator=generator))
    return lengths.clamp(2, longest).long().tolist()


@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192, 16384])
def test_rows_of_lognormal_lengths_are_full_and_replicas_even(max_tokens):
    lengths = lognormal(0, max_tokens)
    batch, total, attention = of_lengths(lengths), sum(lengths), AttentionCost(full=1e-4)
    for replicas in (1, 2, 4, 8):
        for one_length in (False, True):
            packed = pack(
                batch,
                max_tokens=max_tokens,
                num_replicas=replicas,
                aggregation="token-mean",
                horizon=1,
                one_length=one_length,
                attention=attention,
            )
            found = packing_statistics([packed], num_tokens=total, attention=attention)
            if one_length:
                # No packing can beat this: every row is at least as long as the longest sequence,
                # and the number of rows is a multiple of the replicas.
                least = math.ceil(total / (max_tokens * replicas))
                counts = [rows * replicas for rows in range(least, least + 20)]
                best = max(total / (max(max(lengths), total / n) * n) for n in counts)
                assert found["packing/efficiency"] >= min(0.95, 0.99 * best)
                assert found["packing/imbalance"] < 1.1
            else:
                assert found["packing/efficiency"] > 0.99
                assert found["packing/imbalance"] < 1.01


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=40),
    st.integers(60, 200),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_the_dearest_replica_has_at_most_the_mean_and_one_sequence(
    lengths, max_tokens, replicas, attention
):
    """Of greedy assignment (Graham 1969), which is one of the two ways; the other is no worse."""
    packed = pack(
        of_lengths(lengths),
        max_tokens=max_tokens,
        num_replicas=replicas,
        aggregation="token-mean",
        horizon=1,
        pad_multiple=1,
        one_length=False,
        attention=AttentionCost(attention),
    )
    costs = [
        sum(n + attention * n * n for row in replica for n in row.cu_seqlens.diff().tolist())
        for replica in packed
    ]
    items = [n + attention * n * n for n in lengths]
    bound = sum(items) / replicas + (1 - 1 / replicas) * max(items)
    # An empty row, of which there is at most one for each that is not, is a token of padding.
    assert max(costs) <= bound + len(lengths) + 1e-6


def test_long_sequences_are_shared_out_by_what_attention_costs_them():
    # By tokens alone, [40, 40] and [10] * 8 are even; by the squares 3200 against 800.
    batch = of_lengths([40, 40] + [10] * 8)

    def longs(attention: AttentionCost) -> list[int]:
        packed = pack(
            batch,
            max_tokens=80,
            num_replicas=2,
            aggregation="token-mean",
            horizon=1,
            attention=attention,
        )
        return [
            sum(int((row.cu_seqlens.diff() == 40).sum()) for row in replica) for replica in packed
        ]

    assert longs(AttentionCost(full=0.1)) == [1, 1]
    # Whatever the rest costs, a window as short as the short sequences makes the long ones linear:
    # 10 tokens cost 100, 40 cost 40^2 - 30^2 = 700 or 1.75 times as much a token.
    assert AttentionCost(sliding=1.0, window=10)(40) == 700
    assert AttentionCost(full=2.0, sliding=1.0, window=50)(40) == 3 * 1600


@pytest.mark.parametrize("window", [None, 100])
def test_attention_costs_as_many_pairs_as_it_sees(window):
    cost = AttentionCost(full=1.0) if window is None else AttentionCost(sliding=1.0, window=window)
    for length in (50, 400):
        pairs = sum(min(i + 1, window or length) for i in range(length))
        assert cost(length) == pytest.approx(2 * pairs, rel=1 / 50)


def test_statistics_are_of_all_replicas_and_updates():
    def packed(lengths: list[int], **options) -> list[list[Row]]:
        batch = of_lengths(lengths)
        return pack(batch, num_replicas=2, aggregation="token-mean", horizon=1, **options)

    # Rows of 16 tokens each: [16] and [4] in the first update, [12] and [] in the second.
    updates = [packed([16, 4], max_tokens=16), packed([12], max_tokens=16)]
    found = packing_statistics(updates, num_tokens=32, attention=AttentionCost(0.25))
    assert found["packing/efficiency"] == 32 / 64
    costs = [(16 + 64, 16 + 4), (16 + 36, 16)]
    mean = sum(sum(pair) / 2 for pair in costs)
    assert found["packing/imbalance"] == pytest.approx(sum(map(max, costs)) / mean)
    # What pads a sequence is no token of it, but it is computed.
    padded = [packed([13, 13], max_tokens=16, sequence_multiple=8)]
    found = packing_statistics(padded, num_tokens=26, attention=AttentionCost(0.25))
    assert found == {"packing/efficiency": 26 / 32, "packing/imbalance": 1.0}


def test_a_replica_without_sequences_gets_an_empty_row():
    packed = pack(
        [trajectory(0, [5], [6])],
        max_tokens=16,
        num_replicas=3,
        rows_multiple=2,
        aggregation="token-mean",
        horizon=1,
    )
    rows = [row for replica in packed for row in replica]
    assert len(rows) == 6 and sum(row.num_items for row in rows) == 1
    empty = [row for row in rows if not row.num_items]
    assert len(empty) == 5
    for row in empty:
        assert row.tokens.tolist() == [0] * 16 and row.cu_seqlens.tolist() == [0]
        assert row.loss_index.numel() == row.weights.numel() == row.behaviour_logprobs.numel() == 0


def test_the_same_batch_packs_the_same_way():
    def packed() -> list[list[list[int]]]:
        batch = [trajectory(i, [i + 1] * (1 + i % 5), [i + 1] * (1 + i % 3)) for i in range(40)]
        result = pack(batch, max_tokens=16, num_replicas=2, aggregation="token-mean", horizon=1)
        return [[row.tokens.tolist() for row in replica] for replica in result]

    assert packed() == packed()


def test_a_sequence_beyond_the_budget_is_refused():
    batch = [trajectory(0, [1], [2]), trajectory(1, [1] * 9, [2] * 8)]
    with pytest.raises(ConfigError, match=r"--max-tokens-per-microbatch 16: .*p1 has 17 tokens"):
        pack(batch, max_tokens=16, num_replicas=1, aggregation="token-mean", horizon=1)
    pack(batch, max_tokens=17, num_replicas=1, aggregation="token-mean", horizon=1)
    padded = partial(pack, num_replicas=1, aggregation="token-mean", horizon=1, sequence_multiple=4)
    message = r"17: .*p1 has 17 tokens, .*, padded to 20 for context parallelism; use at least 20"
    with pytest.raises(ConfigError, match=message):
        padded(batch, max_tokens=17)
    padded(batch, max_tokens=20)


@pytest.mark.parametrize("seed", [0, (3, 4)])
def test_updates_share_whole_groups_equally(seed):
    batch = [trajectory(i, [1], [2], group=3) for i in range(36)]
    shares = split_updates(batch, 3, 4, seed)
    assert [len(share) for share in shares] == [9] * 4
    flat = [item for share in shares for item in share]
    assert {id(item) for item in flat} == {id(item) for item in batch} and len(flat) == 36
    for share in shares:
        for start in range(0, 9, 3):
            group = share[start : start + 3]
            assert len({item.rollout.prompt.id for item in group}) == 1
            assert [item.rollout.sample for item in group] == [0, 1, 2]


def test_the_order_of_updates_is_the_seeds():
    batch = [trajectory(i, [1], [2]) for i in range(32)]

    def order(seed) -> list[str]:
        return [t.rollout.prompt.id for share in split_updates(batch, 1, 2, seed) for t in share]

    assert order(5) == order(5)
    assert len({tuple(order(seed)) for seed in (5, 6, (5, 1), (5, 2))}) == 4


def test_groups_that_cannot_be_shared_equally_are_refused():
    batch = [trajectory(i, [1], [2], group=2) for i in range(10)]
    with pytest.raises(ConfigError, match=r"--updates-per-rollout 4: .*\b5 prompts"):
        split_updates(batch, 2, 4, 0)
