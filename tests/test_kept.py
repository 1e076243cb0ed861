"""Kept ids: picked out and imposed, packed into rows, and trained on in the model-parallel layouts.

The reference of a step is transformers in fp64 with a softmax over the kept ids alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.config import ObjectiveConfig, ParallelConfig
from megatron_drpo.errors import RolloutError
from megatron_drpo.objectives import build_objective
from megatron_drpo.packing import pack
from megatron_drpo.row_loss import OutputLayer, fused_loss, plain_loss, score
from megatron_drpo.types import KeptIds, Row, Trajectory
from megatron_drpo.vocab_parallel import cat_kept, holds, keep_only, outside, select_kept, uncut
from megatron_drpo.vocab_parallel.shard import Shard
from tests.distributed import run_distributed
from tests.test_layouts import (
    DELTA,
    HORIZON,
    TEMPERATURE,
    end,
    make_policy,
    trajectories,
    update_reference,
)
from tests.tiny_models import VOCAB, save_tiny, tiny_model

LAYOUTS = [(2, 1), (1, 2)]


def packed(batch: list[Trajectory], max_tokens: int = 1000) -> list[Row]:
    (rows,) = pack(
        batch,
        max_tokens=max_tokens,
        num_replicas=1,
        aggregation="seq-mean-token-sum-norm",
        horizon=HORIZON,
    )
    return rows


def make_kept(lists: list[list[int]]) -> KeptIds:
    ids = torch.tensor([i for ids in lists for i in ids], dtype=torch.int32)
    return KeptIds(ids, torch.tensor([len(ids) for ids in lists], dtype=torch.int64))


def lists(kept: KeptIds) -> list[list[int]]:
    return [ids.tolist() for ids in kept.ids.split(kept.counts.tolist())]


WIDTH = 9
some_lists = st.lists(st.lists(st.integers(0, WIDTH - 1), unique=True), max_size=6)


@settings(deadline=None)
@given(some_lists, some_lists, st.data())
def test_joining_and_picking_out(one: list[list[int]], two: list[list[int]], data) -> None:
    both = cat_kept([make_kept(one), make_kept(two), uncut(2)])
    expected = [*one, *two, [], []]
    assert lists(both) == expected
    count = len(expected)
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    picked = select_kept(both, torch.tensor(mask, dtype=torch.bool))
    assert lists(picked) == [ids for ids, take in zip(expected, mask, strict=True) if take]
    index = data.draw(st.lists(st.integers(0, count - 1)))
    picked = select_kept(both, torch.tensor(index, dtype=torch.int64))
    assert lists(picked) == [expected[i] for i in index]
    part = slice(data.draw(st.none() | st.integers(0, count)), data.draw(st.integers(0, count)))
    assert lists(select_kept(both, part)) == expected[part]


@settings(deadline=None)
@given(some_lists, st.integers(1, WIDTH), st.integers(0, 2), st.data())
def test_cut_ids_are_found_on_every_shard(kept_lists, columns: int, missing: int, data) -> None:
    kept, vocab = make_kept(kept_lists), max(WIDTH - missing, 1)
    logits = torch.randn(len(kept_lists), WIDTH + columns)
    for start in range(0, WIDTH, columns):
        shard = Shard(start, min(max(vocab - start, 0), columns), vocab)
        mine = logits[:, start : start + columns]
        cut = outside(kept, columns, shard)
        expected = [
            [bool(ids) and not (c < shard.real and start + c in ids) for c in range(columns)]
            for ids in kept_lists
        ]
        assert cut.tolist() == expected
        imposed = keep_only(mine.clone(), kept, shard)
        assert torch.equal(imposed, mine.masked_fill(cut, -torch.inf))
    ids = [data.draw(st.integers(0, WIDTH - 1)) for _ in kept_lists]
    expected = [not k or i in k for k, i in zip(kept_lists, ids, strict=True)]
    assert holds(kept, torch.tensor(ids, dtype=torch.int64)).tolist() == expected


# Rows.


def truncated_trajectories() -> list[Trajectory]:
    """Of `trajectories`, all responses but every third one with kept ids, the sampled one among
    them; and one token of each response without."""
    generator = torch.Generator().manual_seed(8)
    out = []
    for number, trajectory in enumerate(trajectories()):
        rollout = trajectory.rollout
        kept = []
        for place, token in enumerate(rollout.response_ids.tolist()):
            others = torch.randperm(VOCAB, generator=generator)[: 1 + 3 * (place % 5)].tolist()
            kept.append([token, *(i for i in others if i != token)] if place != 1 else [])
        if number % 3:
            rollout = replace(rollout, kept_ids=make_kept(kept))
        out.append(replace(trajectory, rollout=rollout))
    return out


def kept_of(trajectory: Trajectory) -> list[list[int]]:
    rollout = trajectory.rollout
    if rollout.kept_ids is None:
        return [[] for _ in rollout.response_ids]
    return lists(rollout.kept_ids)


def test_rows_carry_the_kept_ids_of_their_loss_tokens() -> None:
    batch = truncated_trajectories()
    length = batch[4].rollout.response_ids.numel()
    mask = torch.arange(length) % 2 == 0
    batch[4] = replace(batch[4], rollout=replace(batch[4].rollout, loss_mask=mask))
    (row,) = packed(batch)
    assert row.kept_ids is not None
    by_name = {f"sample 0 of prompt p{n}": trajectory for n, trajectory in enumerate(batch)}
    expected = []
    for name in row.names:
        kept = kept_of(by_name[name])
        if by_name[name] is batch[4]:
            kept = [ids for ids, trained in zip(kept, mask.tolist(), strict=True) if trained]
        expected += kept
    assert lists(row.kept_ids) == expected
    untruncated = [t for t in batch if t.rollout.kept_ids is None]
    assert all(row.kept_ids is None for row in packed(untruncated, 64))


def test_a_token_that_was_not_kept_is_refused_by_name() -> None:
    """p5's second response token, after its prompt; its kept ids are another token's."""
    batch = truncated_trajectories()
    rollout = batch[5].rollout
    token = int(rollout.response_ids[1])
    kept = kept_of(batch[5])
    kept[1] = [(token + 1) % VOCAB, (token + 2) % VOCAB]
    batch[5] = replace(batch[5], rollout=replace(rollout, kept_ids=make_kept(kept)))
    with pytest.raises(RolloutError) as caught:
        packed(batch, 64)
    place = rollout.prompt.token_ids.numel() + 1
    assert f"token {token} at position {place} of sample 0 of prompt p5" in str(caught.value)
    assert "among the 2 ids" in str(caught.value)


def reference_log_probs(logits: Tensor, row: Row) -> Tensor:
    assert row.kept_ids is not None
    z = logits[:, :VOCAB] / TEMPERATURE
    cut = torch.zeros_like(z, dtype=torch.bool)
    for token, ids in enumerate(lists(row.kept_ids)):
        if ids:
            cut[token] = True
            cut[token, ids] = False
    return z.masked_fill(cut, -torch.inf).log_softmax(-1)


def test_score_and_both_ways_to_the_loss() -> None:
    """Value and gradient of DRPO with an entropy bonus and a KL penalty between whole (truncated)
    distributions, against autograd in fp64."""
    (row,) = packed(truncated_trajectories())
    layer = OutputLayer(vocab_size=VOCAB, temperature=TEMPERATURE, group=None)
    objective = build_objective(
        ObjectiveConfig(drpo_delta=DELTA, entropy_coef=0.1, kl_coef=0.2, kl_estimator="full")
    )
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(row.tokens.numel(), 8, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB + 3, 8, generator=generator).requires_grad_()
    other, other_weight = torch.randn(row.targets.numel(), 8), torch.randn(VOCAB + 3, 8)

    logits = hidden.double()[row.loss_index] @ weight.double().T
    log_p = reference_log_probs(logits, row)
    log_q = reference_log_probs(other.double() @ other_weight.double().T, row)
    chosen = log_p.gather(-1, row.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(-1)
    kl = (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0)).sum(-1)
    mu, advantages = row.behaviour_logprobs.double().exp(), row.advantages.double()
    ratio = chosen.exp() / mu
    gain = ratio * advantages - advantages.abs() / (2 * DELTA) * mu * (ratio - 1).square()
    loss_ = -((gain + 0.1 * entropy - 0.2 * kl) * row.weights.double()).sum()
    gradients_ = torch.autograd.grad(loss_, (hidden, weight))

    scores = score(row, hidden, weight, layer)
    torch.testing.assert_close(scores.logprobs.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    row = replace(row, old_logprobs=scores.logprobs, reference_hidden=other)
    logits = hidden[row.loss_index] @ weight.T
    for loss, said in (
        fused_loss(row, hidden, weight, layer, objective, reference_weight=other_weight),
        plain_loss(row, logits, layer, objective, reference_weight=other_weight),
    ):
        torch.testing.assert_close(loss.double(), loss_, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        for found, wanted in zip(gradients, gradients_, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(said.logprobs, said.old_logprobs)


# Layouts.


def reference_loss(model: Any) -> Tensor:
    """DRPO on `truncated_trajectories`, in loops."""
    batch = truncated_trajectories()
    total = torch.zeros((), dtype=torch.float64)
    for trajectory in batch:
        rollout, a = trajectory.rollout, trajectory.advantage
        prompt, response = rollout.prompt.token_ids, rollout.response_ids
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        kept = kept_of(trajectory)
        for t, token in enumerate(response.tolist()):
            z = logits[len(prompt) - 1 + t]
            total_mass = (z[kept[t]] if kept[t] else z).logsumexp(-1)
            mu = math.exp(float(rollout.behaviour_logprobs[t]))
            r = (z[token] - total_mass).exp() / mu
            total = total - (r * a - abs(a) / (2 * DELTA) * mu * (r - 1) ** 2) / HORIZON
    return total / len(batch)


def _ranks(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo.mcore.policy import Policy
    from megatron_drpo.mcore.weights import export
    from megatron_drpo.rollout.engine import Request, Sampling
    from megatron_drpo.rollout.inprocess import InProcessEngine

    source = root / "model"
    for tp, pp in LAYOUTS:
        layout, policy = make_policy(source, rank, ParallelConfig(tp, pp), budget=40)
        fixed = Policy.load(
            policy.config,
            policy.architecture,
            layout,
            policy.device,
            weights=source,
            training=False,
        )
        assert not hasattr(fixed, "optimizer")
        assert not any(hasattr(p, "main_grad") for m in fixed.models for p in m.parameters())
        prompts = [trajectory.rollout.prompt.token_ids for trajectory in trajectories()]
        requests = [Request(prompt, stream) for stream, prompt in enumerate(prompts)]
        sampling = Sampling(TEMPERATURE, 0.9, 12, 10, stop_ids=(2,), seed=5)
        drawn = InProcessEngine(fixed, max_slots=5).generate(requests, sampling)
        fresh = [
            replace(
                old,
                rollout=replace(
                    old.rollout,
                    response_ids=new.response_ids,
                    behaviour_logprobs=new.logprobs,
                    kept_ids=new.kept_ids,
                ),
            )
            for old, new in zip(trajectories(), drawn, strict=True)
        ]
        result: dict[str, Any] = {
            "drawn": [c.response_ids.tolist() for c in drawn],
            "kept": [lists(c.kept_ids) for c in drawn if c.kept_ids is not None],
        }
        rows = policy.pack(fresh)
        gaps: dict[str, list[float]] = {"sampled": [], "whole": [], "hot": []}
        for each in (policy, fixed):
            for name, scored in (
                ("sampled", each.score(rows)),
                ("whole", each.score(rows, untruncated=True)),
                ("hot", each.score(rows, temperature=3.0)),
            ):
                for scores, row in zip(scored, rows, strict=False):
                    gaps[name] += (scores.logprobs - row.behaviour_logprobs).tolist()
        result["gaps"] = gaps
        rows = policy.pack(truncated_trajectories())
        result["loss"], _ = policy.forward_backward(*policy.annotate([rows]))
        result["grad_norm"] = policy.optim_step().grad_norm
        export(root / f"{tp}-{pp}", source, policy.architecture, policy.models, layout)
        everyone = layout.gather_objects(result)
        if rank == 0:
            (root / f"{tp}-{pp}.json").write_text(json.dumps(everyone))
        end(layout, policy, root)


@pytest.mark.distributed
def test_a_truncated_batch_in_layouts(tmp_path: Path) -> None:
    """Generated without a gap, and trained on with the loss and the gradients of transformers."""
    save_tiny(tmp_path / "model", "qwen3")
    run_distributed(_ranks, 2, tmp_path)
    model = tiny_model("qwen3", dtype=torch.float64)
    loss = reference_loss(model)
    loss.backward()
    norm = update_reference(model)
    weights = dict(model.named_parameters())
    first = None
    for tp, pp in LAYOUTS:
        for rank in json.loads((tmp_path / f"{tp}-{pp}.json").read_text()):
            first = first or rank
            assert rank["drawn"] == first["drawn"] and rank["kept"] == first["kept"]
            assert len(rank["kept"]) == len(trajectories())
            for ids, kept in zip(rank["drawn"], rank["kept"], strict=True):
                assert all(i in k for i, k in zip(ids, kept, strict=True))
                assert all(1 <= len(k) <= 12 for k in kept)
            if pp == 1 or rank["gaps"]["sampled"]:
                assert set(rank["gaps"]["sampled"]) == {0.0}
                assert max(rank["gaps"]["whole"]) < 0 < len(rank["gaps"]["whole"])
                assert min(map(abs, rank["gaps"]["hot"])) < 1 and any(rank["gaps"]["hot"])
            assert rank["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
            assert rank["grad_norm"] == pytest.approx(norm, rel=1e-5)
        exported = {}
        for file in (tmp_path / f"{tp}-{pp}").glob("*.safetensors"):
            exported |= load_file(file)
        for name, value in exported.items():
            wanted = weights[name].detach()
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-5, msg=name)
