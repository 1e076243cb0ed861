"""Every layout computes the same thing, and the right one.

The reference is transformers on one rank: one sequence at a time, without padding or packing, the
loss written out in loops in fp64. Each layout scores, generates and makes one update in one start
of four processes. With Adam's eps and the learning rate at 1 and nothing else on, an update moves a
weight by -g / (|g| + 1), so that the exported weights show the gradient of every parameter.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_drpo.device import Device
from megatron_drpo.types import Prompt, Rollout, Trajectory
from tests.distributed import renew_world, run_distributed
from tests.tiny_models import VOCAB, save_tiny, tiny_model

WORLD = 4
BOTH = ("llama", "qwen3")


class Case(NamedTuple):
    """A layout, the token budget of a row, and the models that run in it."""

    sizes: ParallelConfig
    budget: int
    families: tuple[str, ...] = BOTH


_SP = {"sequence_parallel": True}
_CP2, _CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
# Data parallelism takes the ranks that are left.
LAYOUTS = {
    "dp4": Case(ParallelConfig(), 24),
    "tp2": Case(ParallelConfig(2), 64),
    "tp4": Case(ParallelConfig(4), 24),
    "pp2": Case(ParallelConfig(1, 2), 64),
    "pp4": Case(ParallelConfig(1, 4), 24),
    "tp2-pp2": Case(ParallelConfig(2, 2), 64),
    "pp2-vp2": Case(ParallelConfig(1, 2, 2), 24),
    "tp2-pp2-vp2": Case(ParallelConfig(2, 2, 2), 64),
    "sp2": Case(ParallelConfig(2, **_SP), 24),
    "sp4": Case(ParallelConfig(4, **_SP), 64, ("llama",)),
    "sp2-pp2-vp2": Case(ParallelConfig(2, 2, 2, **_SP), 24, ("qwen3",)),
    "cp2": Case(ParallelConfig(**_CP2), 24),
    "cp4": Case(ParallelConfig(**_CP4), 64, ("qwen3",)),
    "tp2-cp2": Case(ParallelConfig(2, **_CP2), 64, ("qwen3",)),
    "sp2-cp2": Case(ParallelConfig(2, **_CP2, **_SP), 24),
    "cp2-pp2": Case(ParallelConfig(1, 2, **_CP2), 64, ("llama",)),
    "cp2-pp2-vp2": Case(ParallelConfig(1, 2, 2, **_CP2), 24, ("qwen3",)),
    "pp2-first1": Case(ParallelConfig(1, 2, decoder_first_pipeline_num_layers=1), 64, ("llama",)),
    "pp2-last1": Case(ParallelConfig(1, 2, decoder_last_pipeline_num_layers=1), 24, ("qwen3",)),
}
MODELS = [("llama", True), ("qwen3", False)]
DELTA, TEMPERATURE, HORIZON = 0.5, 0.8, 16
GREEDY_TOKENS = 10
SHOWS_GRADIENTS = OptimizerConfig(lr=1.0, adam_eps=1.0, weight_decay=0.0, clip_grad=0.0)


def trajectories() -> list[Trajectory]:
    """Random sequences of uneven lengths whose behaviour policy is near some other model."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for number in range(12):
        prompt_length = int(torch.randint(1, 7, (), generator=generator))
        length = int(torch.randint(1, 10, (), generator=generator))
        ids = torch.randint(3, VOCAB, (prompt_length + length,), generator=generator)
        logprobs = -0.5 - 5 * torch.rand(length, generator=generator)
        advantage = float(torch.randn((), generator=generator))
        prompt = Prompt(f"p{number}", "", ids[:prompt_length], None)
        rollout = Rollout(prompt, 0, ids[prompt_length:], logprobs, "length", 0, "")
        out.append(Trajectory(rollout, 0.0, advantage))
    return out


def reference_loss(model: Any) -> tuple[Tensor, list[list[float]]]:
    """(loss, log-probs of each response) of `trajectories` under a model of transformers."""
    batch = trajectories()
    total = torch.zeros((), dtype=torch.float64)
    scores = []
    for trajectory in batch:
        rollout = trajectory.rollout
        prompt, response = rollout.prompt.token_ids, rollout.response_ids
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        scores.append([])
        for t, token in enumerate(response.tolist()):
            log_pi = torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token]
            scores[-1].append(log_pi.item())
            mu = math.exp(float(rollout.behaviour_logprobs[t]))
            r, a = log_pi.exp() / mu, trajectory.advantage
            objective = r * a - abs(a) / (2 * DELTA) * mu * (r - 1) ** 2
            total = total - objective / HORIZON
    return total / len(batch), scores


def update_reference(model: Any, clip: float = math.inf) -> float:
    """Move each weight by -g / (|g| + 1), as one update does here; returns the gradients' norm.

    Args:
        clip: norm that the gradients are scaled down to, if theirs is larger.
    """
    norm = math.sqrt(sum(float((value.grad**2).sum()) for value in model.parameters()))
    factor = min(1.0, clip / norm)
    with torch.no_grad():
        for value in model.parameters():
            grad = factor * value.grad
            value -= grad / (grad.abs() + 1)
    return norm


def reference_greedy(model: Any, prompt: Tensor) -> list[int]:
    """The likeliest continuation of a prompt, by transformers."""
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        eos_token_id=[2, 9],
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def reference(family: str, tie: bool) -> tuple[float, list[list[float]], dict[str, Tensor]]:
    """(loss, log-probs of each response, weights after the update), by transformers in fp64."""
    model = tiny_model(family, tie=tie, dtype=torch.float64)
    loss, scores = reference_loss(model)
    loss.backward()
    norm = update_reference(model)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return float(loss.detach()), scores, weights | {"grad_norm": torch.tensor(norm)}


def make_policy(
    source: Path,
    rank: int,
    sizes: ParallelConfig,
    optimizer: OptimizerConfig = SHOWS_GRADIENTS,
    *,
    budget: int = 24,
    bf16: bool = False,
    **groups: Any,
):
    """Started process groups, and the policy of the checkpoint `source` on them.

    Args:
        groups: further groups of settings, by their names in `Config`.
    """
    from megatron_drpo.checkpoint.families import read_architecture
    from megatron_drpo.mcore import parallel
    from megatron_drpo.mcore.policy import Policy

    config = Config(
        model=ModelConfig(hf_model=str(source), transformer_impl="local", bf16=bf16),
        parallel=sizes,
        data=DataConfig(prompts="unused"),
        rollout=RolloutConfig(rollout_temperature=TEMPERATURE),
        objective=ObjectiveConfig(drpo_delta=DELTA, loss_token_horizon=HORIZON),
        optimizer=optimizer,
        train=TrainConfig(max_tokens_per_microbatch=budget),
        **groups,
    )
    device = Device("cpu", "gloo", rank, "test")
    layout = parallel.initialize(config.parallel, device, seed=1)
    return layout, Policy.load(config, read_architecture(source), layout, device, weights=source)


def end(layout, policy, directory: Path) -> None:
    """End the process groups that `make_policy` started; collective.

    Hooks in the autograd graph keep Megatron's data-parallel wrappers, and these the model and its
    groups: without letting go, each layout would leave some fifty threads to the next one.
    """
    from megatron_drpo.mcore import parallel

    parallel.destroy(layout)
    for chunk in policy.chunks:
        vars(chunk).clear()
    renew_world(directory)


def sample(policy, *, temperature: float, slots: int, count: int | None = None):
    """Responses to the prompts of `trajectories`, or of its first `count`."""
    from megatron_drpo.rollout.engine import Request, Sampling
    from megatron_drpo.rollout.inprocess import InProcessEngine

    engine = InProcessEngine(policy, max_slots=slots)
    prompts = [trajectory.rollout.prompt.token_ids for trajectory in trajectories()]
    requests = [Request(prompt, stream) for stream, prompt in enumerate(prompts[:count])]
    sampling = Sampling(temperature, 1.0, 0, GREEDY_TOKENS, stop_ids=(2, 9), seed=5)
    return engine.generate(requests, sampling)


def fresh_trajectories(completions) -> list[Trajectory]:
    return [
        replace(
            old,
            rollout=replace(
                old.rollout,
                response_ids=new.response_ids,
                behaviour_logprobs=new.logprobs,
            ),
        )
        for old, new in zip(trajectories()[: len(completions)], completions, strict=True)
    ]


def _ranks(rank: int, world_size: int, root: Path) -> None:
    """One start of the processes, which is what costs time, for everything below."""
    from megatron_drpo.mcore.weights import export

    for family, _ in MODELS:
        for size, case in LAYOUTS.items():
            if family not in case.families:
                continue
            layout, policy = make_policy(root / family, rank, case.sizes, budget=case.budget)
            result: dict[str, object] = {}
            greedy = sample(policy, temperature=0.0, slots=5)
            drawn = sample(policy, temperature=TEMPERATURE, slots=5)
            result["greedy"] = [c.response_ids.tolist() for c in greedy]
            result["drawn"] = [c.response_ids.tolist() for c in drawn]
            result["reasons"] = [c.finish_reason for c in drawn]
            rows = policy.pack(fresh_trajectories(drawn))
            gaps = [
                (score.logprobs - row.behaviour_logprobs).abs().max().item()
                for score, row in zip(policy.score(rows), rows, strict=False)
                if row.targets.numel()
            ]
            result["gap"] = max(gaps, default=0.0)
            rows = policy.pack(trajectories())
            result["scores"] = _scores(policy, rows)
            if layout.cp_size > 1:  # rows that are not shared out are scored by each rank alike
                whole = policy.pack_replicas(trajectories())[layout.dp_rank]
                result["scores"] += _scores(policy, whole)
            [annotated] = policy.annotate([rows])
            result["loss"], _ = policy.forward_backward(annotated)
            update = policy.optim_step()
            result["grad_norm"], result["skipped"] = update.grad_norm, update.skipped
            name = f"{family}-{size}"
            export(root / name, root / family, policy.architecture, policy.models, layout)
            if family == "qwen3":
                result["poisoned"] = _poison(policy)
            everyone = layout.gather_objects(result)
            if rank == 0:
                (root / f"{name}.json").write_text(json.dumps(everyone))
            end(layout, policy, root)


def _scores(policy, rows) -> list[list[float]]:
    """[advantage, position, log-prob] of each loss token on the last stage.

    The advantage tells sequences apart in any order of packing; the position is that of the token
    before.
    """
    return [
        [float(row.advantages[t]), int(row.positions[row.loss_index[t]]), float(s.logprobs[t])]
        for row, s in zip(rows, policy.score(rows), strict=False)
        for t in range(row.targets.numel())
    ]


def _poison(policy) -> dict[str, object]:
    """An infinite advantage on one replica only: what the update then does, and the next one."""
    batch = trajectories()
    bad = [replace(batch[0], advantage=math.inf), *batch[1:]]
    before = [p.detach().clone() for model in policy.models for p in model.parameters()]
    policy.forward_backward(*policy.annotate([policy.pack(bad)]))
    update = policy.optim_step()
    after = [p.detach() for model in policy.models for p in model.parameters()]
    unchanged = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    version = policy.num_updates
    loss, _ = policy.forward_backward(*policy.annotate([policy.pack(batch)]))
    return {
        "skipped": update.skipped,
        "unchanged": unchanged,
        "version": version,
        "next_skipped": policy.optim_step().skipped,
        "next_loss": loss,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for family, tie in MODELS:
        save_tiny(root / family, family, tie=tie)
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[float, list[list[float]], dict[str, Tensor]]]:
    return {family: reference(family, tie) for family, tie in MODELS}


def _cases():
    return pytest.mark.parametrize(
        ("family", "size"),
        [(family, size) for size, case in LAYOUTS.items() for family in case.families],
    )


def _result(root: Path, family: str, size: str) -> list[dict]:
    return json.loads((root / f"{family}-{size}.json").read_text())


@pytest.mark.distributed
@_cases()
def test_loss_and_gradients_are_those_of_transformers(results, references, family, size) -> None:
    loss, _, weights = references[family]
    norm = weights["grad_norm"].item()
    for rank in _result(results, family, size):
        assert rank["loss"] == pytest.approx(loss, rel=1e-5)
        assert rank["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert not rank["skipped"]
    exported = {}
    for file in (results / f"{family}-{size}").glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() <= weights.keys()
    for name, value in exported.items():
        # Gradients of up to 0.3: an error of 1 % in any of them would show.
        torch.testing.assert_close(value.double(), weights[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.distributed
@_cases()
def test_scores_are_those_of_transformers(results, references, family, size) -> None:
    _, expected, _ = references[family]
    known = {
        (round(trajectory.advantage, 5), trajectory.rollout.prompt.token_ids.numel() - 1 + t): score
        for trajectory, scores in zip(trajectories(), expected, strict=True)
        for t, score in enumerate(scores)
    }
    seen = set()
    for rank in _result(results, family, size):
        for advantage, place, score in rank["scores"]:
            seen.add((round(advantage, 5), place))
            assert score == pytest.approx(known[round(advantage, 5), place], abs=1e-5)
    assert seen == known.keys()


@pytest.mark.distributed
@_cases()
def test_generation_is_the_same_everywhere_and_has_no_gap(results, family, size) -> None:
    first = _result(results, family, "dp4")[0]
    for rank in _result(results, family, size):
        assert rank["greedy"] == first["greedy"]
        assert rank["drawn"] == first["drawn"]
        # The trainer's log-probs of a fresh batch: the same bits, on this processor at least.
        assert rank["gap"] <= 1e-5
        for ids, reason in zip(rank["drawn"], rank["reasons"], strict=True):
            assert (reason == "stop") == (ids[-1] in (2, 9))
            assert not {2, 9} & set(ids[:-1])
            assert len(ids) == GREEDY_TOKENS or reason == "stop"


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "tie"), MODELS)
def test_greedy_generation_is_that_of_transformers(results, family: str, tie: bool) -> None:
    model = tiny_model(family, tie=tie)
    greedy = _result(results, family, "dp4")[0]["greedy"]
    for trajectory, ids in zip(trajectories(), greedy, strict=True):
        assert reference_greedy(model, trajectory.rollout.prompt.token_ids) == ids


@pytest.mark.distributed
@pytest.mark.parametrize("size", [s for s, case in LAYOUTS.items() if "qwen3" in case.families])
def test_an_update_that_is_not_finite_is_skipped_on_all_ranks(results, size) -> None:
    for rank in _result(results, "qwen3", size):
        poisoned = rank["poisoned"]
        assert poisoned["skipped"] and poisoned["unchanged"]
        assert poisoned["version"] == 1  # the first update counts, the skipped one does not
        assert not poisoned["next_skipped"]
        assert math.isfinite(poisoned["next_loss"])
