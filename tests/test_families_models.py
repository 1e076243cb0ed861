"""What families add to full attention and plain rotary embeddings, against transformers in fp64.

Sliding windows, in all layers or in some; YaRN and Llama 3's frequencies; biases. One rank, rows of
several sequences, most of them longer than the window: log-probs, gradients, greedy generation, and
the bits of what generation says of its own log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_drpo.config import ParallelConfig
from megatron_drpo.types import Prompt, Rollout, Trajectory
from tests.test_layouts import (
    DELTA,
    HORIZON,
    TEMPERATURE,
    end,
    make_policy,
    update_reference,
)
from tests.tiny_models import MOE, VOCAB, save_tiny, tiny_model

LENGTHS = ((3, 9), (1, 14), (30, 8), (140, 10), (5, 2), (70, 6), (2, 3))
"""Tokens of prompt and response. Attention sums over at most 128 keys at once."""
BUDGET = 240
POSITIONS = 256
WINDOW = 12
LONG_WINDOW = 100
GREEDY_TOKENS = 20
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}


class Case(NamedTuple):
    """A tiny model: the family, and what is special about its configuration."""

    family: str
    special: dict[str, Any]
    plain: dict[str, Any] = {}
    """The same keys without what is special; none: it has other weights."""


def rope(kind: str, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    stretched = {"rope_type": kind, "rope_theta": 5000.0, **parameters}
    return {"rope_parameters": stretched}, {"rope_parameters": PLAIN_ROPE}


# With an original length far below that of the sequences, the tiny models' four frequencies are on
# both sides of the passage and in it.
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_FACTOR = rope(
    "yarn", factor=8.0, original_max_position_embeddings=32, truncate=False, attention_factor=1.5
)
LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CHOSEN = {"use_sliding_window": True, "sliding_window": WINDOW}
FULL = {"use_sliding_window": False}
ALTERNATING = ["full_attention", "sliding_attention"] * 2
CASES = {
    "mistral": Case("mistral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "mistral, long": Case("mistral", {"sliding_window": LONG_WINDOW}, {"sliding_window": None}),
    "mixtral": Case("mixtral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "qwen2": Case("qwen2", CHOSEN | {"max_window_layers": 2}, FULL),
    "qwen3": Case("qwen3", CHOSEN | {"layer_types": ALTERNATING}, FULL | {"layer_types": None}),
    "qwen3_moe": Case("qwen3_moe", CHOSEN, FULL),
    "llama, yarn": Case("llama", *YARN),
    "qwen3, yarn": Case("qwen3", *YARN_FACTOR),
    "qwen2, yarn and window": Case(
        "qwen2", CHOSEN | {"max_window_layers": 1} | YARN[0], FULL | YARN[1]
    ),
    "llama, llama3": Case("llama", *LLAMA3),
    "llama, biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
}


def trajectories() -> list[Trajectory]:
    """Random tokens; the behaviour policy was near some other model."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for number, (prompt_length, length) in enumerate(LENGTHS):
        ids = torch.randint(3, VOCAB, (prompt_length + length,), generator=generator)
        logprobs = -3.0 - 2 * torch.rand(length, generator=generator)
        prompt = Prompt(f"p{number}", "", ids[:prompt_length], None)
        rollout = Rollout(prompt, 0, ids[prompt_length:], logprobs, "length", 0, "")
        advantage = float(torch.randn((), generator=generator))
        out.append(Trajectory(rollout, 0.0, advantage))
    return out


class Expected(NamedTuple):
    """Of transformers, in fp64."""

    scores: list[Tensor]
    """Log-probs of each response."""
    loss: float
    weights: dict[str, Tensor]
    """After an update that shows the gradient."""
    greedy: list[list[int]]


class Found(NamedTuple):
    """Of the trainer, in fp32."""

    scores: list[Tensor]
    loss: float
    weights: dict[str, Tensor]
    greedy: list[list[int]]
    behaviour: list[Tensor]
    """Log-probs of drawn responses, as generation gives them,"""
    rescored: list[Tensor]
    """and as scoring does."""


def _scores(model: Any, batch: list[Trajectory]) -> list[Tensor]:
    out = []
    for trajectory in batch:
        prompt, response = trajectory.rollout.prompt.token_ids, trajectory.rollout.response_ids
        logits = model(torch.cat([prompt, response])[None]).logits[0] / TEMPERATURE
        logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        out.append(logprobs.gather(-1, response[:, None])[:, 0])
    return out


def expect(directory: Path) -> Expected:
    """One sequence at a time, the loss written out, generation with transformers' own cache."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"
    batch = trajectories()
    law = GenerationConfig(do_sample=False, max_new_tokens=GREEDY_TOKENS, pad_token_id=0)
    greedy = []
    for trajectory in batch:
        prompt = trajectory.rollout.prompt.token_ids[None]
        ids = model.generate(prompt, generation_config=law, attention_mask=torch.ones_like(prompt))
        greedy.append(ids[0, prompt.numel() :].tolist())
    scores = _scores(model, batch)
    total = torch.zeros((), dtype=torch.float64)
    for trajectory, log_pi in zip(batch, scores, strict=True):
        mu, advantage = trajectory.rollout.behaviour_logprobs.double().exp(), trajectory.advantage
        ratio = log_pi.exp() / mu
        objective = ratio * advantage - abs(advantage) / (2 * DELTA) * mu * (ratio - 1) ** 2
        total = total - objective.sum() / HORIZON
    loss = total / len(batch)
    loss.backward()
    update_reference(model)
    model.save_pretrained(directory / "updated")
    weights = load_file(directory / "updated" / "model.safetensors")
    return Expected([s.detach() for s in scores], float(loss.detach()), weights, greedy)


def find(directory: Path, policy: Any, layout: Any) -> Found:
    from megatron_drpo.mcore.weights import export
    from megatron_drpo.rollout.engine import Request, Sampling
    from megatron_drpo.rollout.inprocess import InProcessEngine

    batch = trajectories()
    prompts = [trajectory.rollout.prompt.token_ids for trajectory in batch]
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]

    def generate(temperature: float) -> Any:
        law = Sampling(temperature, 1.0, 0, GREEDY_TOKENS, stop_ids=(2,), seed=5)
        return InProcessEngine(policy, max_slots=4).generate(requests, law)

    def scored(batch: list[Trajectory]) -> list[Tensor]:
        """Of each response; sequences by the advantage, which tells them apart."""
        rows = policy.pack(batch)
        assert 1 < len(rows) < len(batch)
        found = {
            float(row.advantages[row.sequence == n][0]): s.logprobs[row.sequence == n]
            for row, s in zip(rows, policy.score(rows), strict=True)
            for n in range(row.cu_seqlens.numel() - 1)
        }
        return [found[float(torch.tensor(trajectory.advantage))] for trajectory in batch]

    greedy = [done.response_ids.tolist() for done in generate(0.0)]
    drawn = generate(TEMPERATURE)
    fresh = [
        replace(
            old,
            rollout=replace(
                old.rollout, response_ids=new.response_ids, behaviour_logprobs=new.logprobs
            ),
        )
        for old, new in zip(batch, drawn, strict=True)
    ]
    rescored, scores = scored(fresh), scored(batch)
    loss, _ = policy.forward_backward(*policy.annotate([policy.pack(batch)]))
    policy.optim_step()
    export(directory / "trained", directory, policy.architecture, policy.models, layout)
    weights = load_file(directory / "trained" / "model.safetensors")
    return Found(scores, loss, weights, greedy, [done.logprobs for done in drawn], rescored)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Found]]:
    from megatron_drpo.mcore import cpu

    root = tmp_path_factory.mktemp("models")
    cpu.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several split a GEMM's rows in ways of their own
    dist.init_process_group("gloo", f"file://{root}/store", rank=0, world_size=1)
    results = {}
    for name, case in CASES.items():
        directory = root / name
        save_tiny(directory, case.family, max_position_embeddings=POSITIONS, **case.special)
        layout, policy = make_policy(directory, 0, ParallelConfig(), budget=BUDGET)
        results[name] = find(directory, policy, layout)
        end(layout, policy, root)
    yield results
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    root = tmp_path_factory.mktemp("references")
    results = {}
    for name, case in CASES.items():
        save_tiny(root / name, case.family, max_position_embeddings=POSITIONS, **case.special)
        results[name] = expect(root / name)
    return results


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_transformers(found, expected, name: str) -> None:
    for ours, theirs in zip(found[name].scores, expected[name].scores, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_what_is_special_shows(expected, name: str) -> None:
    case = CASES[name]
    model = tiny_model(
        case.family,
        dtype=torch.float64,
        max_position_embeddings=POSITIONS,
        **case.special | case.plain,
    )
    with torch.no_grad():
        plain = _scores(model, trajectories())
    gaps = [float((a - b).abs().max()) for a, b in zip(plain, expected[name].scores, strict=True)]
    assert max(gaps) > 1e-2
    if "sliding_window" in case.special and "rope_parameters" not in case.special:
        for (prompt, response), gap in zip(LENGTHS, gaps, strict=True):
            assert (gap > 1e-5) == (prompt + response - 1 > case.special["sliding_window"])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_transformers(found, expected, name: str) -> None:
    assert found[name].loss == pytest.approx(expected[name].loss, rel=1e-5)
    ours, theirs = found[name].weights, expected[name].weights
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        # Gradients of up to 1: an error of 1 % in any of them would show.
        torch.testing.assert_close(value.double(), theirs[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_is_that_of_transformers(found, expected, name: str) -> None:
    assert found[name].greedy == expected[name].greedy


@pytest.mark.parametrize("name", CASES)
def test_generation_has_the_log_probs_of_training(found, name: str) -> None:
    pairs = zip(found[name].behaviour, found[name].rescored, strict=True)
    if CASES[name].family in MOE:  # experts of few tokens take other GEMM kernels
        assert all((ours - trained).abs().max() < 1e-5 for ours, trained in pairs)
    else:
        assert all(torch.equal(ours, trained) for ours, trained in pairs)
