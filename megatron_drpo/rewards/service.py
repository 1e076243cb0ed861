"""A reward that an HTTP service computes.

In: `RewardRequest` records. Out: their rewards, as the service answers. It is sent

    POST ADDRESS   {"requests": [{"prompt": "12+30=", "response": "42", "answer": "42",
                                  "finish_reason": "stop", "metadata": {"level": 2}}, ...]}

with up to `AT_ONCE` requests, and answers 200 with one number for each, or null where it has none:

    {"rewards": [1.0, null, ...]}

No requests, no rewards: that is asked at the start, to see that the service is there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from megatron_drpo.config import RewardConfig
from megatron_drpo.errors import RewardError
from megatron_drpo.rewards import RewardRequest, finite_number

AT_ONCE = 32
"""Most requests in one POST."""

RETRY_PAUSES = (0.5, 2.0)
"""Seconds before a POST is repeated, where no connection came about or it broke, or the service
answered 429 or 5xx. One that takes too long is not repeated."""


class Service:
    """A line to the service: one POST at a time."""

    at_once = AT_ONCE

    def __init__(self, config: RewardConfig) -> None:
        self._address, self._seconds = config.reward, config.reward_timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Connect and ask for a sign of life.

        Raises:
            RewardError: there is none.
        """
        limit = aiohttp.ClientTimeout(total=self._seconds)
        self._session = aiohttp.ClientSession(timeout=limit)
        answer = await self._post([])
        if isinstance(answer, str):
            raise RewardError(f"--reward {self._address}: {answer}; is the service running?")

    async def judge(self, requests: Sequence[RewardRequest]) -> list[float | str]:
        """For each request a finite number, or why there is none.

        Raises:
            RewardError: the service refuses, or answers something else than agreed.
        """
        answer = await self._post([vars(request) for request in requests])
        if isinstance(answer, str):
            return [answer] * len(requests)
        return [_number(value) for value in answer]

    async def stop(self) -> None:
        """Close the connection."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, requests: list[dict[str, Any]]) -> list[Any] | str:
        """What the service answers, or why it did not, after the repetitions."""
        assert self._session is not None, "start comes first"
        problem = ""
        for pause in (*RETRY_PAUSES, None):
            try:
                async with self._session.post(
                    self._address, json={"requests": requests}, allow_redirects=False
                ) as response:
                    body = await response.read()
                if response.status == 200:
                    return self._rewards(body, len(requests))
                problem = f"the service answered {response.status} {_shown(body)}"
                if response.status != 429 and response.status < 500:
                    raise RewardError(f"--reward {self._address}: {problem}")
            except TimeoutError:
                return f"the service took longer than --reward-timeout-seconds {self._seconds:g}"
            except aiohttp.ClientError as error:
                problem = f"no answer from the service ({type(error).__name__}: {error})"
            if pause is not None:
                await asyncio.sleep(pause)
        return f"{problem}, {1 + len(RETRY_PAUSES)} times"

    def _rewards(self, body: bytes, count: int) -> list[Any]:
        try:
            rewards = json.loads(body)["rewards"]
        except (ValueError, TypeError, KeyError):
            rewards = None
        if not isinstance(rewards, list) or len(rewards) != count:
            raise RewardError(
                f"--reward {self._address}: the service answered {_shown(body)} to {count} "
                f'requests; must be {{"rewards": [...]}} with {count} numbers or null'
            )
        return rewards


def _number(value: object) -> float | str:
    number = finite_number(value)
    if number is not None:
        return number
    return f"the service gave {_shown(json.dumps(value).encode())}; must be a finite number"


def _shown(body: bytes) -> str:
    """The beginning of an answer, on one line."""
    return repr(body[:200].decode(errors="replace"))
