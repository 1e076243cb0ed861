"""The canary: a few tokens from every server, scored by the trainer, before a batch is trusted.

In: servers that say they hold the trainer's weights. Out: which of them do, and return log-probs of
the law that they drew from; the others are named, with what their answers look like. The tokens are
drawn at a temperature other than 1, where log-probs before and after temperature differ (vLLM's
default are the former), from fixed prompts with a fixed seed, so that a server whose weights were
not replaced gives itself away by the answer that it gave before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_drpo.errors import RolloutError
from megatron_drpo.packing import pack
from megatron_drpo.rollout.diagnosis import diagnose
from megatron_drpo.rollout.engine import Sampling
from megatron_drpo.rollout.servers import Client, Job, Response, ServerError
from megatron_drpo.types import Prompt, Rollout, Row, Trajectory
from megatron_drpo.vocab_parallel import TokenScores

if TYPE_CHECKING:
    from megatron_drpo.mcore.policy import Policy

TEMPERATURE = 0.7
TOKENS = 16
"""Of each response."""
PROMPTS, PROMPT_TOKENS = 4, 128
"""Prompts used, and the most that is taken of each."""


@dataclass(frozen=True)
class Checked:
    """What the servers' answers came to; the same on every rank.

    Example: Checked({"http://10.0.0.7:8000": 0.004}, {"http://10.0.0.8:8000": "... differ by ..."})
    """

    gaps: Mapping[str, float]
    """Mean absolute difference to the trainer's log-probs, nats per token, by address."""
    failures: Mapping[str, str]
    """Why a server must not be used, by address."""


@dataclass(frozen=True)
class _Seen:
    """An answer, and what the trainer said of it then."""

    version: int
    answer: list[Response]
    trainer: Tensor


class Canary:
    """Asks and compares. All methods are collective over all ranks."""

    def __init__(
        self,
        policy: Policy,
        servers: Sequence[Client],
        prompts: Sequence[Tensor],
        *,
        bound: float,
        rounding: float,
    ) -> None:
        """Nothing is asked yet.

        Args:
            servers: on rank 0, the clients of all servers; ignored elsewhere.
            prompts: int64 [P] each, at least one, the same ones on every rank.
            bound: largest mean gap, nats per token, of a server that is used.
            rounding: as of `diagnose`.
        """
        self._policy, self._bound, self._rounding = policy, bound, rounding
        self._servers = {server.url: server for server in servers}
        self._prompts = [prompt[-PROMPT_TOKENS:].cpu() for prompt in prompts[:PROMPTS]]
        self._seen: dict[str, _Seen] = {}

    def check(self, version: int, urls: Sequence[str]) -> Checked:
        """Compare the servers at these addresses with the weights as they are now.

        Args:
            version: of the trainer's weights.
            urls: the same on every rank.

        Raises:
            RolloutError: on all ranks, if no server is left; each is named, and why.
        """
        layout = self._policy.layout
        told = asyncio.run(self._ask(urls)) if layout.rank == 0 else None
        answers = layout.gather_objects(told)[0]
        gaps: dict[str, float] = {}
        failures: dict[str, str] = {}
        for url in urls:
            answer = answers[url]
            if isinstance(answer, str):
                failures[url] = answer
                continue
            gaps[url], problem = self._compare(version, url, answer)
            if problem:
                failures[url] = f"{url}: {problem}"
        if urls and len(failures) == len(urls):
            listed = "\n".join(f"  {text}" for text in failures.values())
            raise RolloutError(f"no server gives log-probs of the policy in training:\n{listed}")
        return Checked(gaps, failures)

    async def _ask(self, urls: Sequence[str]) -> dict[str, list[Response] | str]:
        """Each server's responses to all prompts, or what went wrong."""
        sampling = Sampling(TEMPERATURE, 1.0, 0, TOKENS, stop_ids=(), seed=0)
        jobs = [
            Job(tuple(prompt.tolist()), samples=1, seed=n, max_tokens=TOKENS, sampling=sampling)
            for n, prompt in enumerate(self._prompts)
        ]

        async def ask(client: Client) -> list[Response] | str:
            try:
                answers = await asyncio.gather(*map(client.generate, jobs))
            except ServerError as error:
                return str(error)
            found = [responses[0] for responses in answers]
            if any(not response.ids for response in found):
                return f"{client.url}: broke off a response before its first token"
            return found

        told = await asyncio.gather(*(ask(self._servers[url]) for url in urls))
        return dict(zip(urls, told, strict=True))

    def _compare(self, version: int, url: str, answer: list[Response]) -> tuple[float, str | None]:
        """The gap of one server, and what is wrong with it; the same on every rank."""
        rows = self._rows(answer)
        at_canary = self._score(rows, TEMPERATURE)
        behaviour = torch.cat([row.behaviour_logprobs for row in rows])
        gap = float((behaviour - at_canary.logprobs).abs().double().mean())
        before, seen = self._seen.get(url), _Seen(version, answer, at_canary.logprobs)
        self._seen[url] = seen
        if before and before.version != version and before.answer == answer:
            moved = float((seen.trainer - before.trainer).abs().double().mean())
            if moved > self._rounding / 10:
                self._seen[url] = before  # of these weights, the next time as well
                return gap, (
                    f"its weights are stale: it answers exactly as under version {before.version}, "
                    f"though the trainer's log-probs of that answer have moved by {moved:.2g} nats "
                    f"per token up to version {version}"
                )
        if gap <= self._bound:
            return gap, None
        text = diagnose(
            behaviour,
            {
                "the trainer's law": at_canary.logprobs,
                "temperature 1": self._score(rows, 1.0).logprobs,
            },
            entropy=at_canary.entropy,
            rounding=self._rounding,
        )
        return gap, (
            f"its log-probs of {behaviour.numel()} tokens drawn at temperature {TEMPERATURE} "
            f"differ from the trainer's by {gap:.3g} nats per token, more than --max-engine-gap "
            f"{self._bound:g}. {text}"
        )

    def _rows(self, answer: list[Response]) -> list[Row]:
        """The answer as rows that every replica scores alike."""
        trajectories = [
            Trajectory(
                Rollout(
                    prompt=Prompt(id=f"canary {n}", text="", token_ids=prompt, answer=None),
                    sample=0,
                    response_ids=torch.tensor(response.ids),
                    behaviour_logprobs=torch.tensor(response.logprobs),
                    finish_reason="length",
                    policy_version=0,
                    response_text="",
                ),
                reward=0.0,
                advantage=0.0,
            )
            for n, (prompt, response) in enumerate(zip(self._prompts, answer, strict=True))
        ]
        layout = self._policy.layout
        return pack(
            trajectories,
            max_tokens=PROMPTS * (PROMPT_TOKENS + TOKENS),
            num_replicas=1,
            rows_multiple=layout.pp_size if layout.vp_size > 1 else 1,
            aggregation="token-mean",
            horizon=TOKENS,
            pad_multiple=self._policy.row_multiple,
        )[0]

    def _score(self, rows: Sequence[Row], temperature: float) -> TokenScores:
        """The trainer's fp32 [T] on the CPU, of all rows together, on every rank."""
        layout, message = self._policy.layout, None
        scores = self._policy.score(rows, temperature=temperature)
        if layout.is_last_stage and layout.tp_rank == 0 and layout.dp_rank == 0:
            columns = zip(*scores, strict=True)
            message = TokenScores(*(torch.cat(parts).float().cpu() for parts in columns))
        return layout.gather_objects(message)[0]
