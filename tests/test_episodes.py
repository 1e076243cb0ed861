"""Conversations: what the policy said, what it saw, and which of both it is trained on."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.calculator.environment import Calculator
from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.engine import Completion, Request, Sampling
from megatron_drpo.rollout.environment import (
    Failed,
    Observation,
    Turn,
    call_all,
    load_environment,
)
from megatron_drpo.rollout.episodes import Episodes, run_episodes
from megatron_drpo.types import KeptIds, Prompt

SAMPLING = Sampling(1.0, 1.0, 0, 12, stop_ids=(1,), seed=7)
CHARACTERS = "0123456789+=?* abcdefghijklmnopqrstuvwxyz\\{}()"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token; id 1 ends a turn, also in the chat template."""
    vocab = {text: i for i, text in enumerate(["<pad>", "</s>", "<u>", "<a>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    inner.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<u>", "<a>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</s>"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    return tokenizer


class Script:
    """An engine that says what is written for what it sees; the log-prob of a token is minus its
    place in the response / 8, so that whoever mixes them up is found out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, lines: dict[str, str]) -> None:
        self.tokenizer, self.lines = tokenizer, lines
        self.calls: list[list[tuple[str, int, int, int | None]]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append([])
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Completion:
        seen = str(self.tokenizer.decode(request.prompt_ids.tolist()))
        limit = request.max_response_length
        self.calls[-1].append((seen, request.stream, request.first_position, limit))
        ids = torch.tensor(self.tokenizer(self.lines[seen]).input_ids)[:limit]
        logprobs = -(request.first_position + torch.arange(len(ids))) / 8
        return Completion(ids, logprobs, "stop" if ids[-1] == 1 else "length")


def prompt(text: str, answer: str | None = None) -> Prompt:
    ids = [4 + CHARACTERS.index(character) for character in text]
    return Prompt(f"p:{text}", text, torch.tensor(ids), answer)


def converse(
    engine: Any, tokenizer: PreTrainedTokenizerFast, environment: Callable[..., Any], **changes: Any
) -> Episodes:
    prompts: Sequence[Prompt] = changes.pop("prompts", (prompt("q="),))
    return run_episodes(
        engine,
        [(item, 5 + i) for i, item in enumerate(prompts)],
        [40 + i for i in range(len(prompts))],
        changes.pop("sampling", SAMPLING),
        environment,
        tokenizer,
        **{
            "max_turns": 3,
            "policy_version": 4,
            "timeout_seconds": 5.0,
            "share": lambda value: value,
            "is_source": True,
        }
        | changes,
    )


class Scripted:
    """An environment that gives the observations of a list, and keeps what it was told."""

    def __init__(self, *observations: Any) -> None:
        self.observations, self.turns = list(observations), list[Turn]()

    def __call__(self, prompt: Prompt) -> Scripted:
        return self

    def step(self, turn: Turn) -> Any:
        self.turns.append(turn)
        observation = self.observations[len(self.turns) - 1]
        return observation() if callable(observation) else observation


def test_a_conversation_becomes_one_rollout(tokenizer):
    engine = Script(tokenizer, {"q=": "ab</s>", "q=ab</s>99": "c</s>", "q=ab</s>99c</s>7": "d</s>"})
    world = Scripted(
        Observation("99", reward=0.25), Observation("7"), Observation("5", reward=0.5, done=True)
    )
    episodes = converse(engine, tokenizer, world)
    (rollout,) = episodes.rollouts
    assert rollout.response_text == "ab99c7d" and rollout.sample == 5
    assert rollout.response_ids.tolist() == tokenizer("ab</s>99c</s>7d</s>").input_ids
    assert rollout.loss_mask is not None and rollout.num_loss_tokens == 7
    written = [True] * 3 + [False] * 2 + [True] * 2 + [False] + [True] * 2
    assert rollout.loss_mask.tolist() == written
    # Each turn's own log-probs at its own places, zero where the environment spoke.
    expected = [-i / 8 if w else 0.0 for i, w in enumerate(written)]
    assert rollout.behaviour_logprobs.tolist() == expected
    assert (rollout.policy_version, rollout.version_spans) == (4, ())
    assert rollout.finish_reason == "stop"
    assert rollout.topk_ids is None and rollout.kept_ids is None
    assert episodes.rewards == [0.75] and episodes.failures == []
    # Of its sequence of random numbers, a turn takes those of its own places.
    assert engine.calls == [
        [("q=", 40, 0, 12)],
        [("q=ab</s>99", 40, 5, 7)],
        [("q=ab</s>99c</s>7", 40, 8, 4)],
    ]
    a, c, d = (tuple(tokenizer(text).input_ids) for text in ("ab</s>", "c</s>", "d</s>"))
    assert world.turns == [
        Turn(1, "ab", a, "stop", last=False),
        Turn(2, "c", c, "stop", last=False),
        Turn(3, "d", d, "stop", last=True),
    ]


def test_live_conversations_take_their_turns_together_and_stay_in_order(tokenizer):
    lines = {"1=": "a</s>", "2=": "b</s>", "3=": "c</s>", "1=a</s>x": "d</s>", "3=c</s>x": "e</s>"}
    engine = Script(tokenizer, lines)

    class World:
        def __init__(self, prompt: Prompt) -> None:
            self.done = prompt.text == "2="

        def step(self, turn: Turn) -> Observation:
            time.sleep(0.05 if turn.text == "a" else 0)
            return Observation("x", done=self.done or turn.number == 2)

    prompts = [prompt("1="), prompt("2="), prompt("3=")]
    episodes = converse(engine, tokenizer, World, prompts=prompts)
    assert [rollout.response_text for rollout in episodes.rollouts] == ["axd", "b", "cxe"]
    assert [rollout.prompt for rollout in episodes.rollouts] == prompts
    assert [[seen for seen, *_ in call] for call in engine.calls] == [
        ["1=", "2=", "3="],
        ["1=a</s>x", "3=c</s>x"],
    ]
    # Nobody gave rewards: they are for --reward to give.
    assert episodes.rewards == [None] * 3


@pytest.mark.parametrize(
    ("line", "observation", "text", "finish"),
    [
        ("abcdefghijklmnop", "x", "abcdefghijkl", "length"),  # the first turn takes all there is
        ("ab</s>", "0123456789", "ab", "length"),  # would leave no token to say anything
        ("ab</s>", "012345678", "ab", "length"),
        ("ab</s>", "01234567", "ab01234567z", "length"),  # leaves one
    ],
)
def test_a_conversation_never_has_more_tokens_than_it_may(
    tokenizer, line, observation, text, finish
):
    engine = Script(tokenizer, {"q=": line, "q=ab</s>01234567": "zzz</s>"})
    world = Scripted(Observation(observation, 1.0), Observation("x", 2.0))
    episodes = converse(engine, tokenizer, world)
    (rollout,) = episodes.rollouts
    assert (rollout.response_text, rollout.finish_reason) == (text, finish)
    assert rollout.response_ids.numel() <= SAMPLING.max_response_length
    assert rollout.loss_mask is not None and rollout.loss_mask[-1]
    # The environment is asked of every turn, also of the last one.
    assert episodes.rewards == [3.0 if text.endswith("z") else 1.0]
    assert world.turns[-1].last == (rollout.response_ids.numel() == SAMPLING.max_response_length)


def test_turns_are_limited(tokenizer):
    engine = Script(tokenizer, {"q=": "a</s>", "q=a</s>x": "b</s>"})
    world = Scripted(Observation("x"), Observation("y"))
    (rollout,) = converse(engine, tokenizer, world, max_turns=2).rollouts
    assert (rollout.response_text, rollout.finish_reason) == ("axb", "length")
    assert [turn.last for turn in world.turns] == [False, True]


def test_top_k_kept_ids_and_versions_stay_aligned(tokenizer):
    class Engine(Script):
        def answer(self, request: Request) -> Completion:
            done, start = super().answer(request), request.first_position
            n = done.response_ids.numel()
            return replace(
                done,
                topk_ids=torch.arange(2 * n).view(n, 2) + start,
                topk_logprobs=-torch.ones(n, 2) * (start + 1),
                kept_ids=KeptIds(torch.full((2 * n,), start + 1), torch.full((n,), 2)),
                version_spans=((1, 4), (n - 1, 6)) if start == 0 else (),
            )

    engine = Engine(tokenizer, {"q=": "abc</s>", "q=abc</s>99": "d</s>"})
    world = Scripted(Observation("99"), Observation(done=True))
    (rollout,) = converse(engine, tokenizer, world, policy_version=6).rollouts
    assert rollout.topk_ids is not None and rollout.topk_logprobs is not None
    assert rollout.topk_ids[:, 0].tolist() == [0, 2, 4, 6, 0, 0, 6, 8]
    assert rollout.topk_logprobs[:, 1].tolist() == [-1.0] * 4 + [0.0] * 2 + [-7.0] * 2
    assert rollout.kept_ids is not None
    assert rollout.kept_ids.counts.tolist() == [2, 2, 2, 2, 0, 0, 2, 2]
    assert rollout.kept_ids.ids.tolist() == [1] * 8 + [7] * 4
    # An observation counts as of the weights before it; neighbours of one version are one span.
    assert (rollout.policy_version, rollout.version_spans) == (4, ((1, 4), (7, 6)))


@pytest.mark.parametrize(
    ("line", "content", "seen"),
    [
        ("a</s>", "12", "12"),
        ("a</s>", [4, 5], "01"),
        ("a</s>", [], ""),
        # The template's own end of the turn is there once, whoever wrote it.
        ("a</s>", [{"role": "user", "content": "12"}], "<u>12</s><a>"),
        ("a</s>", [{"role": "user", "content": "1"}] * 2, "<u>1</s><u>1</s><a>"),
    ],
)
def test_an_observation_is_text_or_token_ids_or_messages(tokenizer, line, content, seen):
    engine = Script(tokenizer, {"q=": line, f"q={line}{seen}": "z</s>"})
    world = Scripted(Observation(content), Observation(done=True))
    (rollout,) = converse(engine, tokenizer, world).rollouts
    assert tokenizer.decode(rollout.response_ids) == f"{line}{seen}z</s>"


def test_messages_end_a_turn_that_the_policy_left_open(tokenizer):
    class StopString(Script):
        def answer(self, request: Request) -> Completion:
            return replace(super().answer(request), finish_reason="stop")

    engine = StopString(tokenizer, {"q=": "a)", "q=a)</s><u>1</s><a>": "z</s>"})
    world = Scripted(Observation([{"role": "user", "content": "1"}]), Observation(done=True))
    (rollout,) = converse(engine, tokenizer, world).rollouts
    assert tokenizer.decode(rollout.response_ids) == "a)</s><u>1</s><a>z</s>"


def fail() -> Observation:
    return {}["x"]


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        (fail, r"raised KeyError: 'x' \(.*test_episodes\.py:\d+\)"),
        (lambda: exit(3), "raised SystemExit: 3"),
        (lambda: time.sleep(30), "took longer than --reward-timeout-seconds 0.3"),
        (None, "returned None; must be an Observation"),
        (Observation("x", reward=math.nan), "gave the reward nan; must be a finite number"),
        (Observation("x", reward="1"), "gave the reward '1'"),  # type: ignore[arg-type]
        (Observation(3.5), "gave content that cannot be used: 3.5"),  # type: ignore[arg-type]
        (Observation([4, -1]), "token ids are integers from 0 to "),
        (Observation([4, True]), "token ids are integers from 0 to "),
        (Observation([{"role": "tool", "content": ""}]), "cannot be used: no tools"),
    ],
)
def test_an_environment_that_fails_costs_its_conversation_alone(tokenizer, observation, said):
    engine = Script(tokenizer, {"1=": "a</s>", "1=a</s>x": "b</s>", "2=": "c</s>"})
    good = Scripted(Observation("x", 1.0), Observation(done=True))

    def factory(prompt: Prompt) -> Scripted:
        return good if prompt.text == "1=" else Scripted(observation)

    prompts = [prompt("2="), prompt("1=")]
    episodes = converse(engine, tokenizer, factory, prompts=prompts, timeout_seconds=0.3)
    bad, kept = episodes.rollouts
    assert (bad.response_text, bad.finish_reason, kept.response_text) == ("c", "stop", "axb")
    assert episodes.rewards[0] is not None and math.isnan(episodes.rewards[0])
    assert episodes.rewards[1] == 1.0
    (failure,) = episodes.failures
    assert failure.startswith("prompt 'p:2=', sample 5: the environment ")
    assert re.search(said, failure)


def test_a_factory_that_fails_costs_its_conversation(tokenizer):
    engine = Script(tokenizer, {"q=": "a</s>"})

    def factory(prompt: Prompt) -> Scripted:
        raise OSError("no sandbox")

    episodes = converse(engine, tokenizer, factory)
    assert "the environment raised OSError: no sandbox" in episodes.failures[0]
    assert episodes.rollouts[0].response_text == "a"


def test_ranks_without_environments_do_as_the_source_does(tokenizer):
    lines = {"q=": "a</s>", "q=a</s>x": "b</s>"}
    told: list[Any] = []
    world = Scripted(Observation("x", 0.5), Observation(done=True))
    source = converse(
        Script(tokenizer, lines), tokenizer, world, share=lambda v: told.append(v) or v
    )
    answers = iter(told)

    def never(prompt: Prompt) -> Scripted:
        raise AssertionError("an environment away from the source")

    other = converse(
        Script(tokenizer, lines), tokenizer, never, share=lambda _: next(answers), is_source=False
    )
    assert other.rewards == source.rewards == [0.5] and other.failures == []
    (a,), (b,) = source.rollouts, other.rollouts
    assert a.response_ids.equal(b.response_ids) and a.finish_reason == b.finish_reason
    assert a.loss_mask is not None and b.loss_mask is not None and a.loss_mask.equal(b.loss_mask)


def test_calls_run_next_to_each_other_and_one_that_hangs_gives_way():
    """70 calls, of which 64 run at a time: the first ones hang, and the others still get done."""

    def call(number: int) -> int:
        time.sleep(30 if number < 64 else 0)
        return number

    start = time.monotonic()
    results = call_all([lambda i=i: call(i) for i in range(70)], 0.5)
    assert time.monotonic() - start < 4
    assert results == [Failed("took longer than --reward-timeout-seconds 0.5")] * 64 + list(
        range(64, 70)
    )
    assert call_all([], 1.0) == []


def test_environments_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_environment("examples.calculator.environment:Calculator") is Calculator
    with pytest.raises(RolloutError, match="--environment calculator: give MODULE:FACTORY"):
        load_environment("calculator")
    with pytest.raises(RolloutError, match=r"has no function 'Calculater'"):
        load_environment("examples.calculator.environment:Calculater")


@pytest.mark.parametrize(
    ("text", "content", "reward", "done"),
    [
        ("calc(47*85)", "=3995 ", 0.0, False),
        ("so calc(3*4)", "=12 ", 0.0, False),
        ("\\boxed{3995}", "", 1.0, True),
        ("\\boxed{3994}", "", 0.0, True),
        ("calc(47*85) ", "", 0.0, True),
        ("calc(9999999999*1)", "", 0.0, True),
    ],
)
def test_the_calculator(text, content, reward, done):
    world = Calculator(prompt("47*85=", "3995"))
    observation = world.step(Turn(1, text, (), "stop", last=False))
    assert observation == Observation(content, reward, done)


def test_a_replica_generates_on_for_others_that_need_its_experts(tokenizer):
    """With nothing left to say it still takes part in each turn, and asks no environment."""
    engine, live = Idle(), iter([True, True, False])
    episodes = converse(engine, tokenizer, fail, prompts=(), any_live=lambda here: next(live))
    assert episodes.rollouts == [] and engine.calls == [0, 0]
    alone = Idle()
    assert converse(alone, tokenizer, fail, prompts=()).rollouts == [] and alone.calls == []


class Idle:
    """An engine that is asked for nothing."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, requests: Sequence[Any], sampling: Any) -> list[Any]:
        self.calls.append(len(requests))
        return []
