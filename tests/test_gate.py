"""The gate: which tokens are compared, which gap is too large, and what the error says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RolloutConfig,
    WeightSyncConfig,
)
from megatron_drpo.errors import RolloutError
from megatron_drpo.gate import Gate, bound
from megatron_drpo.packing import pack
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel import TokenScores

T, V, TEMPERATURE = 300, 50, 0.7
LOGITS = 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(0))
IDS = torch.distributions.Categorical(logits=LOGITS / TEMPERATURE).sample()


def config(**rollout: Any) -> Config:
    sync = WeightSyncConfig("disk" if "rollout_servers" in rollout else "none")
    return Config(
        ModelConfig("m"),
        data=DataConfig() if "rollouts_file" in rollout else DataConfig("p"),
        rollout=RolloutConfig(rollout_temperature=TEMPERATURE, **rollout),
        weight_sync=sync,
    )


def law(temperature: float) -> Tensor:
    """fp32 [T], log-probs of the tokens."""
    return (LOGITS / temperature).log_softmax(-1).gather(-1, IDS[:, None])[:, 0]


class OneRank:
    """The layout and the policy that the gate asks, of one rank whose logits are known."""

    is_last_stage, tp_rank, num_updates = True, 0, 4

    @property
    def layout(self) -> OneRank:
        return self

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def score(
        self, rows: Sequence[Row], *, temperature: float = TEMPERATURE, untruncated: bool = False
    ) -> list[TokenScores]:
        logp = (LOGITS / temperature).log_softmax(-1)
        return [TokenScores(law(temperature), -(logp.exp() * logp).sum(-1))]


def rows(behaviour: Tensor, spans: tuple[tuple[int, int], ...] = ()) -> list[list[Row]]:
    """One update of one row, scored."""
    prompt = Prompt("p", "", torch.tensor([1]), None)
    rollout = Rollout(prompt, 0, IDS, behaviour, "stop", 4, "", version_spans=spans)
    ((row,),) = pack(
        [Trajectory(rollout, 0.0, 0.0)],
        max_tokens=1000,
        num_replicas=1,
        aggregation="token-mean",
        horizon=1,
    )
    return [[replace(row, old_logprobs=law(TEMPERATURE))]]


def gate(exact: bool = True, **rollout: Any) -> Gate:
    policy: Any = OneRank()
    return Gate(config(**rollout), policy, exact=exact)


def test_the_bound_depends_on_what_was_proven() -> None:
    assert bound(config(), exact=True).nats == 0
    assert bound(config(), exact=False).nats == 1e-3
    bf16 = replace(config(), model=ModelConfig("m", bf16=True))
    assert bound(bf16, exact=False).nats == 0.1
    assert bound(bf16, exact=True).nats == 0
    fp8 = replace(bf16, precision=PrecisionConfig(fp8_format="hybrid"))
    assert bound(fp8, exact=False) == (0.2, "for FP8")
    served = {"rollout_engine": "vllm", "rollout_servers": ("http://h:1",)}
    assert bound(config(**served), exact=False).nats == 0.2
    assert bound(config(max_engine_gap=0.3), exact=True).nats == 0.3


def test_equal_logprobs_pass_and_one_bit_does_not_where_exactness_is_proven() -> None:
    assert gate().check(rows(law(TEMPERATURE)), 0)["engine_gap/exact_share"] == 1
    moved = law(TEMPERATURE).clone()
    moved[7] = torch.nextafter(moved[7], torch.tensor(-100.0))
    with pytest.raises(RolloutError, match="--max-engine-gap 0 .*bit for bit.*step 1 "):
        gate().check(rows(moved), 0)
    assert gate(exact=False).check(rows(moved), 0)["engine_gap/max_abs"] > 0


def test_the_error_names_the_law_that_fits() -> None:
    with pytest.raises(RolloutError, match="another law, temperature 1"):
        gate(exact=False).check(rows(law(1.0)), 2)
    with pytest.raises(RolloutError, match="about 0.8.* times the trainer's temperature"):
        gate(exact=False).check(rows(law(0.6)), 2)


def test_logprobs_of_the_whole_law_are_recognised_under_truncation() -> None:
    """Where sampling is truncated, `old_logprobs` are renormalised over the kept ids."""
    (update,) = rows(law(TEMPERATURE))
    higher = law(TEMPERATURE) + 0.2 * torch.rand(T, generator=torch.Generator().manual_seed(1))
    scored = [replace(row, old_logprobs=higher) for row in update]
    with pytest.raises(RolloutError, match="another law, without truncation"):
        gate(exact=False, rollout_top_p=0.9).check([scored], 0)


def test_tokens_of_older_weights_are_not_compared() -> None:
    behaviour = law(TEMPERATURE).clone()
    behaviour[:100] -= 1
    spans = ((100, 2), (200, 4))
    assert gate().check(rows(behaviour, spans), 0)["engine_gap/exact_share"] == 1
    assert gate().check(rows(behaviour - 1, ((300, 3),)), 0) == {}
    with pytest.raises(RolloutError):
        gate().check(rows(behaviour, ((99, 2), (201, 4))), 0)


def test_a_file_of_rollouts_is_compared_and_never_refused() -> None:
    found = gate(rollouts_file="r").check(rows(law(TEMPERATURE) - 0.5, ((300, 0),)), 0)
    assert found["engine_gap/mean_abs"] == pytest.approx(0.5)
