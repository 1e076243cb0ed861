"""How a step's batch comes about: which prompts, which replica, what replaces what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_drpo.collect import Collector
from megatron_drpo.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    WeightSyncConfig,
)
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.metrics import PhaseTimer
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.types import KeptIds, Prompt

PROMPTS = 12
REWARD = """
def reward(request):
    \"\"\"Of prompts that are multiples of 3 samples differ, of others not; 5 fails.\"\"\"
    number, sample = int(request.prompt), int(request.response)
    if number == 5 and sample:
        raise ValueError("five")
    return float(sample) if number % 3 == 0 else 1.0
"""


@dataclass
class Engine:
    """Answers with the number of the sample, and remembers what it was asked."""

    asked: list[tuple[list[Request], Sampling]] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.asked.append((list(requests), sampling))
        return [self._answer(request, sampling) for request in requests]

    def _answer(self, request: Request, sampling: Sampling) -> Completion:
        ids = torch.tensor([request.stream % 2])
        kept = KeptIds(ids.int(), torch.tensor([1])) if sampling.truncated else None
        return Completion(ids, torch.tensor([-0.5]), "stop", kept_ids=kept)


class OneReplica:
    """The layout of one of `num_replicas` replicas that are asked one after the other."""

    is_replica_source = True

    def __init__(self, replica_rank: int = 0, num_replicas: int = 1) -> None:
        self.replica_rank, self.num_replicas = replica_rank, num_replicas

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def share(self, value: Any) -> Any:
        return value

    def any_expert_peer(self, holds: bool, device: Any) -> bool:
        return holds

    def wait_for(self, future: Future[Any] | None) -> None:
        assert future is not None
        future.result()


class Tokenizer:
    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, each)) for each in ids] or [""]


@pytest.fixture
def collectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes collectors: (rollout settings, layout, eval prompts) -> collector, engine."""
    (tmp_path / "by_prompt.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    made: list[Collector] = []

    def make(
        layout: OneReplica | None = None,
        *,
        eval_prompts: int = 0,
        reward: str = "by_prompt:reward",
        reward_max_failures: float = 0.5,
        **rollout: Any,
    ) -> tuple[Collector, Engine]:
        prompts = [Prompt(f"p{i:02}", str(i), torch.tensor([i]), None) for i in range(PROMPTS)]
        served = bool(rollout.get("rollout_servers"))
        config = Config(
            ModelConfig("m"),
            data=DataConfig("p", eval_prompts="e" if eval_prompts else None),
            rollout=RolloutConfig(
                **{"rollout_prompts_per_step": 4, "rollout_samples_per_prompt": 2, **rollout}
            ),
            weight_sync=WeightSyncConfig("disk" if served else "none"),
            reward=RewardConfig(reward, reward_workers=1, reward_max_failures=reward_max_failures),
            eval=EvalConfig(eval_top_p=0.5) if eval_prompts else EvalConfig(),
            train=TrainConfig(train_iters=5, updates_per_rollout=1),
        )
        inputs: Any = SimpleNamespace(
            prompts=prompts,
            eval_prompts=prompts[:eval_prompts],
            rollouts=None,
            stop_ids=(2,),
            tokenizer=Tokenizer(),
            device=SimpleNamespace(torch=torch.device("cpu")),
        )
        engine, one = Engine(), layout or OneReplica()
        version = iter(range(0, 100, 4))
        made.append(Collector(config, inputs, one, engine, lambda: next(version), PhaseTimer()))  # type: ignore[arg-type]
        return made[-1], engine

    yield make
    for collector in made:
        collector.close()


def numbers(batch: Any) -> list[int]:
    """The prompts of a batch, in its order."""
    return [int(rollout.prompt.text) for rollout in batch.rollouts[::2]]


def test_a_batch_has_the_prompts_of_its_step_whatever_is_not_asked_for(collectors: Any) -> None:
    collector, engine = collectors(rollout_extra_prompts=3)
    batch = collector.collect(0)
    assert len(batch.rollouts) == 8 and len(set(numbers(batch))) == 4
    assert [rollout.sample for rollout in batch.rollouts] == [0, 1] * 4
    again, _ = collectors()
    assert numbers(again.collect(0)) == numbers(batch)
    assert numbers(again.collect(1)) != numbers(batch)
    (requests, sampling), *_ = engine.asked
    assert len({request.stream for request in requests}) == 8
    assert sampling.seed == TrainConfig().seed and sampling.stop_ids == (2,)


def test_replicas_share_the_prompts_out_with_the_same_streams(collectors: Any) -> None:
    _, whole = whole_run = collectors()
    whole_run[0].collect(0)
    streams = {request.stream: request.prompt_ids.item() for request in whole.asked[0][0]}
    shared: dict[int, int] = {}
    for rank in range(3):
        collector, engine = collectors(OneReplica(rank, 3))
        collector.collect(0)
        shared |= {r.stream: r.prompt_ids.item() for r in engine.asked[0][0]}
    assert shared == streams


def test_groups_of_equal_rewards_are_replaced_in_the_order_drawn(collectors: Any) -> None:
    plain, _ = collectors()
    drawn = numbers(plain.collect(0))
    collector, engine = collectors(dynamic_sampling=True, dynamic_sampling_rounds=9)
    batch = collector.collect(0)
    told = batch.statistics
    assert sorted(numbers(batch)) == [0, 3, 6, 9], "there are four that teach something"
    assert told["dynamic_sampling/missing"] == 0
    assert told["dynamic_sampling/replaced"] == sum(number % 3 != 0 for number in drawn)
    assert told["dynamic_sampling/prompts"] == sum(len(asked) for asked, _ in engine.asked) / 2
    streams = [request.stream for asked, _ in engine.asked for request in asked]
    assert len(set(streams)) == len(streams), "no two responses share random numbers"
    again, _ = collectors(dynamic_sampling=True, dynamic_sampling_rounds=9)
    assert numbers(again.collect(0)) == numbers(batch)


def test_what_cannot_be_replaced_remains(collectors: Any) -> None:
    collector, engine = collectors(
        dynamic_sampling=True, rollout_prompts_per_step=6, rollout_extra_prompts=2
    )
    batch = collector.collect(0)
    assert len(numbers(batch)) == 6 and {0, 3, 6, 9} <= {*numbers(batch)}
    assert batch.statistics["dynamic_sampling/missing"] == 2
    assert batch.statistics["dynamic_sampling/prompts"] == PROMPTS, "there were no more"
    assert len(engine.asked[0][0]) == 16, "eight prompts were drawn at first"
    limited, engine = collectors(
        dynamic_sampling=True, rollout_prompts_per_step=6, dynamic_sampling_rounds=1
    )
    assert limited.collect(0).statistics["dynamic_sampling/rounds"] == 1
    assert len(engine.asked) == 2


def test_a_replica_may_be_left_without_prompts(collectors: Any) -> None:
    collector, engine = collectors(OneReplica(1, 2), eval_prompts=1)
    batch = collector.evaluate()
    assert batch.rollouts == [] and engine.asked[0][0] == []


def test_a_reward_that_fails_costs_its_sample_or_too_many_the_run(collectors: Any) -> None:
    collector, _ = collectors(rollout_prompts_per_step=12)
    batch = collector.collect(0)
    failed = [
        r for r, value in zip(batch.rollouts, batch.rewards, strict=True) if math.isnan(value)
    ]
    assert [(rollout.prompt.id, rollout.sample) for rollout in failed] == [("p05", 1)]
    assert len(batch.failures) == 1 and "five" in batch.failures[0]
    strict, _ = collectors(rollout_prompts_per_step=12, reward_max_failures=0.0)
    with pytest.raises(RewardError, match="p05.*five"):
        strict.collect(0)


def test_evaluation_has_its_own_law_and_streams_and_keeps_no_ids(collectors: Any) -> None:
    collector, engine = collectors(eval_prompts=3)
    first = collector.evaluate()
    collector.collect(0)
    assert collector.evaluate().rewards == first.rewards
    (asked, sampling), (trained, law), (again, _) = engine.asked
    assert sampling.top_p == 0.5 and law.top_p == 1
    assert [r.stream for r in asked] == [r.stream for r in again]
    assert not {r.stream for r in asked} & {r.stream for r in trained}
    assert all(rollout.kept_ids is None for rollout in first.rollouts)


def test_generation_runs_ahead_and_versions_are_those_of_its_start(collectors: Any) -> None:
    servers = {"rollout_engine": "vllm", "rollout_servers": ("http://h:1",)}
    collector, engine = collectors(rollout_lag=2, **servers)
    plain, _ = collectors()
    for step in range(5):
        assert numbers(collector.collect(step)) == numbers(plain.collect(step))
        assert len(engine.asked) == min(step + 3, 5)


def test_an_answer_is_asked_for_where_an_environment_leaves_it_to_the_reward(
    collectors: Any, tmp_path: Path
) -> None:
    (tmp_path / "silent.py").write_text(
        "from megatron_drpo.rollout.environment import Observation\n"
        "class Silent:\n"
        "    def __init__(self, prompt): pass\n"
        "    def step(self, turn): return Observation(done=True)\n"
    )

    class Words(Tokenizer):
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    collector, _ = collectors(environment="silent:Silent", reward="exact")
    collector.inputs.tokenizer = Words()  # type: ignore[misc]
    with pytest.raises(DataError, match="no `answer`"):
        collector.collect(0)
