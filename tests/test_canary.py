"""The canary against loopback servers and a trainer that is a table of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.canary import PROMPT_TOKENS, TEMPERATURE, TOKENS, Canary
from megatron_drpo.rollout.servers import DIALECTS, Client
from megatron_drpo.types import Row
from megatron_drpo.vocab_parallel import TokenScores
from tests.loopback_server import BigramEngine, LoopbackServer

V = 40
PROMPTS = [torch.tensor([3, 5, 7]), torch.tensor([11]), torch.arange(200) % V]


class TablePolicy:
    """The trainer of `BigramEngine`'s law; every rank of a layout of one."""

    row_multiple = 16

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.layout = SimpleNamespace(
            rank=0,
            tp_rank=0,
            dp_rank=0,
            pp_size=1,
            vp_size=1,
            is_last_stage=True,
            gather_objects=lambda value: [value],
        )

    def score(self, rows: Sequence[Row], *, temperature: float) -> list[TokenScores]:
        scores = []
        for row in rows:
            law = (self.table[row.tokens[row.loss_index]] / temperature).log_softmax(-1)
            entropy = -(law.exp() * law).sum(-1)
            scores.append(TokenScores(law.gather(1, row.targets[:, None])[:, 0], entropy))
        return scores


@pytest.fixture
def table() -> Tensor:
    return 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["vllm", "sglang"])
def fleet(table: Tensor, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Two servers with the trainer's weights, and their clients."""
    engines = [BigramEngine(table.clone()) for _ in range(2)]
    servers = [LoopbackServer(engine, score=engine.logprobs) for engine in engines]
    with servers[0], servers[1]:
        clients = [Client(s.url, DIALECTS[request.param], 10.0, retries=0) for s in servers]
        yield SimpleNamespace(servers=servers, clients=clients, urls=[s.url for s in servers])


def canary(table: Tensor, fleet: Any, **how: Any) -> Canary:
    limits = {"bound": 0.2, "rounding": 1e-3} | how
    return Canary(TablePolicy(table), fleet.clients, PROMPTS, **limits)  # type: ignore[arg-type]


def replace_weights(server: LoopbackServer, table: Tensor) -> None:
    server.engine.table = table.clone()


def test_servers_with_the_trainers_weights_pass(table: Tensor, fleet: Any) -> None:
    checked = canary(table, fleet, bound=1e-5).check(0, fleet.urls)
    assert checked.failures == {} and list(checked.gaps) == fleet.urls
    assert max(checked.gaps.values()) < 1e-6
    asked = [body for path, body in fleet.servers[0].requests if path != "/health"]
    prompts = [(body.get("prompt") or body["input_ids"])[0] for body in asked]
    assert sorted(map(len, prompts)) == [1, 3, PROMPT_TOKENS]
    laws = [body.get("sampling_params", [body])[0] for body in asked]
    assert [law["temperature"] for law in laws] == [TEMPERATURE] * len(PROMPTS)


def test_raw_log_probs_are_recognised(table: Tensor, fleet: Any) -> None:
    fleet.servers[1].fail("raw", None)
    checked = canary(table, fleet).check(0, fleet.urls)
    assert list(checked.failures) == [fleet.urls[1]]
    text = checked.failures[fleet.urls[1]]
    assert "looks like another law, temperature 1:" in text and "processed_logprobs" in text
    tokens = TOKENS * len(PROMPTS)
    assert f"{fleet.urls[1]}: its log-probs of {tokens} tokens drawn at temperature 0.7" in text


# With the second, the gap alone is too small to tell.
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_a_server_that_kept_its_weights_is_stale(table: Tensor, fleet: Any, scale: float) -> None:
    check = canary(table, fleet)
    assert not check.check(3, fleet.urls).failures
    change = scale * torch.randn(V, V, generator=torch.Generator().manual_seed(6))
    check._policy.table = table + change  # type: ignore[attr-defined]
    replace_weights(fleet.servers[0], table + change)
    for version in (4, 5):
        checked = check.check(version, fleet.urls)
        assert list(checked.failures) == [fleet.urls[1]]
        text = checked.failures[fleet.urls[1]]
        assert "weights are stale: it answers exactly as under version 3" in text
    assert (checked.gaps[fleet.urls[1]] < 0.2) == (scale < 0.1)
    replace_weights(fleet.servers[1], table + change)
    assert not check.check(6, fleet.urls).failures


def test_weights_that_hardly_change_are_not_called_stale(table: Tensor, fleet: Any) -> None:
    check = canary(table, fleet)
    check.check(3, fleet.urls)
    check._policy.table = table * (1 + 1e-7)  # type: ignore[attr-defined]
    assert not check.check(4, fleet.urls).failures


def test_another_model_at_once(table: Tensor, fleet: Any) -> None:
    noise = torch.randn(V, V, generator=torch.Generator().manual_seed(6))
    replace_weights(fleet.servers[0], table + noise)
    checked = canary(table, fleet).check(0, fleet.urls)
    assert list(checked.failures) == [fleet.urls[0]]
    assert "looks like other weights" in checked.failures[fleet.urls[0]]


def test_no_server_left_is_an_error_that_names_each(table: Tensor, fleet: Any) -> None:
    fleet.servers[0].fail("raw", None)
    fleet.servers[1].fail("error", None)
    check = canary(table, fleet)
    with pytest.raises(RolloutError, match="no server gives log-probs of the policy") as caught:
        check.check(0, fleet.urls)
    lines = str(caught.value).splitlines()[1:]
    assert all(line.startswith(f"  {url}: ") for line, url in zip(lines, fleet.urls, strict=True))
    assert "another law" in lines[0] and "status 500" in lines[1]
    checked = canary(table, fleet, bound=9.0).check(0, fleet.urls)
    assert list(checked.failures) == [fleet.urls[1]] and list(checked.gaps) == [fleet.urls[0]]
