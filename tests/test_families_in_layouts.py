"""Families that add to Llama and Qwen3: right in every layout, as transformers in fp64 has them.

Mixtures of experts in every layout (experts whole or split, over the ranks of one replica or of
several), biases, and stretched rotary embeddings; otherwise as in `test_layouts`. Replicas generate
different numbers of responses, since those that share experts have to wait for each other.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_drpo.config import ParallelConfig
from tests.distributed import run_distributed
from tests.test_layouts import (
    SHOWS_GRADIENTS,
    TEMPERATURE,
    end,
    fresh_trajectories,
    make_policy,
    reference_greedy,
    reference_loss,
    sample,
    trajectories,
    update_reference,
)
from tests.tiny_models import EXPERTS, MOE, hf_classes, save_tiny

WORLD = 4
CLIP = 1.0
"""Of the gradients' norm, which experts and everything else have in common."""
COUNTS = (6, 2, 0, 5)
"""Responses that replicas 0 to 3 generate."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Far below what any model has, so that sequences of a few tokens meet all three ranges.
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}


_USUALLY_1 = ("pp", "vp", "cp", "ep")


class Case(NamedTuple):
    """A family, how it differs from the tiny model of its name, and a layout."""

    family: str
    sizes: ParallelConfig
    config: dict[str, Any] = {}
    tie: bool = False
    distributed_optimizer: bool = True

    def __str__(self) -> str:
        s = self.sizes
        sizes = {
            "tp": s.tensor_model_parallel_size,
            "sp": int(s.sequence_parallel),
            "pp": s.pipeline_model_parallel_size,
            "vp": s.num_virtual_stages_per_pipeline_rank,
            "cp": s.context_parallel_size,
            "ep": s.expert_model_parallel_size,
            "etp": s.expert_tensor_parallel_size or 0,
        }
        said = {name: size for name, size in sizes.items() if size > (name in _USUALLY_1)}
        layout = "".join(f"-{name}{size}" for name, size in said.items())
        return f"{self.model}{layout}{'' if self.distributed_optimizer else '-p'}"

    @property
    def model(self) -> str:
        """Cases of the same name share a checkpoint."""
        return "-".join([self.family, *self.config, *(["tied"] if self.tie else [])])


def sizes(
    tp: int, pp: int = 1, vp: int = 1, ep: int = 1, cp: int = 1, etp: int | None = None
) -> ParallelConfig:
    return ParallelConfig(tp, pp, vp, ep, context_parallel_size=cp, expert_tensor_parallel_size=etp)


def with_sp(*numbers: int, **others: Any) -> ParallelConfig:
    return replace(sizes(*numbers, **others), sequence_parallel=True)


UNNORMALIZED = {"norm_topk_prob": False}
CASES = [
    Case("llama", sizes(4), {"rope_parameters": LLAMA3}),
    Case("qwen2", sizes(2, 2), {"rope_parameters": LINEAR}, tie=True),
    Case("qwen2", sizes(4), {"rope_parameters": LINEAR}, tie=True, distributed_optimizer=False),
    Case("mixtral", sizes(1)),
    Case("mixtral", sizes(1, ep=4)),
    Case("mixtral", sizes(1, 2, 2, ep=2)),
    Case("qwen3_moe", sizes(1, 2, ep=2), UNNORMALIZED, tie=True),
    Case("qwen3_moe", sizes(1, ep=2, etp=2), UNNORMALIZED, tie=True),
    Case("mixtral", sizes(1, 2, etp=2), distributed_optimizer=False),
    Case("mixtral", with_sp(2)),
    Case("mixtral", with_sp(2, ep=2)),
    Case("qwen3_moe", with_sp(2, ep=2, etp=1), UNNORMALIZED, tie=True),
    Case("qwen3_moe", with_sp(2, 2, 2, ep=2, etp=1), UNNORMALIZED, tie=True),
    Case("mixtral", with_sp(4, ep=2, etp=1), distributed_optimizer=False),
    Case("qwen3_moe", sizes(1, ep=2, cp=2), UNNORMALIZED, tie=True),
    Case("mixtral", with_sp(2, ep=4, cp=2, etp=1)),
]
# Megatron trains experts under tensor parallelism only together with sequence parallelism; they are
# right without as well where nothing is trained.
SCORED_ONLY = [Case("mixtral", sizes(2, ep=2))]


def _save(directory: Path, case: Case) -> None:
    save_tiny(directory, case.family, tie=case.tie)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.config))


def _ranks(rank: int, world_size: int, root: Path) -> None:
    from megatron_drpo.mcore.weights import export

    for case in CASES + SCORED_ONLY:
        source = root / case.model
        optimizer = replace(
            SHOWS_GRADIENTS,
            clip_grad=CLIP,
            use_distributed_optimizer=case.distributed_optimizer,
        )
        layout, policy = make_policy(source, rank, case.sizes, optimizer, budget=24)
        rows = policy.pack(trajectories())
        result: dict[str, Any] = {
            "layout": str(layout),
            "scores": [
                [float(row.advantages[t]), int(row.positions[index]), float(s.logprobs[t])]
                for row, s in zip(rows, policy.score(rows), strict=False)
                for t, index in enumerate(row.loss_index)
            ],
        }
        count = COUNTS[layout.replica_rank]
        drawn = sample(policy, temperature=TEMPERATURE, slots=4, count=count)
        result["drawn"] = [c.response_ids.tolist() for c in drawn]
        if case.family in MOE:
            greedy = sample(policy, temperature=0.0, slots=5, count=count)
            result["greedy"] = [c.response_ids.tolist() for c in greedy]
        everything = layout.gather_objects(drawn)[0]
        fresh = policy.pack(fresh_trajectories(everything))
        gaps = [
            (score.logprobs - row.behaviour_logprobs).abs().max().item()
            for score, row in zip(policy.score(fresh), fresh, strict=False)
            if row.targets.numel()
        ]
        result["gap"] = max(gaps, default=0.0)
        if case in CASES:
            [annotated] = policy.annotate([rows])
            result["loss"], _ = policy.forward_backward(annotated)
            result["grad_norm"] = policy.optim_step().grad_norm
            export(root / str(case), source, policy.architecture, policy.models, layout)
        everyone = layout.gather_objects(result)
        if rank == 0:
            (root / f"{case}.json").write_text(json.dumps(everyone))
        end(layout, policy, root)


class Reference(NamedTuple):
    loss: float
    norm: float
    scores: dict[tuple[float, int], float]
    """By the advantage, which tells the sequences apart, and the position before the token."""
    greedy: list[list[int]]
    """Responses to the first prompts."""
    weights: dict[str, torch.Tensor]
    """After the update, named as they are stored."""


def _reference(directory: Path, case: Case) -> Reference:
    _, model_class = hf_classes(case.family)
    model = model_class.from_pretrained(directory, dtype=torch.float64)
    # The default for experts multiplies in groups, which CPUs do not do in fp64.
    model.config._experts_implementation = "eager"
    loss, scores = reference_loss(model.eval())
    greedy = [
        reference_greedy(model, each.rollout.prompt.token_ids)
        for each in trajectories()[: COUNTS[0]]
    ]
    loss.backward()
    norm = update_reference(model, CLIP)
    assert norm > 1.5 * CLIP
    model.save_pretrained(directory / "updated")
    weights = load_file(directory / "updated" / "model.safetensors")
    places = {
        (round(each.advantage, 5), each.rollout.prompt.token_ids.numel() - 1 + t): score
        for each, of_response in zip(trajectories(), scores, strict=True)
        for t, score in enumerate(of_response)
    }
    return Reference(float(loss.detach()), norm, places, greedy, weights)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for case in {case.model: case for case in CASES}.values():
        _save(root / case.model, case)
    run_distributed(_ranks, WORLD, root)
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Reference]:
    unique = {case.model: case for case in CASES}
    return {name: _reference(root / name, case) for name, case in unique.items()}


def _result(root: Path, case: Case) -> list[dict[str, Any]]:
    return json.loads((root / f"{case}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_transformers(root, references, case: Case) -> None:
    expected = references[case.model]
    for rank in _result(root, case):
        assert rank["loss"] == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
        assert rank["grad_norm"] == pytest.approx(expected.norm, rel=1e-5)
    exported = {}
    for file in (root / str(case)).glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == expected.weights.keys()
    experts = [name for name in exported if ".experts." in name]
    assert len(experts) == (4 * EXPERTS * 3 if case.family in MOE else 0)
    for name, value in exported.items():
        torch.testing.assert_close(
            value.double(), expected.weights[name], rtol=0, atol=1e-5, msg=name
        )


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES + SCORED_ONLY, ids=str)
def test_scores_are_those_of_transformers(root, references, case: Case) -> None:
    expected, seen = references[case.model].scores, set()
    for rank in _result(root, case):
        for advantage, place, score in rank["scores"]:
            seen.add((round(advantage, 5), place))
            assert score == pytest.approx(expected[round(advantage, 5), place], abs=1e-5)
    assert seen == expected.keys()


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES + SCORED_ONLY, ids=str)
def test_replicas_that_generate_unevenly_all_get_their_responses(
    root, references, case: Case
) -> None:
    first = next(other for other in CASES if other.model == case.model)
    everything = _result(root, first)[0]["drawn"]
    assert len(everything) == COUNTS[0]
    ranks_per_replica = (
        case.sizes.tensor_model_parallel_size * case.sizes.pipeline_model_parallel_size
    )
    lengths = []
    for rank in _result(root, case):
        assert rank["drawn"] == everything[: len(rank["drawn"])]
        if case.family in MOE:
            assert rank["greedy"] == references[case.model].greedy[: len(rank["drawn"])]
        lengths.append(len(rank["drawn"]))
        assert rank["gap"] <= 1e-5  # the trainer's log-probs of a fresh batch
    replicas = WORLD // ranks_per_replica
    assert sorted(lengths) == sorted(list(COUNTS[:replicas]) * ranks_per_replica)


@pytest.mark.distributed
def test_a_layout_tells_of_its_experts_where_they_are_shared_out(root) -> None:
    told = {str(case): _result(root, case)[0]["layout"] for case in CASES}
    assert told["mixtral-tp1-pp2-vp2-ep2"] == "4 rank(s): TP 1, PP 2 x 2 chunks, DP 2, EP 2"
    assert told["mixtral-tp2-sp1-cp2-ep4-etp1"] == (
        "4 rank(s): TP 2 with SP, PP 1, CP 2, DP 1, EP 4, expert TP 1"
    )
    assert told["mixtral-tp1"] == "4 rank(s): TP 1, PP 1, DP 4"
