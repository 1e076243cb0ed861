"""Conversations of several turns between the policy and an environment, as rollouts.

    prompt, turn 1, observation, turn 2, observation, ..., the last turn
            |--------------------- the response ---------------------|

Where it fits: L2, between the engine and rewards. In: prompts, an engine and an environment
factory. Out: one `Rollout` for each, whose `loss_mask` is False at the observations. All live
conversations take their turns together, so that an engine sees batches. Token ids are strung
together as they were drawn, never decoded and encoded again.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_drpo.errors import DataError
from megatron_drpo.rewards import finite_number
from megatron_drpo.rollout.engine import Completion, Request, RolloutEngine, Sampling
from megatron_drpo.rollout.environment import (
    Environment,
    EnvironmentFactory,
    Failed,
    Observation,
    Turn,
    call_all,
)
from megatron_drpo.types import FinishReason, Prompt, Rollout
from megatron_drpo.vocab_parallel.kept import cat_kept, uncut


@dataclass(frozen=True)
class Episodes:
    """Conversations, ended.

    Example: Episodes(rollouts=[...], rewards=[1.0, None, nan],
                      failures=["prompt 'a:7', sample 2: the environment raised KeyError: 'x'"])
    """

    rollouts: list[Rollout]
    rewards: list[float | None]
    """Of each; None where the environment gave none, NaN where it failed."""
    failures: list[str]
    """One for each NaN, in order."""


def run_episodes(
    engine: RolloutEngine,
    wanted: Sequence[tuple[Prompt, int]],
    streams: Sequence[int],
    sampling: Sampling,
    environment: EnvironmentFactory,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_turns: int,
    policy_version: int,
    timeout_seconds: float,
    share: Callable[[Any], Any],
    is_source: bool,
    any_live: Callable[[bool], bool] = bool,
) -> Episodes:
    """Hold a conversation about each prompt; the same on every rank that calls this.

    A conversation ends when the environment says so (finish reason `stop`), or because no turn can
    follow (`length`): after `max_turns`, or where the observation would use up its tokens. That
    observation is left out. One whose environment fails ends with the turn that it failed on.

    Args:
        wanted: [N], prompt and number of the sample; samples of one prompt next to each other.
        streams: [N], the stream of random numbers of each.
        sampling: `max_response_length` holds for the whole response, observations included.
        environment: called once per conversation, on the source.
        policy_version: where the engine does not say itself.
        timeout_seconds: for one answer of an environment.
        share: returns, on every rank, what the source handed to it.
        is_source: whether environments run here.
        any_live: whether there is a conversation left on any rank that the engine generates in
            step with, as where experts are shared out; by default this replica is on its own.
    """
    conversations = [
        _Conversation(prompt, sample, stream, sampling.max_response_length)
        for (prompt, sample), stream in zip(wanted, streams, strict=True)
    ]
    environments: dict[_Conversation, Environment] = {}
    live = conversations
    for number in range(1, max_turns + 1):
        if not any_live(bool(live)):
            break
        requests = [conversation.request() for conversation in live]
        for conversation, done in zip(live, engine.generate(requests, sampling), strict=True):
            conversation.add_turn(done, policy_version)
        if not live:
            continue
        answers = None
        if is_source:
            answers = _answers(
                live, number, max_turns, environment, environments, tokenizer, timeout_seconds
            )
        for conversation, answer in zip(live, share(answers), strict=True):
            conversation.add_answer(answer, last=number == max_turns)
        live = [conversation for conversation in live if conversation.finish is None]
    return Episodes(
        [conversation.rollout(tokenizer) for conversation in conversations],
        [conversation.reward for conversation in conversations],
        [conversation.failure for conversation in conversations if conversation.failure],
    )


@dataclass(frozen=True)
class _Answer:
    """What an environment said, as all ranks get it."""

    token_ids: tuple[int, ...] = ()
    reward: float | None = None
    done: bool = False
    failure: str = ""


@dataclass(eq=False)
class _Conversation:
    """A response that grows."""

    prompt: Prompt
    sample: int
    stream: int
    most: int
    """Tokens that the response may have."""
    pieces: list[Completion] = field(default_factory=list)
    """Turns and observations, each with its version spans; a turn comes first and last."""
    written: list[bool] = field(default_factory=list)
    """Of each piece, whether the policy wrote it."""
    reward: float | None = None
    failure: str = ""
    finish: FinishReason | None = None
    """None while it goes on."""

    @property
    def ids(self) -> list[Tensor]:
        return [piece.response_ids for piece in self.pieces]

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.most - sum(map(len, self.ids))

    def request(self) -> Request:
        """The next turn."""
        so_far = torch.cat([self.prompt.token_ids, *self.ids])
        return Request(so_far, self.stream, self.most - self.room, self.room)

    def add_turn(self, done: Completion, policy_version: int) -> None:
        spans = done.version_spans or ((len(done.response_ids), policy_version),)
        self.pieces.append(replace(done, version_spans=spans))
        self.written.append(True)

    def add_answer(self, answer: _Answer, *, last: bool) -> None:
        turn = self.pieces[-1]
        if answer.failure:
            where = f"prompt {self.prompt.id!r}, sample {self.sample}"
            self.failure = f"{where}: the environment {answer.failure}"
            self.reward, self.finish = math.nan, turn.finish_reason
            return
        if answer.reward is not None:
            self.reward = (self.reward or 0.0) + answer.reward
        if answer.done:
            self.finish = "stop"
        elif last or len(answer.token_ids) >= self.room:
            self.finish = "length"
        elif answer.token_ids:
            self.pieces.append(_observed(answer.token_ids, turn))
            self.written.append(False)

    def rollout(self, tokenizer: PreTrainedTokenizerBase) -> Rollout:
        """The whole of it."""
        pieces, ids = self.pieces, torch.cat(self.ids)
        assert self.finish is not None
        kept = [piece.kept_ids for piece in pieces if piece.kept_ids is not None]
        spans = _merged([span for piece in pieces for span in piece.version_spans])
        written = [torch.full((len(p),), w) for p, w in zip(self.ids, self.written, strict=True)]
        return Rollout(
            prompt=self.prompt,
            sample=self.sample,
            response_ids=ids,
            behaviour_logprobs=torch.cat([piece.logprobs for piece in pieces]),
            finish_reason=self.finish,
            policy_version=spans[0][1],
            response_text=str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)),
            topk_ids=_cat([piece.topk_ids for piece in pieces]),
            topk_logprobs=_cat([piece.topk_logprobs for piece in pieces]),
            kept_ids=cat_kept(kept) if kept else None,
            version_spans=spans if len(spans) > 1 else (),
            loss_mask=torch.cat(written),
        )


def _observed(token_ids: tuple[int, ...], turn: Completion) -> Completion:
    """An observation in the form of the turn before it; what nobody looks at is zero."""
    ids = torch.tensor(token_ids, dtype=torch.int64)

    def zeros(like: Tensor | None) -> Tensor | None:
        return None if like is None else like.new_zeros((len(ids), *like.shape[1:]))

    return Completion(
        ids,
        turn.logprobs.new_zeros(len(ids)),
        turn.finish_reason,
        zeros(turn.topk_ids),
        zeros(turn.topk_logprobs),
        None if turn.kept_ids is None else uncut(len(ids)),
        ((len(ids), turn.version_spans[-1][1]),),
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _merged(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours of the same version as one."""
    groups = itertools.groupby(spans, lambda span: span[1])
    return tuple((sum(tokens for tokens, _ in group), version) for version, group in groups)


# Where environments run.


def _answers(
    live: Sequence[_Conversation],
    number: int,
    max_turns: int,
    factory: EnvironmentFactory,
    environments: dict[_Conversation, Environment],
    tokenizer: PreTrainedTokenizerBase,
    seconds: float,
) -> list[_Answer]:
    """Of each conversation's environment to its last turn."""

    def ask(conversation: _Conversation) -> Observation:
        if number == 1:
            environments[conversation] = factory(conversation.prompt)
        turn = conversation.pieces[-1]
        ids = turn.response_ids.tolist()
        return environments[conversation].step(
            Turn(
                number=number,
                text=texts[conversation],
                token_ids=tuple(ids),
                finish_reason=turn.finish_reason,
                last=number == max_turns or conversation.room == 0,
            )
        )

    ids = [conversation.pieces[-1].response_ids.tolist() for conversation in live]
    # Decoded here: tokenizers are not made for several threads.
    texts = dict(zip(live, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))
    observations = call_all([functools.partial(ask, item) for item in live], seconds)
    return [
        _answer(observation, conversation.pieces[-1], tokenizer)
        for conversation, observation in zip(live, observations, strict=True)
    ]


def _answer(
    observation: Observation | Failed, turn: Completion, tokenizer: PreTrainedTokenizerBase
) -> _Answer:
    if isinstance(observation, Failed):
        return _Answer(failure=observation.why)
    if not isinstance(observation, Observation):
        return _Answer(failure=f"returned {observation!r:.100}; must be an Observation")
    reward = observation.reward
    if reward is not None:
        reward = finite_number(reward)
        if reward is None:
            given = f"{observation.reward!r:.100}"
            return _Answer(failure=f"gave the reward {given}; must be a finite number or None")
    if observation.done:
        return _Answer((), reward, done=True)
    try:
        return _Answer(_encode(observation.content, turn, tokenizer), reward)
    except (DataError, jinja2.TemplateError) as error:
        return _Answer(failure=f"gave content that cannot be used: {error}")


def _encode(content: Any, turn: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that follow the turn.

    Raises:
        DataError: it is neither text nor token ids nor chat messages, or there is no template.
    """
    if isinstance(content, str):
        return tuple(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
    if not isinstance(content, Sequence):
        raise DataError(f"{content!r:.100}; must be text, token ids or chat messages")
    if all(isinstance(item, Mapping) for item in content) and content:
        return _encode_messages(content, turn, tokenizer)
    size = len(tokenizer)
    if not all(type(item) is int and 0 <= item < size for item in content):
        raise DataError(f"{content!r:.100}; token ids are integers from 0 to {size - 1}")
    return tuple(content)


_A_TURN = "what-the-policy-said"


def _encode_messages(
    messages: Sequence[Mapping[str, str]], turn: Completion, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """What the chat template puts between a turn of the assistant and its next one.

    It is cut out of the template's rendering of a made-up conversation, so that the turns before
    stay the tokens that they are. The template ends the turn, which the policy may have done.
    """
    if not tokenizer.chat_template:
        raise DataError("chat messages, but the tokenizer has no chat template; give text")
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _A_TURN}]
    text = str(
        tokenizer.apply_chat_template(
            [*before, *map(dict, messages)], tokenize=False, add_generation_prompt=True
        )
    )
    _, found, after = text.partition(_A_TURN)
    if not found:
        raise DataError("chat messages, but the chat template leaves out the assistant's turns")
    ids = tokenizer(after, add_special_tokens=False, verbose=False).input_ids
    return tuple(ids[1:] if ids[:1] == turn.response_ids[-1:].tolist() else ids)
