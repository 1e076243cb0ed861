"""Routing replay: experts recorded while generating or scoring are those that training then takes.

The reference is transformers with routers that take the experts they are given, which are random
ones and not their own: only replay can then give the same log-probs and gradients.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.arguments import parse
from megatron_drpo.config import MemoryConfig, MoEConfig, OptimizerConfig, ParallelConfig
from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.files import read_rollouts, write_rollouts
from megatron_drpo.types import Trajectory
from tests.distributed import run_distributed
from tests.test_layouts import (
    SHOWS_GRADIENTS,
    end,
    make_policy,
    reference_loss,
    trajectories,
    update_reference,
)
from tests.tiny_models import EXPERTS, EXPERTS_PER_TOKEN, LAYERS, VOCAB, hf_classes, save_tiny
from tests.tiny_run import make_tiny_run

WORLD = 4
SLOTS = 5
LAW = Sampling(1.0, 1.0, 0, 8, stop_ids=(2, 9), seed=5, record_experts=True)
ROLLOUT, SCORE = MoEConfig("rollout"), MoEConfig("score")
# One takes the softmax of all experts' scores, the other of the chosen ones'.
FAMILIES = {"qwen3_moe": {"norm_topk_prob": False}, "mixtral": {}}
SP = {"sequence_parallel": True}
UNIFORM = MemoryConfig("full", "uniform", 1)
RECOMPUTED = {
    "uniform": UNIFORM,
    "uniform2": MemoryConfig("full", "uniform", 2),
    "block": MemoryConfig("full", "block", 1),
    "moe": MemoryConfig("selective", recompute_modules=("moe",)),
}


def save(root: Path) -> None:
    for family, changes in FAMILIES.items():
        save_tiny(root / family, family, **changes)


def with_experts() -> list[Trajectory]:
    """`trajectories`, whose tokens were routed to random experts."""
    generator = torch.Generator().manual_seed(11)
    out = []
    for each in trajectories():
        rollout = each.rollout
        tokens = rollout.prompt.token_ids.numel() + rollout.response_ids.numel() - 1
        order = torch.rand((tokens, LAYERS, EXPERTS), generator=generator).argsort(-1)
        experts = order[..., :EXPERTS_PER_TOKEN].to(torch.uint8)
        out.append(replace(each, rollout=replace(rollout, experts=experts)))
    return out


class Routed:
    """A model of transformers in fp64, of whose routers one sees and says what they take."""

    def __init__(self, root: Path, family: str) -> None:
        _, model_class = hf_classes(family)
        self.model = model_class.from_pretrained(root / family, dtype=torch.float64).eval()
        self.model.config._experts_implementation = "eager"
        self.given: dict[tuple[int, ...], Tensor] = {}
        """Of a sequence of token ids: experts [tokens or one fewer, layers, k] to take."""
        self.own: dict[tuple[int, ...], Tensor] = {}
        """Of a sequence that was seen: [tokens, layers, k], what routers would have taken."""
        self.margin = torch.inf
        """Between the scores of a router's last chosen expert and of the next one, at least."""
        self._normalized = FAMILIES[family].get("norm_topk_prob", True)
        for number, layer in enumerate(self.model.model.layers):
            layer.mlp.gate.forward = lambda hidden, n=number, g=layer.mlp.gate: self._route(
                n, g.weight, hidden
            )

    def __call__(self, ids: Tensor) -> Any:
        self._now = tuple(ids[0].tolist())
        self._taken: list[Tensor] = []
        out = self.model(ids)
        self.own[self._now] = torch.stack(self._taken, 1)
        return out

    def _route(self, number: int, weight: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        logits = hidden.reshape(-1, hidden.size(-1)) @ weight.T
        probs = logits.softmax(-1)
        values, own = probs.topk(EXPERTS_PER_TOKEN + 1)
        self.margin = min(self.margin, float((values[:, -2] - values[:, -1]).min()))
        own = own[:, :-1]
        self._taken.append(own)
        chosen = own.clone()
        given = self.given.get(self._now)
        if given is not None:
            chosen[: len(given)] = given[:, number].long()
        weights = probs.gather(1, chosen)
        if self._normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen


class Reference(NamedTuple):
    loss: float
    norm: float
    scores: dict[tuple[float, int], float]
    """By the advantage, which tells the sequences apart, and the position before the token."""
    differs: float
    """Share of the loss tokens' choices that the routers would have made otherwise."""
    weights: dict[str, Tensor]
    """After the update."""


def reference(root: Path, family: str) -> Reference:
    routed, batch = Routed(root, family), with_experts()
    for each in batch:
        ids = torch.cat([each.rollout.prompt.token_ids, each.rollout.response_ids])
        routed.given[tuple(ids.tolist())] = each.rollout.experts  # type: ignore[assignment]
    loss, scores = reference_loss(routed)
    loss.backward()
    norm = update_reference(routed.model)
    routed.model.save_pretrained(root / f"{family}-updated")
    weights = load_file(root / f"{family}-updated" / "model.safetensors")
    places, differing = {}, []
    for each, of_response in zip(batch, scores, strict=True):
        first = each.rollout.prompt.token_ids.numel() - 1
        places |= {(round(each.advantage, 5), first + t): s for t, s in enumerate(of_response)}
    for ids, own in routed.own.items():
        given = routed.given[ids].long()
        response = next(
            each.rollout.response_ids.numel()
            for each in batch
            if tuple(torch.cat([each.rollout.prompt.token_ids, each.rollout.response_ids]).tolist())
            == ids
        )
        differ = (own[:-1].sort(-1).values != given.sort(-1).values).any(-1)
        differing.append(differ[-response:].flatten())
    differs = float(torch.cat(differing).double().mean())
    return Reference(float(loss.detach()), norm, places, differs, weights)


def scores_of(policy: Any, rows: Sequence[Any]) -> list[list[float]]:
    return [
        [float(row.advantages[t]), int(row.positions[row.loss_index[t]]), float(s.logprobs[t])]
        for row, s in zip(rows, policy.score(rows), strict=False)
        for t in range(row.targets.numel())
    ]


def gradients(policy: Any) -> str:
    """A digest of every gradient on this rank."""
    digest = hashlib.sha256()
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.main_grad.numpy().tobytes())
    return digest.hexdigest()


# Four ranks: every layout in one start of the processes.


class Case(NamedTuple):
    family: str
    sizes: ParallelConfig
    memory: MemoryConfig = MemoryConfig()


CASES = {
    "dp4": Case("qwen3_moe", ParallelConfig()),
    "tp2-sp-ep2": Case("mixtral", ParallelConfig(2, expert_model_parallel_size=2, **SP)),
    "pp2-ep2": Case("qwen3_moe", ParallelConfig(1, 2, expert_model_parallel_size=2)),
    "pp2-vp2": Case("mixtral", ParallelConfig(1, 2, 2)),
    "cp2-ep2": Case(
        "qwen3_moe", ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2)
    ),
}
AGAIN = {"pp2-ep2": RECOMPUTED["uniform"], "pp2-vp2": RECOMPUTED["moe"]}
"""Layouts that are also trained with less kept."""


def generate(policy: Any, requests: Sequence[Request], slots: int = SLOTS) -> list[Completion]:
    from megatron_drpo.rollout.inprocess import InProcessEngine

    engine = InProcessEngine(policy, max_slots=slots)
    return engine.generate(requests, LAW)


def generate_growing(policy: Any, requests: Sequence[Request]) -> list[Completion]:
    """Most requests come when the first ones are under way: the cache grows with what it holds."""
    from megatron_drpo.rollout.inprocess import InProcessEngine

    session = InProcessEngine(policy, max_slots=64).start(LAW)
    session.add(requests[:2])
    done = dict(session.step())
    session.add(requests[2:])
    while session.busy:
        done.update(session.step())
    return [done[number] for number in range(len(requests))]


def some_requests(*lengths: int, samples: int = 2) -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    return [
        Request(prompt, 10 * number + sample)
        for number, length in enumerate(lengths)
        for prompt in [torch.randint(3, VOCAB, (length,), generator=generator)]
        for sample in range(samples)
    ]


REQUESTS = some_requests(6, 1, 13, 3)


def _ranks(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo.mcore.weights import export

    for name, case in CASES.items():
        make = (root / case.family, rank, case.sizes)
        layout, policy = make_policy(*make, moe=ROLLOUT)
        done = generate(policy, REQUESTS)
        result: dict[str, Any] = {
            "generated": [
                (c.response_ids.tolist(), None if c.experts is None else c.experts.tolist())
                for c in done
            ]
        }
        rows = policy.pack(with_experts())
        result["rows"] = len(rows)
        result["scores"] = scores_of(policy, rows)
        [annotated] = policy.annotate([rows])
        result["loss"], _ = policy.forward_backward(annotated)
        result["gradients"] = gradients(policy)
        result["grad_norm"] = policy.optim_step().grad_norm
        result["differs"] = policy.take_routing_differences()
        export(root / name, root / case.family, policy.architecture, policy.models, layout)
        end(layout, policy, root)
        if name in AGAIN:
            layout, policy = make_policy(*make, moe=ROLLOUT, memory=AGAIN[name])
            [annotated] = policy.annotate([policy.pack(with_experts())])
            loss, _ = policy.forward_backward(annotated)
            result["again"] = [loss, gradients(policy), policy.take_routing_differences()]
            end(layout, policy, root)
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, result)
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps(everyone))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routing")
    save(root)
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Reference]:
    return {family: reference(root, family) for family in FAMILIES}


def _result(root: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((root / f"{name}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_replay_is_transformers_with_the_given_experts(root, references, name: str) -> None:
    expected, seen = references[CASES[name].family], set()
    assert 0.5 < expected.differs < 1
    for rank in _result(root, name):
        assert rank["loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
        assert rank["grad_norm"] == pytest.approx(expected.norm, rel=1e-5)
        assert rank["differs"] == pytest.approx(expected.differs, rel=1e-12)
        for advantage, place, score in rank["scores"]:
            seen.add((round(advantage, 5), place))
            assert score == pytest.approx(expected.scores[round(advantage, 5), place], abs=1e-5)
    assert seen == expected.scores.keys()
    exported = {}
    for file in (root / name).glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == expected.weights.keys()
    for key, value in exported.items():
        torch.testing.assert_close(
            value.double(), expected.weights[key], rtol=0, atol=1e-5, msg=key
        )


@pytest.mark.distributed
@pytest.mark.parametrize("name", AGAIN)
def test_recomputation_replays_the_row_that_it_computes_again(root, name: str) -> None:
    for rank in _result(root, name):
        assert rank["rows"] >= 2, "with one row, any that is remembered would be right"
        assert rank["again"] == [rank["loss"], rank["gradients"], rank["differs"]]


def taken_by_transformers(
    routed: Routed, requests: Sequence[Request], generated: Sequence[tuple[list[int], Any]]
) -> None:
    """Assert that experts recorded in generation are a forward pass's over what was generated."""
    for request, (response, experts) in zip(requests, generated, strict=True):
        ids = torch.cat([request.prompt_ids, torch.tensor(response)])
        with torch.no_grad():
            routed(ids[None])
        expected = routed.own[tuple(ids.tolist())][:-1]
        recorded = torch.as_tensor(experts)
        assert recorded.shape == expected.shape
        assert torch.equal(recorded.long().sort(-1).values, expected.sort(-1).values)
    assert routed.margin > 1e-5, "a near tie: fp32 may decide otherwise than fp64"


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_generation_records_what_transformers_takes(root, name: str) -> None:
    routed = Routed(root, CASES[name].family)
    first = _result(root, name)[0]["generated"]
    taken_by_transformers(routed, REQUESTS, first)
    for rank in _result(root, name):
        assert rank["generated"] == first


# One rank.


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, and a world of one rank."""
    from megatron_drpo.mcore import cpu

    directory = tmp_path_factory.mktemp("one")
    save(directory)
    cpu.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=0, world_size=1)
    yield directory
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@contextmanager
def one_rank(
    here: Path, family: str, optimizer: OptimizerConfig = SHOWS_GRADIENTS, **groups: Any
) -> Iterator[Any]:
    layout, policy = make_policy(here / family, 0, ParallelConfig(), optimizer, **groups)
    yield policy
    end(layout, policy, here)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_in_slots_that_move_and_prompts_that_are_shared(
    here: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_drpo.rollout import scheduler

    asked = [
        replace(request, max_response_length=1 + 5 * number % 8)
        for number, request in enumerate(some_requests(6, 1, 30, 13, 3, samples=3))
    ]
    routed = Routed(here, family)
    with one_rank(here, family, moe=ROLLOUT) as policy:
        done = generate(policy, asked, slots=4)
        together = generate(policy, asked, slots=64)
        grown = generate_growing(policy, asked)
        monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 8)
        in_pieces = generate(policy, asked, slots=7)
    assert len({c.response_ids.numel() for c in done}) > 3, "slots are left at different times"
    for ours in (done, together, grown, in_pieces):
        assert all(c.experts is not None and c.experts.dtype == torch.uint8 for c in ours)
        pairs = [(c.response_ids.tolist(), c.experts) for c in ours]
        taken_by_transformers(routed, asked, pairs)


def test_responses_that_are_broken_off_have_the_experts_of_what_was_computed(here: Path) -> None:
    from megatron_drpo.rollout.inprocess import InProcessEngine

    law = replace(LAW, max_response_length=20, stop_ids=())
    asked = some_requests(6, 9, samples=1)
    with one_rank(here, "mixtral", moe=ROLLOUT) as policy:
        whole = InProcessEngine(policy, max_slots=8).generate(asked, law)
        session = InProcessEngine(policy, max_slots=8).start(law)
        session.add(asked)
        session.step()
        session.step()
        session.step()
        broken = dict(session.abort())
        waiting = InProcessEngine(policy, max_slots=8).start(law)
        waiting.add(asked)
        nothing = dict(waiting.abort())
    for number, (request, full) in enumerate(zip(asked, whole, strict=True)):
        part = broken[number]
        count = request.prompt_ids.numel() + part.response_ids.numel() - 1
        assert part.response_ids.numel() == 2 and full.experts is not None
        assert torch.equal(part.experts, full.experts[:count])
        assert nothing[number].experts.shape == (0, LAYERS, EXPERTS_PER_TOKEN)


def test_recorded_experts_reach_their_tokens_through_a_file(here: Path, tmp_path: Path) -> None:
    batch = with_experts()
    # As a group of samples each, which files hold.
    batch = [replace(t, rollout=replace(t.rollout, response_text="x")) for t in batch]
    write_rollouts(tmp_path / "rollouts.jsonl", batch)
    read = read_rollouts(
        tmp_path / "rollouts.jsonl", vocab_size=VOCAB, max_length=64, samples_per_prompt=1
    )
    assert [r.prompt.id for r, _ in read] == [t.rollout.prompt.id for t in batch]
    again = [replace(t, rollout=r) for t, (r, _) in zip(batch, read, strict=True)]
    with one_rank(here, "mixtral", moe=ROLLOUT) as policy:
        rows = policy.pack(again)
    with one_rank(here, "mixtral", moe=SCORE) as policy:
        assert all(row.experts is None for row in policy.pack(again))
    found = 0
    names = {f"sample 0 of prompt {t.rollout.prompt.id}": t.rollout for t in batch}
    for row in rows:
        left = torch.ones(row.tokens.numel(), dtype=torch.bool)
        for name, start in zip(row.names, row.cu_seqlens.tolist(), strict=False):
            experts = names[name].experts
            assert experts is not None and row.experts is not None
            assert torch.equal(row.experts[start : start + len(experts)], experts.short())
            left[start : start + len(experts)] = False
            found += 1
        assert (row.experts[left] == -1).all() and left.any()
    assert found == len(batch)


def seen_routing(policy: Any) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """What the routers of a policy do from now on, layer after layer and pass after pass: the
    experts that tokens go to, the ones with the highest scores, and hooks to remove."""
    taken, highest, hooks = [], [], []

    def hook(router: Any, inputs: Any, output: Any) -> None:
        hidden = inputs[0].detach().flatten(0, -2).double()
        scores = hidden @ router.weight.detach().double().T
        highest.append(scores.topk(EXPERTS_PER_TOKEN).indices.sort(-1).values)
        taken.append(output[1].nonzero()[:, 1].view(-1, EXPERTS_PER_TOKEN))

    for model in policy.models:
        for layer in model.decoder.layers:
            hooks.append(layer.mlp.router.register_forward_hook(hook))
    return taken, highest, hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_score_keeps_the_routing_of_the_first_update(here: Path, family: str) -> None:
    fast = replace(SHOWS_GRADIENTS, lr=0.1, adam_eps=1e-8)
    with one_rank(here, family, fast, moe=SCORE) as policy:
        [rows] = policy.annotate([policy.pack(with_experts())])
        assert policy.take_routing_differences() == 0
        for update in range(3):
            taken, highest, hooks = seen_routing(policy)
            policy.forward_backward(rows)
            for hook in hooks:
                hook.remove()
            policy.optim_step()
            differing, total = 0, 0
            for number, row in enumerate(rows):
                for layer in range(LAYERS):
                    experts = row.experts[:, layer].long().sort(-1).values
                    assert torch.equal(taken[number * LAYERS + layer], experts)
                    differ = (highest[number * LAYERS + layer] != experts).any(-1)
                    differing += int(differ[row.loss_index].sum())
                    total += row.loss_index.numel()
            share = policy.take_routing_differences()
            assert share == pytest.approx(differing / total, rel=1e-12)
            assert share == 0 if update == 0 else share > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_keeps_the_bits(here: Path, family: str) -> None:
    found = {}
    for name, memory in {"none": MemoryConfig(), **RECOMPUTED}.items():
        with one_rank(here, family, moe=ROLLOUT, memory=memory) as policy:
            [rows] = policy.annotate([policy.pack(with_experts())])
            loss, _ = policy.forward_backward(rows)
            found[name] = loss, gradients(policy), policy.take_routing_differences()
            assert not any(router.again for part in policy.routing for router in part._routers)
    assert len(rows) > 2 and len(set(found.values())) == 1, found


def test_replay_ends_with_the_pass(here: Path) -> None:
    """Generation, scoring and recording between updates follow the routers themselves."""
    for memory in (MemoryConfig(), UNIFORM):
        with one_rank(here, "mixtral", moe=ROLLOUT, memory=memory) as policy:
            plain = policy.pack(trajectories())
            scores, done = scores_of(policy, plain), generate(policy, REQUESTS)
            [rows] = policy.annotate([policy.pack(with_experts())])
            policy.forward_backward(rows)
            assert scores_of(policy, rows) != scores
            after = generate(policy, REQUESTS)
            assert scores_of(policy, plain) == scores
            for ours, theirs in zip(done, after, strict=True):
                assert torch.equal(ours.logprobs, theirs.logprobs)
                assert torch.equal(ours.experts, theirs.experts)


# Whole runs.

REWARD = """
def length(request):
    return -len(request.response) / 8 - request.response.count("7")
"""


def _train(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo import cli
    from tools.generate_rollouts import run

    os.chdir(root)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    flags = [*json.loads(Path("flags.json").read_text()), "--no-progress", "--no-export-hf"]
    flags += ["--lr", "1e-2"]
    ep2, pp2 = ["--expert-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
    replay = ["--moe-routing-replay", "rollout"]
    evaluated = ["--eval-prompts", "prompts.jsonl", "--eval-interval", "1"]
    whole = [*flags, *ep2, *replay, *evaluated, "--save-rollouts"]
    cli.start([*whole, "--output-dir", "whole"])
    cli.start([*whole, "--train-iters", "1", "--output-dir", "resumed"])
    cli.start([*whole, "--output-dir", "resumed", "--resume"])
    score = ["--moe-routing-replay", "score", "--recompute-granularity", "full"]
    score += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    cli.start([*flags, *pp2, *score, "--output-dir", "score"])
    tool = ["--hf-model", "model", "--prompts", "prompts.jsonl", "--reward", "none", *pp2, *replay]
    run([*tool, "--rollout-max-response-length", "8", "--out", "made"])
    at = flags.index("--prompts")
    recorded = [*flags[:at], *flags[at + 2 :], *replay, "--train-iters", "1"]
    for name, files in (("replayed", "whole/rollouts"), ("from-tool", "made")):
        samples = ["--rollout-samples-per-prompt", "8"] if name == "from-tool" else []
        cli.start([*recorded, *samples, *pp2, "--rollouts-file", files, "--output-dir", name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    flags = make_tiny_run(root)
    save_tiny(root / "model", "qwen3_moe")
    (root / "flags.json").write_text(json.dumps([*flags, "--reward", "own:length"]))
    (root / "own.py").write_text(REWARD)
    run_distributed(_train, 2, root)
    return root


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.distributed
def test_a_run_replays_its_rollouts(runs: Path) -> None:
    logged = steps(runs / "whole")
    # Two updates, the first one with the routing of generation, but for near ties.
    assert all(0 < step["moe/routing_differs"] < 1 for step in logged)
    assert all(step["engine_gap/max_abs"] < 1e-5 for step in logged)
    lines = [json.loads(x) for x in (runs / "whole/metrics.jsonl").read_text().splitlines()]
    assert sum("eval/avg" in line for line in lines) >= 2
    (replayed,) = steps(runs / "replayed")
    for name in ("loss", "grad_norm", "moe/routing_differs"):
        assert replayed[name] == pytest.approx(logged[0][name], rel=1e-4, abs=1e-6)
    assert replayed["engine_gap/max_abs"] < 1e-5, "under another layout"
    (made,) = steps(runs / "from-tool")
    assert made["engine_gap/max_abs"] < 1e-5


@pytest.mark.distributed
def test_a_resumed_run_is_the_same_run(runs: Path) -> None:
    for ours, theirs in zip(steps(runs / "resumed"), steps(runs / "whole"), strict=True):
        for name in ("loss", "grad_norm", "moe/routing_differs", "reward/mean"):
            assert ours[name] == theirs[name]


@pytest.mark.distributed
def test_a_run_replays_its_scoring(runs: Path) -> None:
    assert all(0 < step["moe/routing_differs"] < 1 for step in steps(runs / "score"))


# What is refused.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    flags = make_tiny_run(tmp_path)
    save_tiny(tmp_path / "model", "qwen3_moe")
    monkeypatch.chdir(tmp_path)
    return flags


def refused(kind: type[Exception], argv: list[str]) -> str:
    from megatron_drpo.preflight import preflight

    with pytest.raises(kind) as caught:
        preflight(parse(argv)[0], 1)
    return str(caught.value)


@pytest.mark.parametrize("replay", ["rollout", "score"])
def test_a_dense_model_has_nothing_to_replay(tiny: list[str], tmp_path: Path, replay: str) -> None:
    save_tiny(tmp_path / "model", "qwen3")
    text = refused(ConfigError, [*tiny, "--moe-routing-replay", replay])
    assert f"--moe-routing-replay {replay}: the model has no experts" in text


def test_what_records_no_experts_is_named(tiny: list[str]) -> None:
    replay = [*tiny, "--moe-routing-replay", "rollout"]
    servers = ["--rollout-engine", "vllm", "--rollout-servers", "http://h:1"]
    text = refused(ConfigError, [*replay, *servers, "--weight-sync", "disk"])
    assert "--rollout-engine vllm does not return the experts" in text and "use score" in text
    text = refused(ConfigError, [*replay, "--environment", "own:Echo"])
    assert "--environment do not record the experts" in text and "use score" in text


def test_the_tool_records_or_says_why_not(tiny: list[str]) -> None:
    from tools.generate_rollouts import run

    flags = ["--hf-model", "model", "--prompts", "prompts.jsonl", "--out", "made"]
    with pytest.raises(ConfigError, match="--moe-routing-replay score: nothing is scored here"):
        run([*flags, "--moe-routing-replay", "score"])
    servers = ["--rollout-engine", "sglang", "--rollout-servers", "http://h:1"]
    with pytest.raises(ConfigError, match="--rollout-engine sglang does not return the experts"):
        run([*flags, "--moe-routing-replay", "rollout", *servers])


def record(**experts: Any) -> dict[str, Any]:
    return {
        "id": "p",
        "prompt": "1+",
        "prompt_ids": [3, 4],
        "response": "2",
        "response_ids": [5],
        "behaviour_logprobs": [-1.0],
        "finish_reason": "length",
        "policy_version": 0,
        "reward": 1.0,
        **experts,
    }


def encoded(values: np.ndarray) -> dict[str, Any]:
    text = base64.b64encode(values.astype("<u2").tobytes()).decode()
    return {"experts": {"shape": [*values.shape], "base64": text}}


GOOD = np.broadcast_to(np.array([3, 1]), (2, LAYERS, 2))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({}, "2 of 2 rollouts"),
        (encoded(GOOD[:, :3]), "4 layers, 2 of 4 experts per token"),
        (encoded(GOOD[..., :1]), "4 layers, 2 of 4 experts per token"),
        (encoded(GOOD + 1), "4 layers, 2 of 4 experts per token"),
        (encoded(GOOD), None),
    ],
)
def test_rollouts_of_another_model_are_refused(
    tiny: list[str], tmp_path: Path, field: dict[str, Any], message: str | None
) -> None:
    from megatron_drpo.preflight import preflight

    lines = [json.dumps(record(sample=n, **field)) for n in range(2)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    at = tiny.index("--prompts")
    flags = [*tiny[:at], *tiny[at + 2 :], "--rollouts-file", "some.jsonl"]
    flags += ["--rollout-prompts-per-step", "1", "--updates-per-rollout", "1"]
    flags += ["--moe-routing-replay", "rollout"]
    if message is None:
        found = preflight(parse(flags)[0], 1).rollouts
        assert found is not None and found[0][0].experts is not None
        assert np.array_equal(found[0][0].experts.numpy(), GOOD)
    else:
        text = refused(ConfigError, flags)
        assert message in text and "--moe-routing-replay rollout" in text and "use score" in text


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (encoded(GOOD[:1]), r"must be \[2, layers, experts per token\]"),
        ({"experts": {"shape": [2, 4, 2]}}, "`experts` must be"),
        ({"experts": {"shape": [2, 4, 2], "base64": "AAA"}}, "`experts` must be"),
        ({"experts": {"shape": [2, 4, 3], "base64": encoded(GOOD)["experts"]["base64"]}}, "must"),
        ({"experts": [1, 2]}, "`experts` is"),
        (encoded(np.full((2, 4, 2), 1)), "names an expert twice"),
        (encoded(GOOD + 40000), "holds 40003"),
    ],
)
def test_malformed_experts_are_refused(tmp_path: Path, field: Any, message: str) -> None:
    (tmp_path / "some.jsonl").write_text(json.dumps(record(sample=0, **field)) + "\n")
    with pytest.raises(DataError, match=message):
        read_rollouts(
            tmp_path / "some.jsonl", vocab_size=VOCAB, max_length=64, samples_per_prompt=1
        )
